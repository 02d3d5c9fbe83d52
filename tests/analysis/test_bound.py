"""Growth of noise in blocks whose growth is known, and its bound."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.plugged import ASR, CLASSIC, assert_untouched, snapshot, tiny
from torch import Tensor, nn

from asr_downstream import AsrError, fold, plug, register_site
from asr_downstream.folding.analysis.bound import measure_growth, operator_norm
from asr_downstream.models.resnet_cifar import BasicBlock

X = torch.randn(4, 3, 16, 16, dtype=torch.float64)


class LinearBlock(nn.Module):
    """``x + W x``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(*weight.shape[::-1], bias=False).double()
        self.linear.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Odd(LinearBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + 5 * self.linear(x)


@pytest.fixture(autouse=True)
def _sites() -> None:
    register_site(LinearBlock, 'linear')


@contextmanager
def added(model: nn.Module, noise: Tensor) -> Any:
    handle = model.register_forward_pre_hook(lambda module, args: (args[0] + noise,))
    try:
        yield
    finally:
        handle.remove()


def grown(model: nn.Module, x: Tensor, noise: Tensor, name: str = 'model') -> Any:
    return measure_growth(name, model, x, lambda m, batch: m(batch), added(model, noise), 'known')


def test_growth_in_a_linear_model_is_exact_and_reaches_its_bound() -> None:
    """Twice the identity, gates of a half: 1 + 0.5 * 2, whatever the noise."""
    model = nn.Sequential(*(LinearBlock(2 * torch.eye(8, dtype=torch.float64)) for _ in range(3)))
    x, noise = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for block in grown(model, x, noise).blocks:
        assert (block.gate, block.shortcut) == (1, 1)
        assert [block.growth, block.largest, block.branch, block.bound] == pytest.approx([3, 3, 2, 3], rel=1e-9)
    plug(model, dict(type='ASR', attention=dict(type='SigmoidVector'), sites=['*.linear']))
    for block in model:
        block.linear.gate[0].attention.vector.data.zero_()
    before = snapshot(model.double().eval())
    found = grown(model, x, noise)
    assert_untouched(model, before)
    for block in found.blocks:
        assert [block.gate, block.growth, block.branch, block.bound] == pytest.approx([0.5, 2, 2, 2], rel=1e-9)
    folded = grown(fold(model)[0], x, noise).blocks
    assert [(b.gate, b.growth, b.bound) for b in folded] == [pytest.approx((1, 2, 2))] * 3


def test_the_bound_is_of_the_worst_direction() -> None:
    weight = torch.randn(8, 8, dtype=torch.float64)
    model = nn.Sequential(LinearBlock(weight))
    _, size, directions = torch.linalg.svd(weight)
    x = torch.zeros(1, 8, dtype=torch.float64)
    (some,) = grown(model, x, torch.randn(1, 8, dtype=torch.float64)).blocks
    assert some.branch == pytest.approx(float(size[0]), rel=1e-4)
    assert some.growth < some.bound
    symmetric = nn.Sequential(LinearBlock(weight @ weight.mT))
    worst = torch.linalg.eigh(weight @ weight.mT).eigenvectors[:, -1][None]
    (block,) = grown(symmetric, x, worst).blocks
    assert block.growth == pytest.approx(block.bound, rel=1e-4)
    assert directions is not None


def test_operator_norms() -> None:
    conv = nn.Conv2d(3, 5, 3, 2, 1).double()
    basis = torch.eye(3 * 36, dtype=torch.float64).view(-1, 3, 6, 6)
    matrix = (conv(basis) - conv(torch.zeros_like(basis))).flatten(1).detach()
    assert operator_norm([conv], (7, 3, 6, 6)) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-4)
    norm = randomise(nn.BatchNorm2d(3)).double().eval()
    scale = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    assert operator_norm([norm], (1, 3, 2, 2)) == pytest.approx(float(scale.max()), rel=1e-4)
    assert operator_norm([nn.Identity()], (1, 3)) == pytest.approx(1)


@pytest.mark.parametrize('basic', [False, True])
def test_residual_networks_keep_their_bounds(basic: bool) -> None:
    model: Any = tiny(BasicBlock) if basic else tiny()
    plug(model, ASR)
    randomise(model).double().eval()
    noise = 0.1 * torch.randn_like(X)
    found = grown(model, X, noise)
    assert [block.path for block in found.blocks] == [f'layer{s}.{b}' for s in (1, 2, 3) for b in (0, 1)]
    for block in found.blocks:
        assert not block.why
        assert 0 < block.growth <= block.largest < block.bound
        assert (block.shortcut == 1) is (model.get_submodule(block.path).downsample is None)
    for plugged, folded in zip(found.blocks, grown(fold(model)[0], X, noise).blocks, strict=True):
        assert folded.growth == pytest.approx(plugged.growth)
        assert folded.bound <= plugged.bound * 1.0001  # gates of single channels are in the norm
    assert 'bound' in str(found)


def test_no_bound_where_there_is_none() -> None:
    model = tiny()
    plug(model, CLASSIC)
    found = grown(randomise(model).double().eval(), X, torch.ones_like(X))
    assert {(block.bound, block.why) for block in found.blocks} == {(None, 'gates depend on the input')}
    register_site(Odd, 'linear')
    odd = nn.Sequential(Odd(torch.eye(8, dtype=torch.float64)))
    (block,) = grown(odd, torch.zeros(1, 8).double(), torch.ones(1, 8).double()).blocks
    assert (block.growth, block.bound) == (pytest.approx(6), None)
    assert block.why == 'it computes more than its layers say'
    with pytest.raises(AsrError, match='no residual block'):
        measure_growth('plain', nn.Linear(2, 2), X, lambda m, b: None, nullcontext(), 'no')
