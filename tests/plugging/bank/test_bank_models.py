"""The bank of constant gates: models that are copied, saved, transformed, moved, rebuilt and folded."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from helpers.banks import (
    ATOL,
    DIA,
    Whole,
    assert_same,
    by_site,
    gated,
    maps,
    plugged,
    served,
    step,
    swapped,
)
from helpers.plugged import ASR
from torch import Tensor, nn

from asr_downstream import fold, plug, rebind
from asr_downstream.plugging.bank import hooks as bank


def test_copies_pickles_and_parts() -> None:
    model = plugged()
    expected = step(model, maps())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.load_state_dict(model.state_dict())
        assert vars(other)[bank.BANK] is not vars(model)[bank.BANK]
        assert {layer.shelf for layer in gated(other)} == {vars(other)[bank.BANK].shelf}
        swapped(other)  # the copy's gates are its own
        assert_same(step(other, maps()), by_site(other, maps()))
    assert_same(step(model, maps()), expected)
    stage = copy.deepcopy(model.layer1)
    assert stage(torch.randn(2, 8, 16, 16, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize('spec', [ASR, DIA], ids=['ASR', 'DIA'])
def test_a_model_goes_when_nobody_holds_it(spec: Any) -> None:
    """Its memory is free at once, and not when a collector of circles comes by."""
    gc.disable()
    try:
        model = plugged(spec)
        stock = weakref.ref(model.layer1[0].conv1)
        model(maps()).sum().backward()
        gate = weakref.ref(model.layer1[0].bn2.gate[0])
        del model
        assert stock() is None
        assert gate() is None or spec is DIA  # members of a run know each other
    finally:
        gc.enable()


def test_functional_call_and_transforms() -> None:
    model = plugged().eval()
    parameters = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(parameters, strict=False)
    expected = other(maps())
    assert torch.allclose(torch.func.functional_call(model, parameters, (maps(),)), expected, ATOL, ATOL)
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (maps(),)).square().mean())(parameters)
    plain = step(other, maps())
    assert torch.allclose(grads['layer1.0.bn2.gate.0.psi'], plain['gradient of layer1.0.bn2.gate.0.psi'], 1e-10, 1e-10)


def test_a_compiled_model_computes_by_site() -> None:
    model = plugged(dtype=torch.float32).eval()
    with torch.no_grad():
        y = torch.compile(model, backend='eager', fullgraph=True)(maps(torch.float32))
        assert torch.allclose(y, model(maps(torch.float32)), 1e-5, 1e-5)


def test_who_watches_a_gate_sees_it() -> None:
    model = plugged()
    seen: list[Tensor] = []
    handle = model.layer1[0].bn2.gate[0].register_forward_hook(lambda m, i, v: seen.append(v))
    model(maps())
    assert len(seen) == 1
    handle.remove()
    model(maps())
    assert len(seen) == 1


def test_weights_in_other_places_or_precisions() -> None:
    model = plugged()
    model(maps())
    model.layer1[0].bn2.gate[0].float()  # by hand: not like its neighbour
    assert served(model) == set(gated(model))
    assert [len(group.layers) for group in vars(model)[bank.BANK].plan] == [1, 1, 2, 2]
    assert_same(step(model, maps()), by_site(model, maps()), 1e-6)
    model.layer2[0].bn2.gate[0].attention.fc1.float()  # nothing that could be computed
    assert served(model) == {*gated(model.layer1), *gated(model.layer3)}
    model.double()
    abroad = copy.deepcopy(model).to('meta')
    assert served(abroad) == set()
    assert served(model.float()) == set(gated(model))


def test_parts_that_were_plugged_by_themselves_keep_their_bank() -> None:
    model = nn.Sequential(plugged(ASR, Whole), nn.Unflatten(1, (-1, 1, 1)), nn.Conv2d(32, 3, 1), nn.Conv2d(3, 3, 1))
    model.double()
    plug(model, {**ASR, 'sites': ['2', '3']})
    inner = model[0]
    assert served(inner) == set(gated(inner))
    assert served(model) == {model[2], model[3]}
    assert_same(step(model, maps()), by_site(model, maps()))


def test_layers_that_a_converter_rebuilt() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plugged())
    rebind(model)
    assert served(model) == set(gated(model))
    assert_same(step(model.eval(), maps()), by_site(model, maps()))


def test_a_folded_model_has_no_trace_of_it() -> None:
    model = plugged().eval()
    folded, _ = fold(model)
    assert not folded._forward_pre_hooks
    assert not folded._forward_hooks
    assert not folded._forward_hooks_always_called
    assert bank.BANK not in vars(folded)
    assert all('shelf' not in vars(m) for m in folded.modules())
    assert torch.allclose(folded(maps()), model(maps()), 1e-10, 1e-10)
    bank.uninstall(model)
    assert not model._forward_pre_hooks
    assert all('shelf' not in vars(m) for m in model.modules())
    assert torch.allclose(folded(maps()), model(maps()), 1e-10, 1e-10)
