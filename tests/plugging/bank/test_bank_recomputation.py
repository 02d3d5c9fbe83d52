"""The bank of constant gates: blocks that are computed again in the backward pass."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.banks import (
    DIA,
    SPECS,
    Checkpointed,
    Whole,
    assert_same,
    maps,
    plugged,
    step,
    trained,
)
from helpers.plugged import ASR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize('spec', [ASR, DIA, SPECS['shift'], SPECS['inputs']], ids=['ASR', 'DIA', 'shift', 'inputs'])
def test_recomputation_meets_the_same_tensors(spec: Any) -> None:
    expected = step(plugged(spec, Whole), maps())
    model = plugged(spec, Checkpointed)
    assert_same(trained(step(model, maps())), trained(expected), 1e-10)


def test_recomputation_under_the_reentrant_form() -> None:
    """Its first pass records no gradients, so its sites compute their own, twice."""
    expected = step(plugged(ASR, Whole), maps())
    model = plugged(ASR, Checkpointed)
    model.reentrant = True
    assert_same(trained(step(model, maps())), trained(expected), 1e-10)


@pytest.mark.parametrize('trained', ['', '.gate.'], ids=['all', 'gates'])
def test_recomputation_after_another_forward(trained: str) -> None:
    """Gradients of two batches before one backward pass, and an evaluation in between."""
    x, other = maps(), maps().flip(0) * 2
    model, whole = plugged(ASR, Checkpointed).eval(), plugged(ASR, Whole).eval()
    for name, parameter in [*model.named_parameters(), *whole.named_parameters()]:
        parameter.requires_grad_(trained in name)

    def both(m: nn.Module) -> list[Tensor | None]:
        loss = m(x).square().mean() + m(other).square().mean()
        with torch.no_grad():
            m(other)
        loss.backward()
        return [p.grad for p in m.parameters()]

    for found, expected in zip(both(model), both(whole), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, 1e-10, 1e-10)


def test_recomputation_of_a_part_called_by_itself() -> None:
    """The last forward of its sites had no bank, so their second one has none either."""
    model = plugged(ASR, Checkpointed).eval()
    model(maps()).sum().backward()
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    alone = copy.deepcopy(model)
    checkpoint(model.layer1[0], x, use_reentrant=False).square().mean().backward()
    alone.layer1[0](x).square().mean().backward()
    for p, q in zip(model.layer1[0].parameters(), alone.layer1[0].parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, 1e-10, 1e-10)


def test_recomputation_in_a_thread_of_the_backward_pass() -> None:
    """Devices compute backward passes in threads of their own."""
    expected = step(plugged(ASR, Whole).eval(), maps())
    model = plugged(ASR, Checkpointed).eval()
    loss = model(maps()).square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for name, parameter in model.named_parameters():
        grad = expected[f'gradient of {name}']
        assert (grad is None) == (parameter.grad is None)
        assert grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10)


def test_a_whole_model_is_recomputed_and_later_its_blocks() -> None:
    """All in one thread of backward passes, which so has seen forwards of its own."""
    model, whole = plugged(ASR, Checkpointed).eval(), plugged(ASR, Whole).eval()
    with ThreadPoolExecutor(1) as elsewhere:
        loss = checkpoint(model, maps(), use_reentrant=False).square().mean()
        elsewhere.submit(loss.backward).result()
        first = step(whole, maps())
        for m in (model, whole):
            for name, parameter in m.named_parameters():
                grad = first[f'gradient of {name}']
                assert m is whole or grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10), name
                parameter.data.mul_(1.2)
        model.zero_grad()
        elsewhere.submit(model(maps()).square().mean().backward).result()
    second = step(whole, maps())
    for name, parameter in model.named_parameters():
        grad = second[f'gradient of {name}']
        assert grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10), name
