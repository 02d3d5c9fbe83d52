"""Gates of inputs and shifts of outputs: plugged and folded layers against the feature-map form, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.cases import ATTENTIONS, LAYER_CASES, LayerCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asr_downstream import fold, plug
from asr_downstream.modules.affine import normalises

BAR = 1e-10
READERS = [case for case in LAYER_CASES if not normalises(case.build())]
SHIFTED = [case for case in LAYER_CASES if case.build().bias is not None]
SE = dict(type='SE', reduction=2)


def of(cases: list[LayerCase]) -> Any:
    return pytest.mark.parametrize('case', cases, ids=[case.name for case in cases])


class Holder(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def along(v: Tensor, y: Tensor, dim: int) -> Tensor:
    shape = [1] * y.dim()
    shape[dim] = -1
    return v.view(shape).expand_as(y)


def by_definition(stock: nn.Module, gates: Any, x: Tensor, dim: int) -> Tensor:
    """Each gate by itself, on the feature maps: those of inputs before the layer, the others after it, in order."""

    def values(gate: Any) -> Tensor:
        psi = torch.zeros(1, gate.channels, dtype=x.dtype) if gate.psi is None else gate.psi
        v = gate.attention(psi)[0]
        return v if gate.reference is None else v / gate.reference[0]

    for gate in gates:
        if gate.side == 'input':
            x = x * along(values(gate), x, dim)
    y = stock(x)
    for gate in gates:
        if gate.side == 'output':
            y = y * along(values(gate), y, dim)
            y = y if gate.bias is None else y + along(gate.bias, y, dim)
    return y


def pair(case: LayerCase, *specs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A stock layer in a model, and a plugged copy with gates and shifts that are anything."""
    stock = randomise(Holder(case.build()).double())
    model = copy.deepcopy(stock)
    plug(model, [dict(dict(type='ASR', attention=SE, sites=['layer']), **spec) for spec in specs])
    randomise(model.layer.gate)
    return stock, model


def check(case: LayerCase, stock: nn.Module, model: Any) -> None:
    """Outputs in training and eval, and of the folded model."""
    x, dim = case.input(), case.channel_dim
    expected = by_definition(stock, model.layer.gate, x, dim)
    torch.testing.assert_close(model(x), expected, atol=BAR, rtol=BAR)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, atol=BAR, rtol=BAR)
    stock.eval()
    model.eval()
    plain, expected = stock(x), by_definition(stock, model.layer.gate, x, dim)
    torch.testing.assert_close(model(x), expected, atol=BAR, rtol=BAR)
    folded, _ = fold(model)
    torch.testing.assert_close(folded(x), expected, atol=BAR, rtol=BAR)
    assert type(folded.layer) is type(stock.layer)
    assert folded.state_dict().keys() == stock.state_dict().keys()
    # Negative control: without them it is another function.
    assert (plain - expected).abs().max() > 1e-3


def check_gradients(case: LayerCase, stock: nn.Module, model: Any) -> None:
    """Of the input, the parameters of the layer, and those of the gates; and of the sum of their squares."""
    reference, x = copy.deepcopy(model.layer.gate), case.input()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(inputs[0]), by_definition(stock, reference, inputs[1], case.channel_dim)]
    weights = torch.randn_like(outputs[0])
    wanted = [
        [
            inputs[0],
            *(model.get_parameter(name) for name, _ in stock.named_parameters()),
            *model.layer.gate.parameters(),
        ],
        [inputs[1], *stock.parameters(), *reference.parameters()],
    ]
    firsts = [
        torch.autograd.grad((y * weights).sum(), of_side, create_graph=True)
        for y, of_side in zip(outputs, wanted, strict=True)
    ]
    for found, expected in zip(*firsts, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    seconds = [
        torch.autograd.grad(sum(g.square().sum() for g in first), of_side, allow_unused=True, materialize_grads=True)
        for first, of_side in zip(firsts, wanted, strict=True)
    ]
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


@of(READERS)
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_gates_of_inputs(case: LayerCase, attention: str) -> None:
    stock, model = pair(case, dict(attention=dict(type=attention), side='input'))
    check(case, stock, model)
    folded, report = fold(model)
    assert stock.layer.bias is None or torch.equal(folded.layer.bias, stock.layer.bias)
    assert report.sites[0].channels == model.layer.gate[0].channels == case.input().shape[case.channel_dim]
    assert report.sites[0].side == 'input'


@of(READERS)
def test_gradients_of_gates_of_inputs(case: LayerCase) -> None:
    check_gradients(case, *pair(case, dict(side='input')))


@of(READERS)
def test_both_sides(case: LayerCase) -> None:
    specs = dict(repeat=2), dict(side='input', repeat=2)
    stock, model = pair(case, *specs)
    check_gradients(case, stock, model)
    check(case, stock, model)
    assert fold(model)[1].sites[0].side == 'both'


@of(SHIFTED)
@pytest.mark.parametrize('repeat', [1, 3])
def test_shifts(case: LayerCase, repeat: int) -> None:
    stock, model = pair(case, dict(repeat=repeat, shift=True))
    assert [gate.bias is None for gate in model.layer.gate] == [True] * (repeat - 1) + [False]
    check(case, stock, model)
    assert fold(model)[1].sites[0].shift == float(model.layer.gate[-1].bias.abs().max())


@of(SHIFTED)
def test_gradients_of_shifts(case: LayerCase) -> None:
    check_gradients(case, *pair(case, dict(shift=True)))


@of(SHIFTED)
def test_a_later_gate_scales_the_shift_of_one_before(case: LayerCase) -> None:
    stock, model = pair(case, dict(shift=True), dict(attention=dict(type='ECA'), shift=True), dict())
    check(case, stock, model)
    check_gradients(case, stock.train(), model.train())
    first, second = (gate.bias for gate in list(model.layer.gate)[:2])
    v = [gate().detach() for gate in model.layer.gate]
    expected = (first * v[1] + second) * v[2]
    torch.testing.assert_close(model.layer.constants().shift, expected, atol=BAR, rtol=BAR)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    transpose=st.booleans(),
    bias=st.booleans(),
    plugs=st.lists(
        st.tuples(st.sampled_from(['output', 'input', 'shift']), st.integers(1, 2), st.booleans()),
        min_size=1,
        max_size=3,
    ),
)
def test_compositions_on_convolutions_of_any_shape(
    groups: int,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int,
    transpose: bool,
    bias: bool,
    plugs: list[tuple[str, int, bool]],
) -> None:
    build = nn.ConvTranspose2d if transpose else nn.Conv2d
    case = LayerCase(
        'any',
        lambda: build(groups * inputs, groups * outputs, kernel, stride, groups=groups, bias=bias),
        (2, groups * inputs, 5, 6),
    )
    specs = [
        dict(
            repeat=repeat,
            preserve=preserve,
            side='input' if kind == 'input' else 'output',
            shift=kind == 'shift' and bias,
        )
        for kind, repeat, preserve in plugs
    ]
    stock, model = pair(case, *specs)
    x = case.input()
    expected = by_definition(stock, model.layer.gate, x, 1)
    torch.testing.assert_close(model(x), expected, atol=BAR, rtol=BAR)
    torch.testing.assert_close(fold(model.eval())[0](x), expected, atol=BAR, rtol=BAR)


@of(READERS)
def test_preserve_starts_from_the_model_as_it_is(case: LayerCase) -> None:
    specs = [dict(type='ASR', attention=SE, sites=['layer'], side='input', repeat=2)]
    specs += [dict(type='ASR', attention=SE, sites=['layer'], shift=True)] * (case.build().bias is not None)
    stock = randomise(Holder(case.build()))
    model, fresh = copy.deepcopy(stock), copy.deepcopy(stock)
    plug(model, [dict(spec, preserve=True) for spec in specs])
    plug(fresh, specs)
    x = case.input().float()
    assert torch.equal(model(x), stock(x))
    assert not torch.allclose(fresh(x), stock(x), 1e-2, 1e-2)
    constants = model.layer.constants()
    assert torch.equal(constants.inputs, torch.ones_like(constants.inputs))
    folded, _ = fold(model.eval())
    for name, value in stock.state_dict().items():
        assert torch.allclose(folded.state_dict()[name], value, 1e-6, 1e-6)


def test_shifts_and_gates_of_inputs_beside_gates_that_depend_on_the_input() -> None:
    """What is constant folds; the mean of the rest scales the shift of what came before."""
    stock = randomise(Holder(nn.Conv2d(4, 8, 3, padding=1)).double()).eval()
    model: Any = copy.deepcopy(stock)
    asr = dict(type='ASR', attention=SE, sites=['layer'])
    classic = dict(type='Attention', attention=SE, sites=['layer'])
    plug(model, [dict(asr, shift=True), classic, dict(asr, side='input')])
    randomise(model.layer.gate)
    randomise(model.layer.dynamic)
    model.eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    y = by_definition(stock, model.layer.gate, x, 1)
    gates = model.layer.dynamic[0].attention(y)
    torch.testing.assert_close(model(x), y * gates[..., None, None], atol=BAR, rtol=BAR)
    kept, report = fold(model, dynamic='keep')
    torch.testing.assert_close(kept(x), model(x), atol=BAR, rtol=BAR)
    assert kept.layer.gate is None
    assert report.sites[0].side == 'both'
    means, _ = fold(model, calibrate=[x])
    expected = y * gates.mean(0)[:, None, None]
    torch.testing.assert_close(means(x), expected, atol=BAR, rtol=BAR)
    assert (means(x) - model(x)).abs().max() > 1e-4
