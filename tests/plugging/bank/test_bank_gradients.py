"""The bank of constant gates: gradients are those of sites by themselves, in every kind of training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.banks import (
    ATOL,
    DIA,
    SPECS,
    Early,
    Late,
    Whole,
    assert_same,
    by_site,
    gated,
    maps,
    plugged,
    step,
)
from helpers.plugged import ASR
from torch import Tensor, nn

from asr_downstream.measure.cost import saved_bytes
from asr_downstream.measure.launches import Launches
from asr_downstream.plugging.bank import hooks as bank
from asr_downstream.plugging.bank import regained as regaining


@pytest.mark.parametrize('spec', [ASR, DIA])
def test_unused_sites_that_a_state_comes_from(spec: Any) -> None:
    model = plugged(spec, Late)
    found = step(model, maps())
    assert (found['gradient of layer1.0.bn2.gate.0.psi'] is None) == (spec is ASR)
    assert found['gradient of layer1.0.bn2.weight'] is None
    assert_same(found, by_site(model, maps()))


@pytest.mark.parametrize(
    'spec',
    [ASR, DIA, *(SPECS[name] for name in ('shared', 'composed', 'shift', 'recurrent and shift', 'inputs'))],
)
def test_unused_sites_have_no_gradient(spec: Any) -> None:
    model = plugged(spec, Early)
    found = step(model, maps())
    expected = by_site(model, maps())
    assert any(grad is None for grad in expected.values())
    unused = [grad for name, grad in found.items() if name.startswith('gradient of layer2.1.') and '.gate.' in name]
    assert unused
    assert all(grad is None for grad in unused)
    assert_same(found, expected)


def test_gradients_take_no_copy() -> None:
    """Every one has the layout of its parameter, so that it is handed over and not copied."""
    model = plugged(dtype=torch.float32)
    with Launches() as found:
        model(maps(torch.float32)).square().mean().backward()
    assert 'clone' not in found.of
    assert all(p.grad.stride() == p.stride() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', ['SE', 'SPA', 'CBAM', 'SRM', 'repeat', 'recurrent'])
def test_large_stacks_are_made_again_and_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plugged(SPECS[name])
    model.eval()
    expected = step(model, maps())
    size = saved_bytes(model, lambda: model(maps()).square().mean())
    monkeypatch.setattr(regaining, 'KEPT', 0)
    assert_same(step(model, maps()), expected)
    stacked = sum(p.numel() * 8 for name, p in model.named_parameters() if '.gate.' in name)
    assert size - saved_bytes(model, lambda: model(maps()).square().mean()) >= (0.3 if name == 'SRM' else 0.5) * stacked
    loss = model(maps()).square().mean()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with Launches() as launches:
            loss.backward(retain_graph=True)
        if name == 'SE':
            assert launches.of['cat'] == 3  # once a group
        for key, parameter in model.named_parameters():
            grad = expected[f'gradient of {key}']
            assert (grad is None) == (parameter.grad is None)
            assert grad is None or torch.allclose(parameter.grad, grad, ATOL, ATOL)
    with torch.no_grad():
        model.layer1[0].bn2.gate[0].psi.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_second_derivatives_of_large_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regaining, 'KEPT', 0)
    test_second_derivatives()


def test_accumulated_gradients_and_two_forwards() -> None:
    x = maps()

    def accumulate(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        for part in x.split(1):
            (model(part).square().mean() + model(part * 2).mean()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    model = plugged()
    assert_same(accumulate(copy.deepcopy(model), x), by_site(model, x, accumulate))


def test_second_derivatives() -> None:
    def penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        model.zero_grad(set_to_none=True)
        gates = [p for name, p in model.named_parameters() if '.gate.' in name or 'bn2' in name]
        grads = torch.autograd.grad(model(x).square().mean(), gates, create_graph=True)
        sum(g.square().sum() for g in grads).backward()  # type: ignore[union-attr]
        return {name: p.grad for name, p in model.named_parameters()}

    model = plugged()
    assert_same(penalty(copy.deepcopy(model), maps()), by_site(model, maps(), penalty), 1e-10)


@pytest.mark.parametrize('frozen', ['.gate.', 'bn2.weight', 'psi', 'layer2.'])
def test_frozen_parts(frozen: str) -> None:
    model = plugged()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    found = step(model, maps())
    assert all(found[f'gradient of {n}'] is None for n, p in model.named_parameters() if not p.requires_grad)
    assert_same(found, by_site(model, maps()))


@pytest.mark.parametrize('spec', [ASR, DIA, SPECS['shift'], SPECS['inputs']], ids=['ASR', 'DIA', 'shift', 'inputs'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(spec: Any, dtype: torch.dtype) -> None:
    model = plugged(spec, dtype=dtype).eval()
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.float32):
        found = model(maps(dtype))
        expected = by_site(model, maps(dtype), lambda m, x: m(x))
        layer = gated(model)[0]
        ready = vars(model)[bank.BANK].ready(model)[layer].constants
        assert [c is None for c in ready] == [c is None for c in layer.constants()]
        for v, alone in zip(ready, layer.constants(), strict=True):
            assert v is None or v.dtype == dtype
            assert v is None or torch.allclose(v, alone.to(dtype), 1e-6 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(found, expected, 5e-2, 5e-2)


def test_data_parallel_training(tmp_path: Any) -> None:
    """Unused sites are None there too, and the gradients those of one process."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        for kind, unused in ((Whole, False), (Early, True)):
            model = plugged(ASR, kind)
            if not unused:
                model.fc.requires_grad_(False)
            expected = step(copy.deepcopy(model), maps())
            parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            for _ in range(2):
                model.load_state_dict(plugged(ASR, kind).state_dict())
                parallel.zero_grad(set_to_none=True)
                parallel(maps()).square().mean().backward()
            for name, parameter in model.named_parameters():
                grad = expected[f'gradient of {name}']
                assert (grad is None) == (parameter.grad is None), name
                assert grad is None or torch.allclose(parameter.grad, grad, 1e-10, 1e-10), name
    finally:
        torch.distributed.destroy_process_group()
