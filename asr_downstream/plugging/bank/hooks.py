"""The bank: the constant gates of a model are computed together, once a forward, before its first layer runs.

A site by itself takes about twenty small operators a training step for its gates, and on a GPU a small operator costs
what a large one does. Those of many sites are the same operators on other parameters, so a forward pre-hook of the
plugged model stacks the parameters of sites that are alike (one attention, one width, one stage) and computes their
gates in one batched pass. Norms get their weight and bias scaled, convolutions and linear layers their bias; a layer
takes both from the shelf (`asr_downstream.plugging.gating.shelf`). The names and places of parameters are those without
a bank, and nothing is kept from one forward to the next but the plan: which parameters are stacked.

A group has the sites of one stage, at most `LONGEST`: its gradients come when the backward pass has left the group, and
with one group for all, data-parallel training could send nothing before the end.

Sites compute their own gates where the bank has no right or no reason: parameters that are sharded or elsewhere at the
time (FSDP, offloading), hooks that watch a gate, torch.compile, torch.func and forward-mode derivatives, a part of the
model that is called by itself, and attentions that a batch of parameters gives other numbers (random ones, norms).
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from asr_downstream.attention.kernels.functions import eager
from asr_downstream.plugging.bank.alike import Forms
from asr_downstream.plugging.bank.groups import Group, groups_of
from asr_downstream.plugging.gating.gates import ConstantGate
from asr_downstream.plugging.gating.shelf import Ready, Shelf
from asr_downstream.plugging.layers import Plugged

__all__ = ['Bank', 'install', 'off', 'uninstall']

BANK = 'gate_bank'  # attribute of a plugged model


class Bank:
    """What a plugged model keeps for its hooks. Copies and pickles start without a plan.

    Attributes:
        shelf: of its layers.
        enabled: False: all sites compute their own gates.
        forms: how attentions that were met are computed together; copies share it, as it says nothing of weights.
    """

    def __init__(self, shelf: Shelf | None = None, enabled: bool = True, forms: Forms | None = None) -> None:
        self.shelf = shelf or Shelf()
        self.enabled = enabled
        self.forms: Forms = {} if forms is None else forms
        self.plan: list[Group] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Bank:
        return Bank(copy.deepcopy(self.shelf, memo), self.enabled, self.forms)

    def __reduce__(self) -> tuple[type[Bank], tuple[Shelf, bool]]:
        return Bank, (self.shelf, self.enabled)

    def groups(self, model: nn.Module) -> list[Group]:
        """The plan for ``model``, made again where something in the model has been replaced."""
        if self.plan is None or not all(group.stands() for group in self.plan):
            self.plan = groups_of(sites(model, self.shelf), self.forms)
        return self.plan

    def ready(self, model: nn.Module) -> dict[nn.Module, Ready]:
        """Compute the gates of all sites that the bank may compute here and now."""
        found: dict[nn.Module, Ready] = {}
        if self.enabled and eager() and not getattr(model, '_is_replica', False):  # the copies of DataParallel
            for group in self.groups(model):
                found.update(group.ready())
        return found


def fill(model: nn.Module, inputs: Any) -> None:
    """Forward pre-hook of a plugged model."""
    if torch.compiler.is_compiling():
        return
    bank: Bank = model.__dict__[BANK]
    bank.shelf.open(bank.ready(model), sys._getframe(1))


def close(model: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of a plugged model, also called after an exception."""
    if not torch.compiler.is_compiling():
        model.__dict__[BANK].shelf.close(sys._getframe(1))


def sites(model: nn.Module, shelf: Shelf) -> dict[str, Any]:
    """Layers with constant gates that take from ``shelf``, by path."""
    plugged: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, Plugged)}
    return {path: layer for path, layer in plugged.items() if layer.shelf is shelf and layer.gate is not None}


def install(model: nn.Module, fresh: Iterable[ConstantGate] = ()) -> None:
    """Give a model with constant gates its bank, if it has none, and its layers the shelf.

    Layers of a part that was plugged by itself keep the bank of that part.

    Args:
        model: plugged.
        fresh: new gates; where they have a reference (``preserve=True``), it is taken again through the bank, so that
            they start at exactly 1 in its arithmetic too.
    """
    inner = [m for m in model.modules() if m is not model and BANK in vars(m)]
    taken = {id(layer) for part in inner for layer in part.modules()}
    plugged: list[Any] = [m for m in model.modules() if isinstance(m, Plugged) and id(m) not in taken]
    layers = [layer for layer in plugged if layer.gate is not None]
    if not layers:
        return
    bank: Bank | None = model.__dict__.get(BANK)
    if bank is None:
        bank = model.__dict__[BANK] = Bank()
        model.register_forward_pre_hook(fill, prepend=True)
        model.register_forward_hook(close, always_call=True)
    for layer in layers:
        layer.shelf = bank.shelf
    bank.plan = None
    gates = set(fresh)
    with torch.no_grad():
        for group in bank.groups(model):
            group.take_references(gates)


def uninstall(model: nn.Module) -> None:
    """Take the bank away from a model, its hooks and shelf too; its sites compute their own gates."""
    if model.__dict__.pop(BANK, None) is None:
        return
    for hooks, hook in ((model._forward_pre_hooks, fill), (model._forward_hooks, close)):
        for number in [n for n, h in hooks.items() if h is hook]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)
            model._forward_pre_hooks_with_kwargs.pop(number, None)
    for layer in model.modules():
        layer.__dict__.pop('shelf', None)


@contextlib.contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Let all sites of a model compute their own gates in this context, for comparison."""
    banks = [bank for m in model.modules() if (bank := m.__dict__.get(BANK)) is not None]
    before = [bank.enabled for bank in banks]
    try:
        for bank in banks:
            bank.enabled = False
        yield
    finally:
        for bank, enabled in zip(banks, before, strict=True):
            bank.enabled = enabled
