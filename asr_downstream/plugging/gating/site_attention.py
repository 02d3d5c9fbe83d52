"""The attention of one site: its own, or one that sites share (DIA). Gates use both through `SiteAttention`.

A shared attention is registered once, at the root of the plugged model
(`asr_downstream.plugging.gating.shared_unit`); each of its sites holds a `Member`, which refers to it without
registering it again. A recurrent one hands a state from site to site (`asr_downstream.plugging.gating.recurrence`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import pool
from asr_downstream.plugging.gating import recurrence
from asr_downstream.plugging.gating.recurrence import Place
from asr_downstream.plugging.gating.shared_unit import SharedUnit

__all__ = ['LearnedInput', 'Member', 'OwnAttention', 'Run', 'SiteAttention', 'site_attention']


class LearnedInput(nn.Module):
    """A module with a learned input psi ``(1, C)``.

    What needs psi keeps this module and calls `input` each time: ``functional_call`` and
    ``load_state_dict(assign=True)`` put other tensors in the place of parameters.
    """

    def input(self) -> Tensor:
        """Return psi."""
        raise NotImplementedError


class SiteAttention:
    """What gates need of an attention.

    Attributes:
        original: the attention as it was built; of a shared one without its norms, of which each site has its own.
        unit: the shared one; None for an attention of the site's own.
        place: where the site stands in its run, if a state runs along the sites; otherwise None.
    """

    original: nn.Module
    unit: SharedUnit | None = None
    place: Place | None = None

    @property
    def recurrent(self) -> bool:
        """Whether a state runs along the sites."""
        return self.place is not None

    def learned(self, psi: Tensor, anchor: Tensor | None) -> Tensor:
        """Return the gates ``(1, C)`` of a learned input.

        Args:
            psi: learned input ``(1, C)``.
            anchor: in a forward, the input of the layer. A recurrent attention then continues from the site before;
                without it, it starts at the first site of the run.
        """
        raise NotImplementedError

    def fresh(self, x: Tensor) -> Tensor:
        """Return the gates if this site and all before it in the run had the input ``x``; no forward is touched."""
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        """All modules that the gates here are computed with, from the first site of the run on."""
        raise NotImplementedError


class OwnAttention(SiteAttention):
    """An attention of the site's own, which the gate has registered.

    Args:
        attention: the module.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.original = attention

    def learned(self, psi: Tensor, anchor: Tensor | None) -> Tensor:
        return self.original(psi)

    def fresh(self, x: Tensor) -> Tensor:
        return self.original(x)

    def parts(self) -> list[nn.Module]:
        return [self.original]


class Run:
    """Sites along which a state runs, in order.

    Attributes:
        number: of the run in its unit.
        members: of the sites.
        inputs: learned inputs of the sites; none if the attention sees feature maps.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.members: list[Member] = []
        self.inputs: list[LearnedInput] = []


class Member(SiteAttention, nn.Module):
    """A shared attention, seen from one of its sites, with normalisation of the site's own.

    Args:
        unit: what is shared.
        run: of the site, which is its last one so far; position 0 starts from the zero state.
    """

    def __init__(self, unit: SharedUnit, run: Run) -> None:
        super().__init__()
        self.run = run
        self.position = len(run.members)
        run.members.append(self)
        self.own = nn.ModuleDict({path.replace('.', '_'): copy.deepcopy(m) for path, m in unit.norms.items()})
        self.shared = (unit,)  # a tuple: not registered
        self.view = self.look()

    @property
    def unit(self) -> SharedUnit:  # type: ignore[override]
        """The shared unit."""
        return self.shared[0]

    @property
    def original(self) -> nn.Module:  # type: ignore[override]
        """See `SiteAttention`."""
        return self.unit.attention

    @property
    def place(self) -> Place | None:  # type: ignore[override]
        """See `SiteAttention`."""
        if not self.unit.recurrent:
            return None
        return Place(self.unit.slot, self.run.number, self.position, len(self.run.members))

    @property
    def attention(self) -> Any:
        """The shared attention; with normalisation, a view of it that has this site's own."""
        norms = tuple(self.own.values())
        # a converter, as that of SyncBN, has put other norms in their place; or the model changed its mode
        others = any(now is not then for now, then in zip(norms, self.view[0], strict=True))
        if others or self.view[1].training is not self.unit.attention.training:
            self.view = self.look()
        return self.view[1]

    def look(self) -> tuple[tuple[nn.Module, ...], nn.Module]:
        """Build the view; in a tuple, which is not registered."""
        norms = tuple(self.own.values())
        view = self.unit.attention
        for path, norm in zip(self.unit.norms, norms, strict=True):
            view = with_child(view, path.split('.'), norm)
        return norms, view

    @property
    def uses_input(self) -> bool:
        """See `asr_downstream.attention.base.ChannelAttention`."""
        return getattr(self.original, 'uses_input', True)

    def forward(self, x: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Map ``x`` to gates ``(B, C)`` and, if recurrent, advance the state of this forward.

        Args:
            x: a feature map ``(B, C, *)``, a descriptor, or a learned input ``(1, C)``.
            anchor: for learned inputs, a tensor that depends on the sites before.

        Raises:
            AsrError: see `asr_downstream.plugging.gating.recurrence.before`.
        """
        place = self.place
        if place is None:
            return self.attention(x)
        if anchor is None:
            gates, state = self.step(x, recurrence.before(place, x, self.unit.parameters()))
        else:
            gates, state = self.step_learned(x, place, anchor)
        return recurrence.leave(place, gates, state)

    def step_learned(self, psi: Tensor, place: Place, anchor: Tensor) -> tuple[Tensor, Any]:
        """One step on a learned input.

        The gates depend on no forward, only on the learned inputs of the run. So where the last site that ran is not
        the one before this one, or ran without gradients that are wanted now, its state is computed again.
        """
        left = recurrence.last(place, anchor)
        just_before = left is not None and left.place.run == place.run and left.place.position == place.position - 1
        if just_before and left is not None and (left.graph or not torch.is_grad_enabled()):
            return self.step(psi, left.state)
        return self.chain([*self.inputs_before(), psi])

    def inputs_before(self) -> list[Tensor]:
        """Learned inputs of the sites before in the run."""
        return [learned.input() for learned in self.run.inputs[: self.position]]

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step of the recurrence in full precision, also under autocast: rounding would add up along the sites."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.attention.step(pool(x), state)
        return self.attention.step(pool(x), state)

    def chain(self, inputs: list[Tensor]) -> tuple[Tensor, Any]:
        """Steps from the zero state, each with the norms of its site; returns the last gates and state.

        Args:
            inputs: of the sites of the run, up to this one.
        """
        gates, state = self.run.members[0].step(inputs[0], None)
        for member, x in zip(self.run.members[1 : self.position + 1], inputs[1:], strict=True):
            gates, state = member.step(x, state)
        return gates, state

    def learned(self, psi: Tensor, anchor: Tensor | None) -> Tensor:
        if not self.recurrent:
            return self(psi)
        return self.chain([*self.inputs_before(), psi])[0] if anchor is None else self(psi, anchor)

    def fresh(self, x: Tensor) -> Tensor:
        return self.chain([x] * (self.position + 1))[0] if self.recurrent else self.attention(x)

    def parts(self) -> list[nn.Module]:
        stop = self.position + 1
        return [self.unit, *self.run.members[:stop], *self.run.inputs[:stop]] if self.recurrent else [self.unit, self]


def site_attention(attention: nn.Module) -> SiteAttention:
    """Return what a gate has registered as a `SiteAttention`."""
    return attention if isinstance(attention, SiteAttention) else OwnAttention(attention)


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
