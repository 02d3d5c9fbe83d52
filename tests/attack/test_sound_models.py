"""What is unusual and sound is neither refused nor harmed: files of the user, values of specs, parts, attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from far import noisy, unet, vit
from torch import Tensor, nn

import asr_downstream
from asr_downstream import CheckpointError, plug
from asr_downstream.attention.se import SE
from asr_downstream.copying import copy_of
from asr_downstream.registry import ATTENTIONS

ASR = dict(type='ASR', attention=dict(type='SE', reduction=2))


class Hard(SE):
    """SE with an activation that its spec names by its class."""

    def __init__(self, channels: int, reduction: int = 2, act: Any = nn.Identity) -> None:
        super().__init__(channels, reduction)
        self.act = act()


def save(model: Any, folder: Path) -> str:
    with pytest.warns(UserWarning, match='load_plugged') as found:
        model.save_pretrained(folder)
    return str(found[0].message)


def test_saving_takes_away_only_what_the_library_would_load(tmp_path: Path) -> None:
    stem = 'diffusion_pytorch_model'
    cases = {
        unet: (
            [f'{stem}.safetensors', f'{stem}.bin', f'{stem}-00001-of-00002.bin', f'{stem}.safetensors.index.json'],
            [f'{stem}-mine.bin', f'{stem}.best.safetensors', 'model.safetensors', 'pytorch_model.bin'],
        ),
        vit: (
            ['model.safetensors', 'pytorch_model.bin', 'model-00001-of-00002.safetensors'],
            ['model-ema.safetensors', 'model.best.bin', 'pytorch_model-mine.bin', 'model-00001-of-2.safetensors'],
        ),
    }
    for number, (build, (stock, others)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in (*stock, *others):
            (folder / name).write_text('mine')
        model = build()
        plug(model, {**ASR, 'sites': ['*proj*', '*fc2']} if build is vit else ASR)
        save(model, folder)
        assert [name for name in stock if (folder / name).exists()] == []
        assert [(folder / name).read_text() for name in others] == ['mine'] * len(others)


def test_values_of_specs_that_json_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTIONS.module_dict, 'Hard', Hard)
    spec = dict(type='ASR', attention=dict(type='SE', reduction=np.int64(2)))
    model = unet()
    plug(model, spec)
    save(model, tmp_path / 'numpy')
    inputs = noisy()
    assert torch.equal(asr_downstream.load_plugged(tmp_path / 'numpy')(**inputs).sample, model.eval()(**inputs).sample)

    spec = dict(type='ASR', attention=dict(type='Hard', act=nn.Hardsigmoid))
    model = randomise(unet())
    plug(model, spec)
    said = save(model, tmp_path / 'class')
    assert 'attention.act: <class' in said
    assert 'model=' in said
    for given in (None, unet()):
        with pytest.raises(CheckpointError, match=r'attention\.act: <class.*Hardsigmoid.*model=\.\.\.'):
            asr_downstream.load_plugged(tmp_path / 'class', given)
    fresh = unet()
    plug(fresh, spec)
    again = asr_downstream.load_plugged(tmp_path / 'class', fresh)
    assert torch.equal(again(**inputs).sample, model.eval()(**inputs).sample)


class Endless:
    """A sampler that never ends."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError('was read')


@pytest.mark.timeout(30)
def test_copying_runs_nobodys_iterators() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.sampler, model.numbers, model.order = Endless(), range(10**12), {1: [Endless()]}
    x = torch.ones(2, requires_grad=True)
    model.holder = copy.deepcopy(nn.Linear(2, 2))
    model.holder.prior = {'a': [(x * 2, Endless())]}
    copied = copy_of(model)
    found: Tensor = copied.holder.prior['a'][0][0]
    assert torch.equal(found, x * 2)
    assert found.is_leaf
    assert copied.numbers == model.numbers
