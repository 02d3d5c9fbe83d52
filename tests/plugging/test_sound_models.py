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
from helpers.far import noisy, unet, vit
from torch import Tensor, nn

import asr_downstream
from asr_downstream import CheckpointError, FoldError, PlugError, fold, plug, verify
from asr_downstream.attention.se import SE
from asr_downstream.engine.state.ema import EMA
from asr_downstream.modules.copies import copy_of
from asr_downstream.plugging.weights import check_weights_finite, not_finite
from asr_downstream.registry import ATTENTIONS, check_arguments

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


class Kept(nn.Parameter):
    """A parameter with a name of its own."""


class Net(nn.Module):
    """Three layers, of which ``a`` gets gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def scripted(net: Any) -> None:
    net.b = torch.jit.script(net.b)


def compiled(net: Any) -> None:
    net.b = torch.compile(net.b, backend='eager')


def own_list(net: Any) -> None:
    net.decay = [{'params': [net.a.weight, net.b.bias]}]


def lazy(net: Any) -> None:
    net.head = nn.LazyLinear(3)


def nested(net: Any) -> None:
    net.register_buffer('ragged', torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def columns(net: Any) -> None:
    matrix = torch.randn(4, 8)
    net.a.weight, net.b.weight = nn.Parameter(matrix[:, :4]), nn.Parameter(matrix[:, 4:])


def lists_in_lists(net: Any) -> None:
    found: list[Any] = [torch.ones(1)]
    for _ in range(200):
        found = [found, found]
    net.lists = found


def subclass(net: Any) -> None:
    net.a.weight = Kept(net.a.weight.detach())


@pytest.mark.timeout(30)
@pytest.mark.parametrize('change', [scripted, compiled, own_list, lazy, nested, columns, lists_in_lists, subclass])
def test_models_that_are_unusual_and_sound_are_plugged_and_folded(change: Any) -> None:
    net = Net()
    change(net)
    plug(net, {**ASR, 'sites': ['a']})
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if 'psi' in name:
                parameter.normal_()
    folded, report = fold(net.eval())
    assert len(report.sites) == 1
    assert verify(net, folded, torch.randn(2, 4)).relative < 1e-5


def test_parts_that_hold_sites_and_weights_that_overlap_are_still_refused() -> None:
    net: Any = nn.Sequential(Net(), nn.Linear(4, 4))
    net[0] = torch.compile(net[0], backend='eager')
    with pytest.raises(PlugError, match=r'lies in 0, which is wrapped by OptimizedModule'):
        plug(net, {**ASR, 'sites': ['0*a']})
    net = nn.Sequential(Net(), nn.Linear(4, 4))
    plug(net, {**ASR, 'sites': ['0.a']})
    net[0].a = torch.jit.trace(net[0].a.eval(), torch.randn(2, 4))
    with pytest.raises(FoldError, match=r'0\.a.*TorchScript'):
        fold(net.eval())
    net, matrix = Net(), torch.randn(4, 8)
    net.a.weight, net.b.weight = nn.Parameter(matrix[:, :4]), nn.Parameter(matrix[:, 3:7])
    with pytest.raises(PlugError, match=r'a: its weight is shared with another layer: b\.weight'):
        plug(net, {**ASR, 'sites': ['a']})
    net = Net()
    net.b.tied = [net.a.weight]  # another layer may compute with it
    with pytest.raises(PlugError, match='shared with'):
        plug(net, {**ASR, 'sites': ['a']})


def test_arguments_may_be_what_they_are_by_default() -> None:
    def attention(hidden: int = None, clip: float = float('inf')) -> None: ...  # type: ignore[assignment]  # noqa: RUF013

    check_arguments('attention', attention, {'hidden': None, 'clip': float('inf')})
    with pytest.raises(PlugError, match='clip=nan'):
        check_arguments('attention', attention, {'clip': float('nan')})


def test_infinities_in_masks_are_meant() -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer('mask', torch.full((2, 2), float('-inf')).triu(1))
    check_weights_finite(net.state_dict(), Path('a'), net)
    ema = EMA(net)
    ema.update(net, 5)
    assert not_finite(ema.state, net) == []
    for name in ('0.weight', '1.running_var'):
        broken = {**net.state_dict(), name: torch.tensor([float('inf')])}
        with pytest.raises(CheckpointError, match=name):
            check_weights_finite(broken, Path('a'), net)
    assert not_finite({**net.state_dict(), 'mask': torch.tensor(float('nan'))}, net) == ['mask']


class Locked(dict[str, Any]):
    """A batch that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError('cannot pickle a lock')


def test_batches_that_cannot_be_copied_calibrate() -> None:
    net = Net()
    plug(net, dict(type='Attention', attention=dict(type='SE', reduction=2), sites=['a']))
    batches = [Locked(x=torch.randn(3, 4)) for _ in range(2)]
    _, report = fold(net.eval(), calibrate=batches, step=lambda model, batch: model(batch['x']))
    assert len(report.sites) == 1
