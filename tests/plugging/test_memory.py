"""``memory``: which form of input-dependent gates runs is a choice that the spec makes, keeps and shows."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from bench.forms import plain_form
from conftest import randomise
from helpers.shared import ASR_DIA, DIA, Net, assert_same, images, results
from torch import Tensor, nn

from asr_downstream import PlugError, describe, plug
from asr_downstream.measure.cost import saved_bytes
from asr_downstream.measure.launches import count_step
from asr_downstream.models import resnet56
from asr_downstream.plugging.gating.gates import DynamicGate

SE = dict(type='Attention', attention=dict(type='SE', reduction=4))
ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
CHOICES = pytest.mark.parametrize('memory', [None, 'plain', 'low'])
BOTH = pytest.mark.parametrize('spec', [SE, DIA], ids=['SE', 'DIA'])


def plugged(spec: dict[str, Any], **more: Any) -> Net:
    torch.manual_seed(0)
    model = Net().double()
    plug(model, {**spec, **more})
    return randomise(model).train()


def nodes(y: Tensor) -> set[str]:
    """Names of the autograd nodes behind a tensor."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return {type(n).__name__ for n in seen}


@BOTH
@CHOICES
@pytest.mark.parametrize('layer', ['norm', 'conv'])
def test_the_form_that_was_chosen_runs_in_training(spec: dict[str, Any], memory: str | None, layer: str) -> None:
    sites, of_low = (['*.bn3'], 'AffineBackward') if layer == 'norm' else (['*.conv3'], 'ScaleBackward')
    model = plugged(spec, memory=memory, sites=sites)
    assert (of_low in nodes(model(images()))) == (memory == 'low')
    assert {row.memory for row in describe(model).sites} == {memory or 'plain'}


@BOTH
def test_forms_agree_and_default_is_the_plain_one(spec: dict[str, Any]) -> None:
    low, default = plugged(spec, memory='low'), plugged(spec)
    plain, x = plain_form(default), images()
    expected = results(plain, x)
    assert all(torch.equal(a, b) for a, b in zip(results(default, x), expected, strict=True))
    assert_same(results(low, x), expected)


@BOTH
def test_low_keeps_little_more_than_stock(spec: dict[str, Any]) -> None:
    stock, x = resnet56().train(), torch.randn(8, 3, 32, 32)

    def saved(model: nn.Module) -> int:
        return saved_bytes(model, lambda: model(x).square().mean())

    kept = {None: saved(stock)}
    for memory in ('plain', 'low'):
        model = copy.deepcopy(stock)
        plug(model, {**spec, 'memory': memory})
        kept[memory] = saved(model)
    assert kept['low'] < 1.016 * kept[None]
    assert kept['plain'] > 1.2 * kept[None]


@BOTH
def test_without_gradients_every_choice_runs_the_plain_form(spec: dict[str, Any]) -> None:
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    counts = [count_step(plugged(spec, memory=memory), x).inference.of for memory in (None, 'plain', 'low')]
    assert counts[0] == counts[1] == counts[2]


def test_where_there_is_no_low_form_the_plain_one_runs_and_is_named() -> None:
    for attention in ('CBAM', 'SRM'):
        model = plugged(dict(type='Attention', attention=dict(type=attention)), memory='low')
        assert {row.memory for row in describe(model).sites} == {'plain'}
        model(images()).sum().backward()
    net = nn.Sequential(nn.GroupNorm(2, 4))
    plug(net, {**SE, 'sites': ['0'], 'memory': 'low'})
    assert describe(net).sites[0].memory == 'plain'


def test_the_table_has_the_choice_where_gates_depend_on_the_input() -> None:
    def columns(spec: Any) -> list[str]:
        return [str(column.header) for column in describe(plugged(spec)).parts()[0].columns]

    assert columns({**DIA, 'memory': 'low'})[-1] == 'memory'
    assert 'memory' not in columns(ASR)
    assert 'low' in repr(describe(plugged(DIA, memory='low')))


@BOTH
def test_what_is_no_choice_is_refused_before_anything_is_changed(spec: dict[str, Any]) -> None:
    model = Net()
    for value, message in (('small', "memory='small' should be 'low' .* or None"), (True, 'memory=True should be')):
        with pytest.raises(PlugError, match=message):
            plug(model, {**spec, 'memory': value})
    for constant in (ASR, ASR_DIA):
        with pytest.raises(PlugError, match="takes no 'memory'"):
            plug(model, {**constant, 'memory': 'low'})
    assert not any(isinstance(m, DynamicGate) for m in model.modules())


@BOTH
def test_copies_pickles_and_checkpoints_keep_it(spec: dict[str, Any]) -> None:
    model, other, x = plugged(spec, memory='low'), plugged(spec), images()
    assert model.plug_spec == [{**spec, 'memory': 'low'}]
    assert model.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(model.state_dict())  # from with the choice to without, and back
    model.load_state_dict(other.state_dict())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    fresh = Net().double()
    plug(fresh, model.plug_spec)
    for kept in (copy.deepcopy(model), again, fresh):
        assert 'AffineBackward' in nodes(kept(x))


def test_gates_that_were_pickled_before_there_was_a_choice() -> None:
    model = plugged(SE)
    for gate in model.modules():
        if isinstance(gate, DynamicGate):
            del gate.__dict__['memory']
    assert 'AffineBackward' not in nodes(model(images()))
    assert {row.memory for row in describe(copy.deepcopy(model)).sites} == {'plain'}


def test_of_two_attentions_at_a_site_the_first_that_says_something_decides() -> None:
    for first, second, low in ((None, 'low', True), ('plain', 'low', False), ('low', None, True)):
        model = Net().double().train()
        plug(model, [{**SE, 'memory': first}, {**SE, 'memory': second}])
        assert ('AffineBackward' in nodes(model(images()))) == low
