"""The bank of constant gates: never a stale gate, whatever happens between two forwards, or inside one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.banks import (
    ATOL,
    DIA,
    SPECS,
    Whole,
    assert_same,
    by_site,
    gated,
    maps,
    pause,
    plugged,
    served,
    step,
    swapped,
)
from helpers.plugged import ASR
from torch import Tensor, nn

from asr_downstream.plugging.bank import hooks as bank


def stepped(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(maps()).square().mean().backward()
    optimiser.step()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.1 if 'psi' in k else v for k, v in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v + 0.1 if 'psi' in k else v for k, v in model.state_dict().items()}, assign=True)


def replaced(model: Any) -> None:
    gate, other = (layer.gate[0] for layer in gated(model)[:2])
    gate.attention = copy.deepcopy(other.attention)


@pytest.mark.parametrize('change', [stepped, loaded, assigned, swapped, replaced])
@pytest.mark.parametrize('spec', [ASR, DIA, SPECS['shift'], SPECS['inputs']], ids=['ASR', 'DIA', 'shift', 'inputs'])
def test_no_gate_is_stale(change: Callable[[nn.Module], None], spec: Any) -> None:
    if change is replaced and spec is DIA:
        pytest.skip('it has no attention of its own')
    model = plugged(spec).train()
    before = model(maps())
    change(model)
    after = model(maps())
    assert not torch.allclose(before, after, 1e-6, 1e-6)
    assert torch.allclose(after, by_site(model, maps(), lambda m, x: m(x)), ATOL, ATOL)
    assert_same(step(model, maps()), by_site(model, maps()))


def test_a_part_called_by_itself_computes_its_own() -> None:
    model = plugged().eval()
    model(maps())
    with torch.no_grad():
        for parameter in model.layer1.parameters():
            parameter.mul_(1.5)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    y = model.layer1(x)
    assert torch.allclose(y, by_site(model, x, lambda m, x: m.layer1(x)), ATOL, ATOL)
    y.sum().backward()
    assert model.layer1[0].bn2.gate[0].psi.grad.any()


def test_a_forward_in_another_thread_changes_nothing_here() -> None:
    """Two forwards are under way at once, and the gates have changed between their starts."""
    model = plugged(ASR, Whole).eval()
    expected = by_site(model, maps(), lambda m, x: m(x).detach())
    arrived, go = threading.Event(), threading.Event()
    here = threading.get_ident()
    thread = threading.Thread(target=lambda: model(maps()))

    def meanwhile() -> None:
        if threading.get_ident() != here:
            arrived.set()
            go.wait(60)
            return
        for name, parameter in model.named_parameters():
            if '.gate.' in name:
                parameter.data.add_(1.0)
        thread.start()
        arrived.wait(60)

    handle = pause(model, meanwhile)
    with torch.no_grad():
        found = model(maps())
    go.set()
    thread.join()
    handle.remove()
    assert torch.allclose(found, expected, ATOL, ATOL)
    assert not torch.allclose(model(maps()), expected, 1e-6, 1e-6)


def test_gradients_wanted_inside_a_forward_without() -> None:
    """As classifier guidance wants them; and the other way round, a part without gradients inside a forward with."""
    model = plugged(ASR, Whole).eval()
    inner = model.layer2[0]
    psi = inner.bn2.gate[0].psi
    seen = []

    def watched(*_: Any) -> None:
        handle.remove()
        with torch.enable_grad():
            inner(torch.randn(2, 8, 16, 16, dtype=torch.float64)).sum().backward()
        seen.append(psi.grad.clone())

    handle = inner.register_forward_pre_hook(watched)
    with torch.no_grad():
        model(maps())
    assert seen[0].any()


@pytest.mark.parametrize('error', [KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_open(error: type[BaseException]) -> None:
    """Also one that torch calls no hook after: Ctrl-C, the stop of a notebook."""
    model = plugged(ASR, Whole)

    def stumble() -> None:
        raise error

    handle = pause(model, stumble)
    with pytest.raises(error):
        model(maps())
    handle.remove()
    swapped(model)
    part, x = model.layer3, torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with bank.off(model):
        expected = part(x)
    assert torch.equal(part(x), expected), 'a part that is called by itself takes what the forward has left'
    assert vars(model)[bank.BANK].shelf.opened == []
    assert_same(step(model, maps()), by_site(model, maps()))


def test_a_forward_that_has_ended_keeps_no_variables() -> None:
    """What is kept for recomputation is its gates: its frame has its inputs and outputs."""
    model = plugged(ASR, Whole)
    model(maps())
    kept = vars(model)[bank.BANK].shelf.kept
    assert kept is not None
    assert kept.frame is None


def test_parameters_that_are_views_of_a_sharded_one_are_left_to_their_sites() -> None:
    """FSDP1 marks them; what is stacked before their part runs would lose the gradients of other processes."""
    model = plugged(ASR, Whole)
    assert served(model)
    for parameter in model.parameters():
        parameter._fsdp_flattened = True
    assert not served(model)
    assert_same(step(model, maps()), by_site(model, maps()))


def test_a_model_that_calls_itself() -> None:
    model = plugged(ASR, Whole).eval()
    expected = model(maps() * 2)
    again: list[Tensor] = []

    def once_more() -> None:
        handle.remove()
        again.append(model(maps() * 2))

    handle = pause(model, once_more)
    y = model(maps())
    assert torch.equal(again[0], expected)
    assert torch.equal(y, model(maps()))
