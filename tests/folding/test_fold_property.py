"""Every layer of the fold table x every attention x repeat 1 to 3 x groups x bias, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise
from helpers.cases import ATTENTIONS, LAYER_CASES, LayerCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asr_downstream import fold, plug
from asr_downstream.plugging.layers import LAYERS

BAR = 1e-10
IDS = [case.name for case in LAYER_CASES]


class Holder(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def gates_by_definition(layer: nn.Module) -> Tensor:
    """v = product of attention(psi), written out without the code under test."""
    v = torch.ones((), dtype=torch.float64)
    for gate in layer.gate:
        psi = torch.zeros(1, gate.channels, dtype=torch.float64) if gate.psi is None else gate.psi
        v = v * gate.attention(psi)[0]
    return v.detach()


def along(v: Tensor, y: Tensor, dim: int) -> Tensor:
    shape = [1] * y.dim()
    shape[dim] = -1
    return y * v.view(shape)


def test_the_cases_cover_the_fold_table() -> None:
    assert {type(case.build()) for case in LAYER_CASES} == {
        cls for cls in LAYERS if cls.__module__.startswith('torch.')
    }


@pytest.mark.parametrize('case', LAYER_CASES, ids=IDS)
@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('repeat', [1, 2, 3])
def test_plugged_and_folded_equal_the_definition(case: LayerCase, attention: str, repeat: int) -> None:
    stock = randomise(Holder(case.build()).double())
    model = copy.deepcopy(stock)
    plug(model, dict(type='ASR', attention=dict(type=attention), repeat=repeat, sites=['layer']))
    randomise(model.layer.gate)
    v = gates_by_definition(model.layer)
    x = case.input()

    expected = along(v, stock(x), case.channel_dim)  # both in training mode: statistics of the batch
    found = model(x)
    torch.testing.assert_close(found, expected, atol=BAR, rtol=BAR)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, atol=BAR, rtol=BAR)

    stock.eval()
    model.eval()
    plain = stock(x)
    expected = along(v, plain, case.channel_dim)
    torch.testing.assert_close(model(x), expected, atol=BAR, rtol=BAR)
    folded, report = fold(model)
    torch.testing.assert_close(folded(x), expected, atol=BAR, rtol=BAR)
    assert type(folded.layer) is type(stock.layer)
    assert folded.state_dict().keys() == stock.state_dict().keys()
    assert report.sites[0].channels == 8
    # Negative control: without the gates it is another function.
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize('case', LAYER_CASES, ids=IDS)
def test_gradients_equal_those_of_the_feature_map_form(case: LayerCase) -> None:
    stock = randomise(Holder(case.build()).double())
    model = copy.deepcopy(stock)
    plug(model, dict(type='ASR', attention=dict(type='SE', reduction=2), sites=['layer']))
    reference = copy.deepcopy(model)
    x, y = case.input().requires_grad_(), case.input()
    y.copy_(x.detach())
    y.requires_grad_()

    model(x).square().mean().backward()
    v = reference.layer.gate[0].attention(reference.layer.gate[0].psi)[0]
    along(v, stock(y), case.channel_dim).square().mean().backward()

    torch.testing.assert_close(x.grad, y.grad, atol=BAR, rtol=BAR)
    for name, p in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, atol=BAR, rtol=BAR)
    for name, p in reference.layer.gate.named_parameters():
        torch.testing.assert_close(model.layer.gate.get_parameter(name).grad, p.grad, atol=BAR, rtol=BAR)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    transpose=st.booleans(),
    bias=st.booleans(),
    repeat=st.integers(1, 3),
)
def test_convolutions_of_any_shape(
    groups: int, inputs: int, outputs: int, kernel: int, stride: int, transpose: bool, bias: bool, repeat: int
) -> None:
    build = nn.ConvTranspose2d if transpose else nn.Conv2d
    stock = build(groups * inputs, groups * outputs, kernel, stride, groups=groups, bias=bias)
    model = randomise(Holder(stock).double()).eval()
    plug(model, dict(type='ASR', attention=dict(type='SE', reduction=2), repeat=repeat, sites=['layer']))
    randomise(model.layer.gate)
    x = torch.randn(2, groups * inputs, 5, 6, dtype=torch.float64)
    folded, _ = fold(model)
    torch.testing.assert_close(folded(x), model(x), atol=BAR, rtol=BAR)
    assert type(folded.layer) is build


@pytest.mark.parametrize(('dtype', 'bar'), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_lower_precision(dtype: torch.dtype, bar: float) -> None:
    """One rounding of each weight: in half precisions no better than that, and no worse."""
    model = randomise(Holder(nn.Conv2d(8, 8, 3)).double()).eval()
    plug(model, dict(type='ASR', attention=dict(type='SE', reduction=2), sites=['layer']))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    exact = model(x)
    low = model.to(dtype)
    folded, report = fold(low)
    assert (folded(x.to(dtype)).double() - exact).abs().max() <= bar * exact.abs().max()
    assert report.sites[0].rounding <= torch.finfo(dtype).eps
