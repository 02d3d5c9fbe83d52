"""Noise and attacks on models whose answer is known."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.plugged import ASR, tiny
from torch import Tensor, nn

from asr_downstream import AsrError, fold, plug
from asr_downstream.folding.analysis.attacks import ATTACKS, fgsm, pgd
from asr_downstream.folding.analysis.noise import IMAGES, NORMS, STRENGTHS, ImageNoise, noise_kinds, noisy_norms, sweep
from asr_downstream.folding.analysis.stripes import Metric

X = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 0.4 + 0.25  # far from black and white


class Linear(nn.Module):
    """One output, the weighted sum of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def plugged(spec: Any = ASR) -> Any:
    model = tiny()
    plug(model, spec)
    return randomise(model).double().eval()


@pytest.mark.parametrize('kind', IMAGES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_no_noise_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    pixels = torch.cat([X, torch.zeros_like(X), torch.ones_like(X), 2 * X]).to(dtype)  # 2: beyond white, and kept
    assert torch.equal(ImageNoise(kind, 0.0)(pixels, 0.0, 1.0), pixels)
    assert not torch.equal(ImageNoise(kind, 0.1)(pixels, 0.0, 1.0), pixels)


def test_no_noise_in_norms_and_no_attack_change_nothing() -> None:
    model = plugged()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    with noisy_norms(model, 0.0):
        assert torch.equal(model(x), before)
    with noisy_norms(model, 0.1):
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)
    for make in ATTACKS.values():
        assert torch.equal(make(0.0, 0)(lambda images: model(images).square().sum(), x, -9.0, 9.0), x)


def test_constant_noise_through_a_linear_model_is_amplified_by_the_sum_of_its_weights() -> None:
    model = Linear()
    change = model(ImageNoise('constant', 0.1)(X, 0.0, 1.0)) - model(X)
    torch.testing.assert_close(change, 0.1 * model.weight.sum().expand(4), rtol=1e-10, atol=1e-12)


def test_gaussian_noise_through_a_linear_model_is_amplified_by_the_norm_of_its_weights() -> None:
    model, many = Linear(), X[:1].expand(20_000, -1, -1, -1)
    change = model(ImageNoise('gaussian', 0.01)(many, 0.0, 1.0)) - model(many)
    assert float(change.detach().std()) == pytest.approx(0.01 * float(model.weight.detach().norm()), rel=0.02)
    assert abs(float(change.detach().mean())) < 4 * 0.01 * float(model.weight.detach().norm()) / math.sqrt(20_000)


@pytest.mark.parametrize('name', ATTACKS)
def test_an_attack_of_a_linear_model_finds_the_worst_image(name: str) -> None:
    """Within a bound of e on every value, the output can grow by e times the sum of the magnitudes, and no more."""
    model = Linear()
    found = ATTACKS[name](0.05, 0)(lambda images: model(images).sum(), X, 0.0, 1.0)
    change = model(found) - model(X)
    torch.testing.assert_close(change, 0.05 * model.weight.abs().sum().expand(4), rtol=1e-10, atol=1e-12)
    assert model.weight.grad is None


def test_attacks_keep_their_bounds() -> None:
    model = plugged()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    for make in (fgsm, pgd):
        found = make(0.2)(lambda images: -model(images).logsumexp(1).sum(), x, 0.0, 1.0)
        assert float((found - x).abs().max()) == pytest.approx(0.2)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    one, two = (make(0.02)(lambda images: model(images).square().sum(), x, 0.0, 1.0) for make in (fgsm, pgd))
    assert model(two).square().sum() > model(one).square().sum() > model(x).square().sum()


def test_salt_and_pepper_takes_its_part_of_the_pixels_whole() -> None:
    x = torch.full((1, 3, 300, 300), 0.5)
    found = ImageNoise('salt-and-pepper', 0.1)(x, 0.0, 1.0)
    assert torch.equal(found[:, 0], found[:, 1])
    black, white = ((found[:, 0] == value).double().mean().item() for value in (0, 1))
    assert black == pytest.approx(0.05, rel=0.1)
    assert white == pytest.approx(0.05, rel=0.1)
    assert (found[:, 0] == 0.5).double().mean().item() == pytest.approx(1 - black - white)


@pytest.mark.parametrize('kind', IMAGES)
def test_noise_means_the_same_in_all_units(kind: str) -> None:
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    pixels = torch.cat([X, torch.zeros_like(X), torch.ones_like(X)])
    expected = (ImageNoise(kind, 0.1)(pixels, 0.0, 1.0) - mean) / std
    found = ImageNoise(kind, 0.1)((pixels - mean) / std, -mean / std, (1 - mean) / std)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ImageNoise(kind, 0.1)(pixels * 255, 0.0, 255.0), (expected * std + mean) * 255)
    noisy = ImageNoise(kind, 2.0)(pixels, 0.0, 1.0)
    assert 0 <= float(noisy.min()) <= float(noisy.max()) <= 1


def test_norms_of_a_model_and_of_its_fold_are_disturbed_alike() -> None:
    model = plugged([ASR, dict(type='ASR', attention=dict(type='SRM'))])
    folded, _ = fold(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    clean = model(x)
    with noisy_norms(model, 0.3), noisy_norms(folded, 0.3):
        with torch.no_grad():
            assert float((model(x) - folded(x)).abs().max() / folded(x).abs().max()) < 1e-10
            assert float((model(x) - clean).abs().max() / clean.abs().max()) > 0.01
        moved = [name for name, b in model.named_buffers() if not torch.equal(b, buffers[name])]
        assert moved
        assert not [name for name in moved if '.gate.' in name]  # the norms of the gates are not in the folded model
    with pytest.raises(KeyError), noisy_norms(model, 0.3):
        raise KeyError
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    with pytest.raises(AsrError, match='has no batch norms'), noisy_norms(Linear(), 0.1):
        pass


def test_curves_begin_without_noise() -> None:
    models = {'one': Linear(), 'two': Linear()}
    seen: list[Tensor] = []
    change: list[Any] = [None]

    @contextmanager
    def changed(model: nn.Module, noise: Any) -> Any:
        change[0] = noise
        yield
        change[0] = None

    def measure(model: nn.Module) -> float:
        x = X if change[0] is None else change[0](X, 0.0, 1.0)
        seen.append(x)
        return float(model(x).sum())

    found = sweep(models, Metric('sum', measure), ['constant', 'gaussian'], changed)
    assert [(c.arm, c.kind) for c in found.curves] == [(a, k) for a in models for k in ('constant', 'gaussian')]
    for curve in found.curves:
        assert curve.strengths == (0.0, *STRENGTHS[curve.kind])
        assert curve.values[0] == pytest.approx(float(models[curve.arm](X).sum()))
    for strength, value in zip(found.curves[0].strengths, found.curves[0].values, strict=True):
        expected = float((models['one'](X) + strength * models['one'].weight.sum()).sum())
        assert value == pytest.approx(expected, rel=1e-9)
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))  # the same noise for both
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert content['curves'][0]['kept'][0] == 1
    assert 'constant' in str(found)


def test_which_noise_a_run_has() -> None:
    assert noise_kinds(None, True, False, True) == ['constant', 'gaussian', 'salt-and-pepper', NORMS]
    assert noise_kinds(['fgsm'], True, True, True) == ['fgsm']
    with pytest.raises(AsrError, match="did you mean 'gaussian'"):
        noise_kinds(['gausian'], True, True, True)
    with pytest.raises(AsrError, match="'pgd' is not defined for this kind of run; it has batch-norm"):
        noise_kinds(['pgd'], False, False, True)
