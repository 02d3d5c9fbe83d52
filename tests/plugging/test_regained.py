"""Gates after convolutions and linear layers without their output kept: equal to the plain form, and cheaper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bench.forms import plain_form
from conftest import randomise
from torch import Tensor, nn

from asr_downstream import plug, verify
from asr_downstream.measure.cost import saved_bytes

SE = dict(type='Attention', attention=dict(type='SE', reduction=4), memory='low')
ECA = dict(type='Attention', attention=dict(type='ECA'), memory='low')
DIA = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4), memory='low')
ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))

LAYERS = {
    'conv': (lambda: nn.Conv2d(8, 8, 3, padding=1), (3, 8, 6, 5)),
    'conv-groups': (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), (3, 8, 6, 5)),
    'conv-reflect': (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'), (3, 8, 6, 5)),
    'conv1d': (lambda: nn.Conv1d(8, 8, 3, padding=1), (3, 8, 7)),
    'linear': (lambda: nn.Linear(8, 8), (3, 7, 8)),
    'linear-3d': (lambda: nn.Linear(8, 8, bias=False), (3, 2, 5, 8)),
}


class Blocks(nn.Module):
    """Three residual branches, each a layer after a nonlinearity that does not keep its output."""

    def __init__(self, build: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({'layer': build()}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block['layer'](torch.tanh(x))
        return x


def two_forms(layer: str, spec: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    build, shape = LAYERS[layer]
    model = Blocks(build)
    specs = [{**s, 'sites': ['*.layer']} for s in (spec if isinstance(spec, list) else [spec])]
    plug(model, specs)
    randomise(model).to(dtype).train()
    return model, plain_form(model), torch.randn(shape, dtype=dtype)


def derivatives(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients, and gradients of their squares."""
    x = x.clone().requires_grad_()
    wanted = [x, *model.parameters()]
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    first = torch.autograd.grad((y * weights).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    return [y, *first, *(g for g in second if g is not None)]


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('spec', [SE, ECA, DIA, [ASR, SE], ASR], ids=['SE', 'ECA', 'DIA', 'ASR+SE', 'ASR'])
def test_equals_the_plain_form_with_second_derivatives(layer: str, spec: Any) -> None:
    model, plain, x = two_forms(layer, spec)
    ours, theirs = derivatives(model, x), derivatives(plain, x)
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert max(float(g.detach().abs().max()) for g in ours[2:]) > 1e-3


def test_scaled_weights_are_not_kept() -> None:
    stock = Blocks(lambda: nn.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(1, 16, 4, 4)
    model = copy.deepcopy(stock)
    plug(model, {**ASR, 'sites': ['*.layer']})
    kept = {name: saved_bytes(m, lambda m=m: m(x).square().mean()) for name, m in (('stock', stock), ('asr', model))}
    gates = 3 * 16 * 16 * 4  # bytes: 16 vectors a site is plenty
    assert kept['asr'] - kept['stock'] < gates < stock.blocks[0]['layer'].weight.nbytes


@pytest.mark.parametrize('spec', [SE, DIA], ids=['SE', 'DIA'])
def test_the_output_is_not_kept(spec: Any) -> None:
    build = lambda: nn.Conv2d(16, 16, 3, padding=1)  # noqa: E731
    stock = Blocks(build)
    x = torch.randn(4, 16, 32, 32)

    def saved(model: nn.Module) -> int:
        return saved_bytes(model, lambda: model(x).square().mean())

    model = copy.deepcopy(stock)
    plug(model, {**spec, 'sites': ['*.layer']})
    plain = plain_form(model)
    assert saved(model) < 1.02 * saved(stock)
    assert saved(plain) > 1.2 * saved(stock)


def test_inputs_without_gradients_or_batch() -> None:
    for layer, shape in (('conv', (8, 6, 5)), ('conv', (3, 8, 6, 5)), ('linear', (8,)), ('linear', (7, 8))):
        model, plain, _ = two_forms(layer, ASR)
        x = torch.randn(shape, dtype=torch.float64)
        found = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, plain)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_autocast_regains_in_the_precision_of_the_forward() -> None:
    model, plain, x = two_forms('conv', DIA, torch.float32)
    found = []
    for form in (model, plain):
        with torch.autocast('cpu', torch.bfloat16):
            loss = form(x).float().square().mean()
        found.append(torch.autograd.grad(loss, list(form.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


def test_other_cases_take_the_plain_form() -> None:
    for spec in ([SE, SE], dict(type='Attention', attention=dict(type='CBAM', reduction=4), memory='low')):
        model, plain, x = two_forms('conv', spec)
        assert 'ScaleBackward' not in names(model(x).grad_fn)
        plain(x)  # CBAM has a batch norm
        assert verify(model.eval(), plain.eval(), x).absolute == 0
    model, _, x = two_forms('conv', SE)
    assert 'ScaleBackward' in names(model(x).grad_fn)
    frozen = model.requires_grad_(False)
    assert frozen(x).grad_fn is None
    alone, _, _ = two_forms('linear', SE)
    assert torch.isfinite(alone(torch.randn(3, 8, dtype=torch.float64))).all()  # no positions to average over


def names(node: Any) -> set[str]:
    """Names of the nodes of a graph."""
    seen, todo = set(), [node]
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return {type(n).__name__ for n in seen}
