"""Models with residual blocks, where their branches end, and what is asked of every one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from conftest import randomise
from torch import Tensor, nn

from asr_downstream import describe, fold, plug, verify
from asr_downstream.modules.slots import inside_gate
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.sites import find_sites

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
SE = dict(type='Attention', attention=dict(type='SE', reduction=4))


@dataclass(frozen=True)
class Case:
    """A model and what is known of it by reading its library.

    Attributes:
        build: makes the model, with random weights.
        inputs: arguments of its forward, in float64.
        sites: layers that end its residual branches, in the order of the model.
        block: names of the classes of its blocks.
        rest: what a block with a shortcut gives for an input if its branches give zeros.
        without: how many blocks have no shortcut.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    sites: tuple[str, ...]
    block: str
    rest: Callable[[Any, Tensor], Tensor]
    without: int = 0


def named(name: str) -> Callable[[type], type]:
    """Give a class the qualified name of one of a library."""

    def rename(cls: type) -> type:
        cls.__module__, _, cls.__qualname__ = name.rpartition('.')
        return cls

    return rename


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    return output if isinstance(output, Tensor) else output[0]


def near(x: Tensor, y: Tensor, most: float) -> bool:
    """Whether two tensors have one shape and differ by at most ``most``."""
    return x.shape == y.shape and bool((x - y).abs().max() <= most)


def stock(case: Case) -> nn.Module:
    """The model of a case in float64 and eval mode, its weights and statistics drawn anew."""
    return randomise(case.build().double()).eval()


def assert_branches_end_there(case: Case) -> None:
    """The sites are those of the case, and a block whose sites give zeros is its shortcut and what comes after."""
    model = stock(case)
    found = find_sites(model)
    assert tuple(site.path for site in found) == case.sites
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((block, args[0].clone(), first(output).clone()))

    blocks = [module for module in model.modules() if type(module).__name__ in case.block.split()]
    for block in blocks:
        block.register_forward_hook(keep)
    with torch.no_grad():
        model(*case.inputs())
        for block, x, y in seen:
            assert not near(y, case.rest(block, x), 1e-3)  # negative control: branches are heard
        seen.clear()
        for site in found:
            site.layer.register_forward_hook(lambda layer, args, output: torch.zeros_like(output))
        model(*case.inputs())
    assert len(seen) == len(blocks)
    silent = [near(y, case.rest(block, x), 1e-12) for block, x, y in seen]
    assert silent.count(False) == case.without


def trained(case: Case, spec: Any = ASR) -> nn.Module:
    """The model of a case, plugged, after a training step in which every gate has learned."""
    model = stock(case)
    plug(model, spec)
    randomise(model).train()
    gates = [gate for m in model.modules() if isinstance(m, Plugged) for gate in (*(m.gate or ()), *(m.dynamic or ()))]
    assert len(gates) == len(describe(model).sites)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    first(model(*case.inputs())).square().mean().backward()
    for gate in gates:
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in gate.parameters())
        assert any(bool(p.grad.any()) for p in gate.parameters())  # type: ignore[union-attr]
    optimiser.step()
    return model.eval()


def assert_folds(case: Case) -> nn.Module:
    """ASR(SE) is trained a step and folded: the stock model, with stock keys, that computes the same. Returns it."""
    model, inputs = trained(case), case.inputs()
    folded, report = fold(model)
    assert len(report.sites) == len(case.sites)
    bare = case.build().double().eval()
    assert [type(m) for m in folded.modules()] == [type(m) for m in bare.modules()]
    bare.load_state_dict(folded.state_dict(), strict=True)
    assert verify(model, folded, inputs).relative <= 1e-10
    assert verify(folded, bare, inputs).relative <= 1e-12  # weights lie elsewhere in memory: sums may round
    # negative control: the same weights without their gates
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not inside_gate(model, k)}, strict=True)
    assert verify(model, bare, inputs).relative > 1e-3
    return folded


def assert_preserved(case: Case, spec: Any) -> None:
    """With ``preserve=True`` the plugged model computes what the stock one does: nothing of a layer got lost."""
    model = stock(case)
    before = copy.deepcopy(model)
    plug(model, dict(spec, preserve=True))
    assert verify(model, before, case.inputs()).relative <= 1e-12
