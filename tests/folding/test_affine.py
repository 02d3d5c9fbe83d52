"""The arithmetic of folding on stock layers: rows, columns and shifts against the layer's own function, in float64."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import randomise
from helpers.cases import LAYER_CASES, LayerCase
from torch import Tensor, nn

from asr_downstream import fold, plug
from asr_downstream.folding.exact import constants_of
from asr_downstream.modules.affine import Constants, input_channels, output_channels, scaled
from asr_downstream.plugging.layers import plugged_class

BAR = 1e-10
IDS = [case.name for case in LAYER_CASES]
AFFINE = [
    case for case in LAYER_CASES if not case.name.partition('-')[0].endswith(('Norm', 'Norm1d', 'Norm2d', 'Norm3d'))
]


def along(v: Tensor, y: Tensor, dim: int) -> Tensor:
    shape = [1] * y.dim()
    shape[dim] = -1
    return v.view(shape).expand_as(y)


def with_parameters(layer: nn.Module, constants: Constants) -> nn.Module:
    """A copy of ``layer`` with its parameters as `scaled` gives them."""
    weight, bias = scaled(layer, constants)
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize('case', LAYER_CASES, ids=IDS)
def test_gates_and_shifts_are_those_of_the_output(case: LayerCase) -> None:
    layer = randomise(case.build().double()).eval()
    v, s = torch.randn(2, output_channels(layer), dtype=torch.float64)
    constants = Constants(gate=v) if layer.bias is None else Constants(gate=v, shift=s)
    x = case.input()
    y = layer(x)
    expected = y * along(v, y, case.channel_dim)
    if layer.bias is not None:
        expected = expected + along(s, y, case.channel_dim)
    torch.testing.assert_close(with_parameters(layer, constants)(x), expected, atol=BAR, rtol=BAR)
    assert (y - expected).abs().max() > 1e-3


@pytest.mark.parametrize('case', AFFINE, ids=[case.name for case in AFFINE])
def test_inputs_are_those_of_the_input(case: LayerCase) -> None:
    layer = randomise(case.build().double())
    u = torch.randn(input_channels(layer), dtype=torch.float64)
    x = case.input()
    expected = layer(x * along(u, x, case.channel_dim))
    found = with_parameters(layer, Constants(inputs=u))
    torch.testing.assert_close(found(x), expected, atol=BAR, rtol=BAR)
    assert layer.bias is None or torch.equal(found.bias, layer.bias)
    assert (layer(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize('case', AFFINE, ids=[case.name for case in AFFINE])
def test_both_sides_at_once(case: LayerCase) -> None:
    layer = randomise(case.build().double())
    u = torch.randn(input_channels(layer), dtype=torch.float64)
    v = torch.randn(output_channels(layer), dtype=torch.float64)
    x = case.input()
    y = layer(x * along(u, x, case.channel_dim))
    found = with_parameters(layer, Constants(gate=v, inputs=u))(x)
    torch.testing.assert_close(found, y * along(v, y, case.channel_dim), atol=BAR, rtol=BAR)


@pytest.mark.parametrize('case', LAYER_CASES, ids=IDS)
def test_constants_of_a_plugged_layer_give_the_fold_to_the_bit(case: LayerCase) -> None:
    stock = randomise(nn.Sequential(case.build()))
    model = copy.deepcopy(stock)
    plug(model, dict(type='ASR', attention=dict(type='SE', reduction=2), repeat=2, sites=['0']))
    randomise(model[0].gate)
    folded, _ = fold(model.eval())
    constants = constants_of('0', copy.deepcopy(model)[0])
    assert constants.gate.dtype == torch.float64
    for layer in (stock[0], model[0]):
        weight, bias = scaled(layer, constants)
        assert weight.dtype == torch.float64
        assert torch.equal(weight.float(), folded[0].weight)
        assert (bias is None) is (folded[0].bias is None)
        assert bias is None or torch.equal(bias.float(), folded[0].bias)
    assert not torch.equal(folded[0].weight, stock[0].weight)


def test_no_constants_are_the_parameters_themselves() -> None:
    layer = nn.Conv2d(4, 8, 3)
    weight, bias = scaled(layer, Constants())
    assert weight is layer.weight
    assert bias is layer.bias


def test_what_cannot_be() -> None:
    two = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match='Conv2d has no bias'):
        scaled(nn.Conv2d(3, 2, 1, bias=False), Constants(shift=two))
    with pytest.raises(ValueError, match='BatchNorm2d normalises its inputs'):
        scaled(nn.BatchNorm2d(2), Constants(inputs=two))
    with pytest.raises(ValueError, match=r'Conv2d has 3 inputs, and there are constants of shape \(2,\)'):
        scaled(nn.Conv2d(3, 2, 1), Constants(inputs=two))
    with pytest.raises(ValueError, match='Linear has 5 outputs'):
        scaled(nn.Linear(2, 5), Constants(gate=two))
    with pytest.raises(ValueError, match='over 2 axes has no channels'):
        scaled(nn.LayerNorm((2, 3)), Constants(gate=two))


def test_a_plugged_layer_counts_the_channels_of_its_stock_layer() -> None:
    for case in LAYER_CASES:
        layer = case.build()
        assert plugged_class(type(layer)).channels_of(layer) == output_channels(layer) == 8


def test_it_needs_torch_alone() -> None:
    code = (
        "import asr_downstream.modules.affine, sys; print([m for m in sys.modules if 'asr_downstream.plugging' in m])"
    )
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == '[]'
