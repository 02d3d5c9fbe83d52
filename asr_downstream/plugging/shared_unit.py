"""One attention shared along the sites of a stage (DIA), seen from each of them.

The unit is registered once, at the root of the plugged model; each site holds a `Member`, which refers to it without
registering it again. A recurrent unit hands a state from site to site; see `asr_downstream.plugging.recurrence`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import gates_of_mean, is_norm, pool
from asr_downstream.errors import PlugError
from asr_downstream.modules.slots import SHARED, SharedAttentions
from asr_downstream.plugging import recurrence as states
from asr_downstream.plugging.recurrence import Place

if TYPE_CHECKING:
    from typing_extensions import Self

    from asr_downstream.plugging.gates import Gate

__all__ = ['Member', 'SharedUnit', 'check_free', 'register', 'unregister']


class SharedUnit(nn.Module):
    """An attention that several sites share.

    Args:
        attention: the module; normalisation in it is taken out and given to the sites, one each.
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
        self.slot = states.Slot()

    def apply(self, fn: Any) -> Self:
        """Leave the unit out of ``model.apply(init)``, as gates are."""
        return self


class Member(nn.Module):
    """A shared attention, seen from one of its sites.

    Args:
        unit: what is shared.
        run: the gates along which a state runs, in order, and the number of the run in the unit. Its members share the
            list; that of each is added after the member is made.
        position: of the site in its run; 0 starts from the zero state.
        length: sites of the run.
    """

    def __init__(self, unit: SharedUnit, run: tuple[int, list[Gate]], position: int, length: int) -> None:
        super().__init__()
        number, self.run = run  # a list: not registered
        self.position = position
        self.standing = (number, position, length)
        self.own = nn.ModuleDict({path.replace('.', '_'): copy.deepcopy(m) for path, m in unit.norms.items()})
        self.shared = (unit,)  # a tuple: not registered
        self.view = self.look()

    @property
    def unit(self) -> SharedUnit:
        """The shared unit."""
        return self.shared[0]

    @property
    def place(self) -> Place:
        """Where the site stands."""
        return Place(self.unit, *self.standing)

    @property
    def attention(self) -> Any:
        """The shared attention; with normalisation, a view of it that has this site's own."""
        norms = tuple(self.own.values())
        if any(now is not then for now, then in zip(norms, self.view[0], strict=True)):
            self.view = self.look()  # a converter, as that of SyncBN, has put others in their place
        return self.view[1]

    def look(self) -> tuple[tuple[nn.Module, ...], nn.Module]:
        """Build the view; in a tuple, which is not registered."""
        norms = tuple(self.own.values())
        view = self.unit.attention
        for path, norm in zip(self.unit.norms, norms, strict=True):
            view = with_child(view, path.split('.'), norm)
        return norms, view

    @property
    def recurrent(self) -> bool:
        """Whether a state runs along the sites."""
        return self.unit.recurrent

    @property
    def uses_input(self) -> bool:
        """See `asr_downstream.attention.base.ChannelAttention`."""
        return getattr(self.unit.attention, 'uses_input', True)

    @property
    def of_mean(self) -> bool:
        """See `asr_downstream.attention.base.ChannelAttention`."""
        return gates_of_mean(self.unit.attention)

    def forward(self, x: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Map ``x`` to gates ``(B, C)`` and, if recurrent, advance the state of this forward.

        Args:
            x: a feature map ``(B, C, *)``, a descriptor, or a learned input ``(1, C)``.
            anchor: for learned inputs, a tensor that depends on the sites before.

        Raises:
            AsrError: see `asr_downstream.plugging.recurrence.before`.
        """
        if not self.recurrent:
            return self.attention(x)
        place = self.place
        if anchor is None:
            gates, state = self.step(x, states.before(place, x))
        else:
            gates, state = self.learned(x, place, anchor)
        return states.leave(place, gates, state)

    def learned(self, psi: Tensor, place: Place, anchor: Tensor) -> tuple[Tensor, Any]:
        """One step on a learned input.

        What the gates are depends on no forward, only on the learned inputs of the run. So where the site before has
        not just run, with gradients if they are wanted, its state is computed again.
        """
        left = states.last(place, anchor)
        just_before = left is not None and left.place.run == place.run and left.place.position == place.position - 1
        if just_before and left is not None and (left.graph or not torch.is_grad_enabled()):
            return self.step(psi, left.state)
        return self.chain([*self.inputs_before(), psi])

    def inputs_before(self) -> list[Tensor]:
        """Learned inputs of the sites before in the run."""
        gates: list[Any] = self.run[: self.position]
        return [gate.input() for gate in gates]

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step of the recurrence in full precision, also under autocast: rounding would add up along the sites."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.attention.step(pool(x), state)
        return self.attention.step(pool(x), state)

    def alone(self, inputs: list[Tensor]) -> Tensor:
        """Return the gates here if the sites of the run up to this one had ``inputs``; no forward is touched."""
        return self.chain(inputs)[0] if self.recurrent else self.attention(inputs[-1])

    def chain(self, inputs: list[Tensor]) -> tuple[Tensor, Any]:
        """Steps from the zero state; returns the last gates and state."""
        gates, state = self.step(inputs[0], None)
        for x in inputs[1:]:
            gates, state = self.step(x, state)
        return gates, state


def with_child(module: nn.Module, path: list[str], child: nn.Module) -> nn.Module:
    """View of ``module`` with ``child`` at ``path``.

    It shares even the dicts of its parameters with ``module``, so that whatever is done to those (moved, swapped by
    ``functional_call``) is seen here.
    """
    view = copy.copy(module)
    first, *rest = path
    children = dict(module._modules)
    children[first] = with_child(module.get_submodule(first), rest, child) if rest else child
    view.__dict__['_modules'] = children
    return view


def release(model: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of a plugged root: drop the states that an exception has left, and the graph that they hold."""
    for unit in getattr(model, SHARED).values():
        unit.slot.left = None


def check_free(model: nn.Module) -> None:
    """Refuse a model that has something else where the units go.

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
