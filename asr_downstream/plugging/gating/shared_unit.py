"""Attentions that several sites share (DIA), registered once at the root of the plugged model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from asr_downstream.attention.base import is_norm
from asr_downstream.errors import PlugError
from asr_downstream.modules.slots import SHARED, SharedAttentions
from asr_downstream.plugging.gating.recurrence import Slot

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ['SharedUnit', 'check_free', 'register', 'unregister']


class SharedUnit(nn.Module):
    """An attention that several sites share.

    Args:
        attention: the module; normalisation in it is taken out, and each site gets a copy.
        name: of the stage, for people.
    """

    def __init__(self, attention: nn.Module, name: str) -> None:
        super().__init__()
        if is_norm(attention):
            raise PlugError(f'{name}: {type(attention).__name__} normalises, so every site needs its own')
        self.attention = attention
        self.name = name
        self.recurrent = bool(getattr(attention, 'recurrent', False))
        self.norms = {name: m for name, m in attention.named_modules() if is_norm(m)}  # a dict: not registered
        for path in self.norms:
            parent, _, child = path.rpartition('.')
            del attention.get_submodule(parent)._modules[child]
        self.slot = Slot(name)

    def apply(self, fn: Any) -> Self:
        """Leave the unit out of ``model.apply(init)``, as gates are."""
        return self


def release(model: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of a plugged root: drop states that remain after an exception, and with them their graph."""
    for unit in getattr(model, SHARED).values():
        unit.slot.left = None


def check_free(model: nn.Module) -> None:
    """Refuse a model that has another attribute of the name under which units are registered.

    Raises:
        PlugError: it does.
    """
    if not isinstance(getattr(model, SHARED, None), SharedAttentions | None):
        raise PlugError(f'{type(model).__name__} has an attribute {SHARED!r} of its own; rename it: the units go there')


def register(model: nn.Module, units: list[SharedUnit]) -> None:
    """Register shared units at the root of a model."""
    if not units:
        return
    if getattr(model, SHARED, None) is None:
        setattr(model, SHARED, SharedAttentions())
        model.register_forward_hook(release, always_call=True)
    home: Any = getattr(model, SHARED)
    for unit in units:
        key = name = unit.name.replace('.', '_') or 'model'
        number = 1
        while key in home:
            number += 1
            key = f'{name}_{number}'
        home[key] = unit


def unregister(model: nn.Module, used: set[int]) -> None:
    """Remove the units that are not in ``used`` (ids); the others get the names of a model with only those."""
    for module in list(model.modules()):
        home = getattr(module, SHARED, None)
        if not isinstance(home, SharedAttentions):
            continue
        units: list[Any] = [unit for unit in home.values() if id(unit) in used]
        del module._modules[SHARED]
        for number in [n for n, hook in module._forward_hooks.items() if hook is release]:
            del module._forward_hooks[number]
            module._forward_hooks_always_called.pop(number, None)
        register(module, units)
