"""Loading an adapter to train on, and unloading one: what is put back, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import FREE, SE, SPECS, adapted, base, differing, saved, train
from helpers.plugged import X, assert_untouched, snapshot
from torch import nn

from asr_downstream import CheckpointError, fold, plug, verify
from asr_downstream.folding.adapters.apply import apply_gates
from asr_downstream.folding.adapters.base import remember
from asr_downstream.folding.adapters.file import list_gates
from asr_downstream.folding.adapters.load import load_gates, unload
from asr_downstream.folding.adapters.save import save_gates
from asr_downstream.modules.slots import HasGates


def plugged(stock: nn.Module, spec: Any = SE) -> nn.Module:
    model = copy.deepcopy(stock)
    plug(model, spec)
    return model.eval()


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_parameters_of_gates_come_back_to_the_bit(tmp_path: Path, spec: Any) -> None:
    stock = base()
    model = adapted(stock, spec, ('fc.weight',))
    save_gates(model, tmp_path / 'a.safetensors', learnt=True)
    fresh = plugged(stock, spec)
    assert 'fc.weight' in differing(fresh, model)
    load_gates(fresh, tmp_path / 'a.safetensors')
    assert differing(fresh, model) == []
    assert differing(apply_gates(stock, tmp_path / 'a.safetensors'), fold(model)[0]) == []
    small = save_gates(model, tmp_path / 'b.safetensors')
    assert small.learnt == {}


@pytest.mark.parametrize('spec', [SE, [dict(SE, repeat=2), FREE], dict(SPECS['DIA'], preserve=True)], ids=str)
def test_constants_go_into_gates_that_divide_by_their_start(tmp_path: Path, spec: Any) -> None:
    """Whatever the attention is: another start makes them another multiple, and they learn on from there."""
    stock = base(torch.float64)
    path = saved(tmp_path, stock, SE, heads=('fc.weight',))
    fresh = train(plugged(stock, spec))
    before = copy.deepcopy(fresh)
    load_gates(fresh, path)
    x = torch.randn(X, dtype=torch.float64)
    wanted = apply_gates(stock, path)
    assert verify(fresh, wanted, x).relative < 1e-10
    assert verify(before, wanted, x).relative > 1e-3
    assert verify(fold(fresh)[0], wanted, x).relative < 1e-10
    fresh.train()
    fresh(x).square().mean().backward()
    moved = [p.grad for at, p in fresh.named_parameters() if at.endswith('psi')]
    assert moved
    assert all(g is not None and bool(g.abs().max() > 0) for g in moved)
    unload(fresh, base=stock)
    assert differing(fresh.eval(), stock) == []


def test_gates_of_inputs_are_saved_applied_and_put_back(tmp_path: Path) -> None:
    stock, path = base(torch.float64), tmp_path / 'a.safetensors'
    spec = [dict(SE, side='input', sites=['layer*.conv2'], repeat=2), dict(SE, shift=True)]
    model = adapted(stock, spec)
    adapter = save_gates(model, path)
    applied = apply_gates(stock, path)
    assert differing(applied, fold(model)[0]) == []
    changed = {name.partition('.')[2].partition('.')[2] for name in differing(applied, stock)}
    assert changed == {'conv2.weight', 'bn3.weight', 'bn3.bias'}
    constants = adapter.sites['layer1.0.conv2'].constants
    assert [c is None for c in constants] == [True, True, False]
    assert differing(apply_gates(stock, path, strength=0.0), stock) == []
    fresh = train(plugged(stock, spec))
    load_gates(fresh, path)
    x = torch.randn(X, dtype=torch.float64)
    assert verify(fresh, applied, x).relative < 1e-10
    unload(fresh, base=stock)
    assert differing(fresh.eval(), stock) == []


@pytest.mark.parametrize('last', [[], [SE, FREE]], ids=['alone', 'before others'])
def test_a_shift_goes_into_the_last_gate_that_learns_one(tmp_path: Path, last: list[Any]) -> None:
    stock = base(torch.float64)
    shift = dict(SE, shift=True)
    path = saved(tmp_path, stock, shift)
    fresh = train(plugged(stock, [shift, shift, *last]))
    load_gates(fresh, path)
    x, wanted = torch.randn(X, dtype=torch.float64), apply_gates(stock, path)
    assert verify(fresh, wanted, x).relative < 1e-10
    assert verify(train(fresh), wanted, x).relative > 1e-3
    load_gates(fresh, none := saved(tmp_path, stock, SE, 'none'))
    assert verify(fresh, apply_gates(stock, none), x).relative < 1e-10
    with pytest.raises(CheckpointError, match='has a shift, and its gates learn none; plug with shift=True'):
        load_gates(plugged(stock, [SE, *last]), path)
    inputs = saved(tmp_path, stock, dict(SE, side='input', sites=['*.conv3']), 'inputs')
    with pytest.raises(CheckpointError, match='are on other sides of the layer'):
        load_gates(plugged(stock, dict(SE, sites=['*.conv3'])), inputs)


def test_what_cannot_be_put_back_is_refused_by_name(tmp_path: Path) -> None:
    stock = base()
    path = saved(tmp_path, stock, SE)
    hard = plugged(stock, FREE)
    before = snapshot(hard)
    with pytest.raises(CheckpointError, match=r'layer1.0.bn3: .* preserve=True, or save the file with learnt=True'):
        load_gates(hard, path)
    less = plugged(stock, dict(SE, skip=['layer2.*']))
    with pytest.raises(CheckpointError, match=r'at none, only the file at layer2.0.bn3, layer2.1.bn3; plug .*"SE"'):
        load_gates(less, path)
    with pytest.raises(CheckpointError, match='only the file at layer1.0.bn3'):
        load_gates(copy.deepcopy(stock), path)
    other = plugged(base())
    with pytest.raises(CheckpointError, match='was made for another base'):
        load_gates(other, path)
    load_gates(other, path, force=True)
    assert_untouched(hard, before)


def test_a_gate_of_0_has_no_start_that_gives_it(tmp_path: Path) -> None:
    stock = base()
    model = adapted(stock, FREE)
    model.layer1[0].bn3.gate[0].attention.gamma.data[3] = 0
    save_gates(model, tmp_path / 'a.safetensors')
    assert list_gates(tmp_path / 'a.safetensors').sites['layer1.0.bn3'].constants.gate[3] == 0
    with pytest.raises(CheckpointError, match=r'layer1.0.bn3: constants of .* are 0'):
        load_gates(plugged(stock), tmp_path / 'a.safetensors')


def test_heads_must_fit(tmp_path: Path) -> None:
    stock = base()
    path = saved(tmp_path, stock, SE, heads=('fc.weight', 'fc.bias'))
    other = copy.deepcopy(stock)
    other.fc = nn.Linear(stock.fc.in_features, 3)
    with pytest.raises(CheckpointError, match='is of shape .* has a head of shape'):
        load_gates(plugged(other), path)


# Unloading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('spec', [*SPECS.values(), dict(type='DIA', attention=dict(type='DIALSTM'))], ids=str)
def test_unloading_gives_the_base_back_to_the_bit(spec: Any) -> None:
    stock = base()
    model = adapted(stock, spec)
    layers = [m for m in model.modules() if isinstance(m, HasGates)]
    assert len(layers) == 6
    unload(model)
    assert differing(model, stock) == []
    assert vars(model).keys() == vars(stock).keys()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert verify(model, stock, torch.randn(X)).absolute == 0
    plug(model, SE)  # can be plugged again


def test_heads_need_the_weights_that_they_had() -> None:
    stock = base()
    model = adapted(stock, SE, ('fc.bias',))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match='fc.bias are not what they were when training began; give .* base='):
        unload(model)
    wrong = copy.deepcopy(stock)
    wrong.conv1.weight.data += 1
    with pytest.raises(CheckpointError, match='conv1.weight are others in this base'):
        unload(model, base=wrong)
    with pytest.raises(CheckpointError, match='the base has no conv1.weight, .* of the same shape'):
        unload(model, base={'x': torch.zeros(1)})
    with pytest.raises(CheckpointError, match='expected weights, a file of them or a model, got a int'):
        unload(model, base=3)
    assert_untouched(model, before)
    unload(model, base=stock.state_dict())
    assert differing(model, stock) == []


def test_without_a_record_the_gates_alone_are_taken_off() -> None:
    stock = base()
    model = train(plugged(stock))
    unload(model)
    assert differing(model, stock) == []
    unload(model)
    remember(model)
    unload(model)
    assert 'adapter_base' not in vars(model)
