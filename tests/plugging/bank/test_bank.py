"""The bank of constant gates: what a site computes by itself, in a few operators for all."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.banks import (
    ATOL,
    DIA,
    SPECS,
    Mixed,
    assert_same,
    by_site,
    gated,
    maps,
    moved,
    plugged,
    served,
    small,
    step,
)
from helpers.plugged import ASR
from torch import nn

from asr_downstream import plug
from asr_downstream.measure.launches import Launches
from asr_downstream.plugging.bank import groups as planning
from asr_downstream.plugging.bank import hooks as bank


@pytest.mark.parametrize('preserve', [False, True])
@pytest.mark.parametrize('name', SPECS)
def test_a_step_is_what_sites_compute_by_themselves(name: str, preserve: bool) -> None:
    spec = SPECS[name]
    specs = [{**s, 'preserve': preserve} for s in (spec if isinstance(spec, list) else [spec])]
    if name == 'LayerScale':
        specs[0]['attention'] = dict(type='LayerScale', init_value=0.3)
    model = plugged(specs)
    assert served(model) == set(gated(model))
    assert_same(step(model, maps()), by_site(model, maps()))
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(maps()), by_site(model, maps(), lambda m, x: m(x)), ATOL, ATOL)


@pytest.mark.parametrize('attention', ['SE', 'ECA', 'SPA'])
def test_convolutions_linear_layers_and_norms(attention: str) -> None:
    torch.manual_seed(0)
    model = Mixed().double()
    sites = ['convolutions.*.0', 'convolutions.*.1', 'up.0.0', 'tokens.*.0', 'tokens.*.1']
    plug(model, dict(type='ASR', attention=dict(type=attention), sites=sites))
    moved(model)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert served(model) == set(gated(model))
    assert_same(step(model, x), by_site(model, x))
    with torch.no_grad():
        assert torch.allclose(model(x), by_site(model, x, lambda m, x: m(x)), ATOL, ATOL)


def test_sites_that_run_close_to_each_other_are_a_group() -> None:
    kinds = {
        'unet.down_blocks.0.resnets.0.conv2': 32, 'unet.down_blocks.1.resnets.0.conv2': 64,
        'unet.down_blocks.2.resnets.0.conv2': 64, 'unet.up_blocks.0.resnets.0.conv2': 64,
        'unet.up_blocks.1.resnets.0.conv2': 32, 'unet.mid_block.resnets.0.conv2': 64,
    }  # fmt: skip
    ordered = {path: kinds[path] for path in planning.in_order(kinds)}
    assert sorted([path.split('.')[1] for path in group] for group in planning.stages(ordered)) == [
        ['down_blocks'],
        ['down_blocks', 'down_blocks', 'mid_block', 'up_blocks'],
        ['up_blocks'],
    ]
    alternating = {f'layer{i}.{j}.bn{k}': 4 * k for i in (1, 2) for j in range(2) for k in (1, 2)}
    assert sorted(map(len, planning.stages(alternating))) == [2, 2, 2, 2]


def test_a_shift_that_later_gates_scale_is_left_to_its_site() -> None:
    model = plugged([{**ASR, 'shift': True}, ASR])
    assert not served(model)
    assert_same(step(model, maps()), by_site(model, maps()))


def test_shifts_cost_one_operator_a_group() -> None:
    """In the backward pass nothing: the gradient of a shift is that of the bias."""
    counts = []
    for spec in (ASR, {**ASR, 'shift': True}):
        model = plugged(spec)
        with Launches() as launches:
            model(maps()).sum().backward()
        counts.append(launches.number)
    groups = vars(model)[bank.BANK].groups(model)
    assert counts[1] - counts[0] == len(groups) == 3


def test_a_plan_is_made_again_when_a_shift_comes() -> None:
    model = plugged()
    model(maps())
    for layer in gated(model)[:3]:  # in the second group of one site alone
        layer.gate[0].learn_shift(layer.bias)
        nn.init.normal_(layer.gate[0].bias)
    assert served(model) == set(gated(model))
    assert_same(step(model, maps()), by_site(model, maps()))


def test_groups_are_those_of_a_stage_and_not_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's gradients come at its end; with one for all, data-parallel training could send nothing before."""
    model = plugged()
    assert [len(g.layers) for g in vars(model)[bank.BANK].groups(model)] == [2, 2, 2]
    monkeypatch.setattr(planning, 'LONGEST', 1)
    model = copy.deepcopy(model)
    assert [len(g.layers) for g in vars(model)[bank.BANK].groups(model)] == [1] * 6
    assert [len(g.layers) for g in vars(plugged(DIA))[bank.BANK].plan] == [2, 2, 2]  # a state runs along


@pytest.mark.parametrize(
    'name', ['SE', 'ECA', 'CBAM', 'repeat', 'recurrent', 'shared', 'shift', 'recurrent and shift', 'inputs']
)
def test_preserve_starts_at_one_exactly(name: str) -> None:
    stock = small()
    model = copy.deepcopy(stock)
    plug(model, {**SPECS[name], 'preserve': True})
    for ready in vars(model)[bank.BANK].ready(model).values():
        v = ready.constants.inputs if name == 'inputs' else ready.v
        assert torch.equal(v, torch.ones_like(v))
    x = maps(torch.float32)
    assert torch.equal(model.eval()(x), stock.eval()(x))


def test_references_of_trained_gates_stay() -> None:
    """A second plug takes the references of its own gates only."""
    model = small()
    plug(model, {**ASR, 'sites': ['layer1.0.bn2'], 'preserve': True})
    moved(model)
    before = model.layer1[0].bn2.gate[0].reference
    plug(model, {**ASR, 'sites': ['layer1.1.bn2'], 'preserve': True})
    assert model.layer1[0].bn2.gate[0].reference is before
    assert served(model) == {model.layer1[0].bn2, model.layer1[1].bn2}
