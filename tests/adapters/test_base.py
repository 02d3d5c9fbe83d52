"""The base of an adapter: what its digests tell apart, and what a training remembers of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import randomise
from helpers.plugged import ASR, tiny

from asr_downstream import CheckpointError, fold, plug
from asr_downstream.folding.adapters.base import (
    BASE_FILE,
    base_state,
    digest,
    digests,
    learning,
    matching,
    read_base,
    remember,
)


def test_a_digest_is_of_dtype_shape_and_every_bit() -> None:
    x = torch.randn(3, 4)
    same = [x.clone(), x.t().contiguous().t(), torch.cat([x, x])[:3], torch.nn.Parameter(x)]
    assert {digest(value) for value in same} == {digest(x)}
    last = x.clone()
    last.view(torch.int32)[-1, -1] ^= 1
    signed = torch.zeros(2), -torch.zeros(2)
    others = [x, x.view(4, 3), x.view(torch.int32), x.double(), last, *signed, x[:0], x[:0, :2], torch.tensor(0.0)]
    assert len({digest(value) for value in others}) == len(others)
    assert digest(torch.randn(4).to(torch.bfloat16)) != digest(torch.zeros(4, dtype=torch.bfloat16))


def test_the_base_of_a_plugged_model_is_that_of_the_stock_one() -> None:
    stock = randomise(tiny())
    before = remember(stock)
    plug(stock, [ASR, dict(type='DIA', attention=dict(type='DIALSTM'))])
    assert remember(stock) == before
    assert 'conv1.weight' in before.tensors
    assert 'bn1.running_var' in before.tensors
    assert 'bn1.num_batches_tracked' not in before.tensors  # no weight, and some checkpoints lack it


def test_what_was_trained_is_named() -> None:
    model = randomise(tiny())
    plug(model, ASR)
    base = remember(model, ['fc'])
    assert base.heads == ('fc.weight', 'fc.bias')
    assert model.adapter_base is base
    assert base.changed(digests(base_state(model))) == []
    randomise(model.layer1[0].bn3.gate)
    model.bn1.num_batches_tracked += 1
    assert base.changed(digests(base_state(model))) == []
    model.layer1[0].conv1.weight.data[0, 0] *= 1.5
    model.bn1.running_mean[3] = 7
    model.fc.bias.data += 1
    assert base.changed(digests(base_state(model))) == ['bn1.running_mean', 'layer1.0.conv1.weight', 'fc.bias']


def test_a_folded_model_has_nothing_of_it() -> None:
    model = randomise(tiny()).eval()
    plug(model, ASR)
    remember(model)
    assert vars(fold(model)[0]).keys() == vars(tiny()).keys()
    assert copy.deepcopy(model).adapter_base == model.adapter_base


def test_it_is_kept_in_the_folder_of_a_training(tmp_path: Path) -> None:
    model = randomise(tiny())
    base = remember(model, ['fc.*'], tmp_path)
    assert read_base(tmp_path / BASE_FILE) == base
    model.fc.weight.data += 1
    assert remember(model, ['fc.*'], tmp_path) != base  # goes on from a checkpoint: the head is trained by now
    assert read_base(tmp_path / BASE_FILE) == base
    assert remember(model, ['fc.bias'], tmp_path) == read_base(tmp_path / BASE_FILE)
    model.conv1.weight.data += 1  # another training, in the same folder
    assert remember(model, ['fc.bias'], tmp_path) == read_base(tmp_path / BASE_FILE)
    (tmp_path / BASE_FILE).write_text('cut off')
    assert remember(model, [], tmp_path) == read_base(tmp_path / BASE_FILE)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('', 'cannot be read'),
        ('[1]', 'does not hold the digests'),
        ('{"format": 1, "tensors": {"a": 1}, "heads": []}', 'does not hold the digests'),
        ('{"format": 1, "tensors": {"a": "b"}, "heads": "fc"}', 'does not hold the digests'),
        ('{"format": 9, "tensors": {"a": "b"}, "heads": []}', 'format 9 is not known'),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / BASE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_base(tmp_path / BASE_FILE)
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_base(tmp_path / 'other.json')


def test_heads_are_named_by_weights_or_modules() -> None:
    names = ['head.fc.weight', 'head.fc.bias', 'header.weight', 'body.weight']
    assert matching(names, ['head']) == names[:2]
    assert matching(names, ['*.bias', 'header*']) == names[1:3]
    assert matching(names, []) == []
    with pytest.raises(CheckpointError, match="nothing is named 'heads'; weights are head.fc.weight"):
        matching(names, ['heads'])
    with pytest.raises(CheckpointError, match='should be a list of patterns'):
        matching(names, 'head')


def test_parameters_that_learn_beside_the_gates_are_named() -> None:
    model = tiny().requires_grad_(False)
    plug(model, ASR)
    assert learning(model, ()) == []
    model.conv1.weight.requires_grad_(True)
    model.fc.bias.requires_grad_(True)
    assert learning(model, ()) == ['conv1.weight', 'fc.bias']
    assert learning(model, ['fc.bias']) == ['conv1.weight']
