"""Plugging and unplugging one layer, by changing its class; and plugging a layer again that was rebuilt as stock."""

from __future__ import annotations

from typing import Any

from torch import nn

from asr_downstream.errors import PlugError
from asr_downstream.modules.check import check_module
from asr_downstream.modules.slots import DYNAMIC, GATE, SLOTS
from asr_downstream.plugging.bank import hooks as bank
from asr_downstream.plugging.gating.gates import ConstantGate, DynamicGate, Gate
from asr_downstream.plugging.layers import Plugged, plugged_class

__all__ = ['attach', 'detach', 'orphans', 'rebind']


def attach(layer: Any, gates: list[ConstantGate], dynamic: list[DynamicGate]) -> None:
    """Turn a stock ``layer`` into its plugged class, in place."""
    layer.__class__ = plugged_class(type(layer))
    layer.register_module(GATE, nn.ModuleList(gates) if gates else None)
    layer.register_module(DYNAMIC, nn.ModuleList(dynamic) if dynamic else None)
    for slot in (layer.gate, layer.dynamic):
        if slot is not None:
            slot.train(layer.training)


def detach(layer: Any) -> None:
    """Turn a plugged ``layer`` back into its stock class, in place; its gates are dropped."""
    del layer.gate, layer.dynamic
    layer.__dict__.pop('shelf', None)
    layer.__class__ = layer.stock


def rebind(model: nn.Module) -> list[str]:
    """Plug layers again that a converter has rebuilt, and return their paths.

    ``SyncBatchNorm.convert_sync_batchnorm`` builds a new stock layer and moves the children of the old one to it: the
    gates are still registered, but the stock forward does not use them. Call this after such a conversion.
    """
    check_module(model, 'rebind')
    paths = orphans(model)
    for path in paths:
        layer = model.get_submodule(path)
        if plugged_class(type(layer)) is None:
            raise PlugError(f'{path}: was converted to {type(layer).__name__}, which cannot be plugged')
        attach(layer, *(list(layer._modules.pop(slot, None) or ()) for slot in SLOTS))  # type: ignore[arg-type]
    for module in model.modules():
        if bank.BANK in vars(module):
            bank.install(module)
    return paths


def orphans(model: nn.Module) -> list[str]:
    """Paths of stock layers with gates that their forward does not use, see `rebind`."""
    return [
        path
        for path, layer in model.named_modules()
        if not isinstance(layer, Plugged)
        and any(
            isinstance(child, nn.ModuleList) and len(child) > 0 and isinstance(child[0], Gate)
            for child in layer.children()
        )
    ]
