"""One attention shared along the sites of a stage (DIA), and the state that a recurrent one carries from site to site.

The unit is registered once, at the root of the plugged model; each site holds a `Member`, which refers to it without
registering it again. The state at a site is a function of the state at the site before, in the same forward:

* In a forward, a site takes the state that the site before has just left in the unit (one slot a thread). The state
  starts from zero at the first site of a stage and wherever the positions do not increase, so that a forward that was
  abandoned leaves nothing behind; the last site empties the slot.
* Activation checkpointing computes a block again during the backward pass, when the slot is empty or belongs to
  another forward. The autograd graph then tells which forward it is: the map at a site depends on the gates of the site
  before, whose node carries their state. Non-reentrant checkpointing keeps that graph. Reentrant checkpointing cuts it
  wherever it would lose the gradient of the state, and is refused there.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import is_norm, pool
from asr_downstream.errors import AsrError

if TYPE_CHECKING:
    from typing_extensions import Self

    from asr_downstream.gates import Gate

__all__ = ['Member', 'SharedAttentions', 'SharedUnit', 'drop_norms', 'register', 'unregister']

TAG = 'asr_downstream.state'


class Left(NamedTuple):
    """State that a site has left.

    Attributes:
        unit: the shared unit.
        position: of the site in its run.
        state: what the attention's ``step`` returned.
    """

    unit: SharedUnit
    position: int
    state: Any


class Slots:
    """The last state of each thread; copies and pickles are empty, since a state belongs to a forward."""

    def __init__(self) -> None:
        self.by_thread: dict[int, Left] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        return Slots()

    def __reduce__(self) -> tuple[type[Slots], tuple[()]]:
        return Slots, ()


class SharedUnit(nn.Module):
    """An attention that several sites share.

    Args:
        attention: the module; normalisation in it is given to the sites, one each.
        name: of the stage, for people.

    Attributes:
        gates: the gates that share it, in the order of their positions; not registered as children.
        watchers: called with each member and the state that it leaves (`asr_downstream.record`).
    """

    def __init__(self, attention: nn.Module, name: str) -> None:
        super().__init__()
        self.attention = attention
        self.name = name
        self.recurrent = bool(getattr(attention, 'recurrent', False))
        self.gates: list[Gate] = []
        self.slots = Slots()
        self.watchers: list[Callable[[Member, Any], None]] = []

    def apply(self, fn: Any) -> Self:
        """Leave the unit out of ``model.apply(init)``, as gates are."""
        return self

    def state_before(self, position: int, anchor: Tensor) -> Any:
        """State that the site before left in this forward; None is the zero state.

        Args:
            position: of the asking site in its run.
            anchor: input of the asking site, which leads to the forward that is being computed again.

        Raises:
            AsrError: that forward cannot be told.
        """
        if position == 0:
            return None
        if recomputing():
            return find_left(self, position, anchor)
        left = self.slots.by_thread.get(thread())
        return None if left is None or left.position >= position else left.state

    def leave(self, member: Member, gates: Tensor, state: Any) -> Tensor:
        """Keep ``state`` for the site after ``member``; returns the gates."""
        for watch in self.watchers:
            watch(member, state)
        left = Left(self, member.position, state)
        if not torch.compiler.is_compiling() and gates.grad_fn is not None:
            # Of a view, since the state may hold the gates: a node that owned itself would never be freed.
            gates = gates.view_as(gates)
            cast(Any, gates.grad_fn).metadata[TAG] = left
        if recomputing():
            return gates
        if member.position == member.length - 1:
            self.slots.by_thread.pop(thread(), None)
        else:
            self.slots.by_thread[thread()] = left
        return gates


def thread() -> int:
    """Key of the running thread; a compiled forward reads back only what it has written itself."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def recomputing() -> bool:
    """Whether a forward is being computed again by activation checkpointing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def find_left(unit: SharedUnit, position: int, anchor: Tensor) -> Any:
    """Walk the autograd graph from ``anchor`` to the gates of the nearest site before ``position``."""
    best: Left | None = None
    queue: deque[Any] = deque([anchor.grad_fn])
    seen: set[Any] = set()
    while queue:
        node = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        left = node.metadata.get(TAG)
        if left is not None and left.unit is unit and left.position < position:
            if left.position == position - 1:
                return left.state
            if best is None or left.position > best.position:
                best = left
            continue
        queue.extend(next_node for next_node, _ in node.next_functions)
    if best is not None:
        return best.state
    raise AsrError(
        f'{unit.name}: a block was computed again in the backward pass, and its input is cut off from the shared '
        f'state: reentrant activation checkpointing would give wrong gradients here. Use use_reentrant=False '
        f'(diffusers: enable_gradient_checkpointing() as it is; mmdet: with_cp=True in a backbone of '
        f'asr_downstream); if no parameter before this block is trained, switch checkpointing off'
    )


class Member(nn.Module):
    """A shared attention, seen from one of its sites.

    Args:
        unit: what is shared.
        position: of the site in its run of states; 0 starts from the zero state.
        length: sites of that run.
    """

    def __init__(self, unit: SharedUnit, position: int, length: int) -> None:
        super().__init__()
        self.position = position
        self.length = length
        self.own = nn.ModuleDict()
        view = own_norms(unit.attention, self.own)
        self.shared = (unit, view)  # a tuple: not registered as children

    @property
    def unit(self) -> SharedUnit:
        """The shared unit."""
        return self.shared[0]

    @property
    def attention(self) -> Any:
        """The attention with this site's own normalisation."""
        return self.shared[1]

    @property
    def uses_input(self) -> bool:
        """See `asr_downstream.attention.base.ChannelAttention`."""
        return getattr(self.attention, 'uses_input', True)

    @property
    def of_mean(self) -> bool:
        """See `asr_downstream.attention.base.ChannelAttention`."""
        return getattr(self.attention, 'of_mean', False)

    def forward(self, x: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(B, C, *)`` to gates ``(B, C)`` and, if recurrent, advance the state of this forward.

        Args:
            x: a feature map or a descriptor.
            anchor: a tensor that depends on the sites before, where ``x`` does not.
        """
        if not self.unit.recurrent:
            return self.attention(x)
        state = self.unit.state_before(self.position, x if anchor is None else anchor)
        gates, state = self.step(x, state)
        return self.unit.leave(self, gates, state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step of the recurrence in full precision, also under autocast: rounding would add up along the sites."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.attention.step(pool(x), state)
        return self.attention.step(pool(x), state)

    def alone(self, inputs: list[Tensor]) -> Tensor:
        """Return the gates here if the sites of the run up to this one had ``inputs``; no forward is touched."""
        if not self.unit.recurrent:
            return self.attention(inputs[-1])
        gates, state = inputs[-1], None
        for x in inputs:
            gates, state = self.step(x, state)
        return gates


def own_norms(attention: nn.Module, own: nn.ModuleDict, prefix: str = '') -> nn.Module:
    """Return ``attention`` as a site sees it: everything shared but the normalisation, of which ``own`` gets copies.

    The result shares even the dicts of its parameters with ``attention``, so that whatever is done to those (moved,
    swapped by ``functional_call``) is seen here.
    """
    if not any(is_norm(m) for m in attention.modules()):
        return attention
    view = copy.copy(attention)
    children: dict[str, nn.Module | None] = {}
    for name, child in attention._modules.items():
        if child is None:
            children[name] = None
        elif is_norm(child):
            key = f'{prefix}{name}'.replace('.', '_')
            own[key] = children[name] = copy.deepcopy(child)
        else:
            children[name] = own_norms(child, own, f'{prefix}{name}.')
    view.__dict__['_modules'] = children
    return view


def drop_norms(attention: nn.Module) -> None:
    """Take out of a shared attention the normalisation that its sites have copied."""
    for module in list(attention.modules()):
        for name, child in list(module.named_children()):
            if is_norm(child):
                del module._modules[name]


class SharedAttentions(nn.ModuleDict):
    """The shared units of a model, registered at its root. In an ``nn.Sequential`` it passes its input on."""

    def forward(self, x: Any) -> Any:
        """Return ``x``."""
        return x


def release(model: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of a plugged root: drop the states that an exception has left, and the graph that they hold."""
    for unit in model.shared_attention.values():  # type: ignore[operator]
        unit.slots.by_thread.pop(thread(), None)


def register(model: nn.Module, units: list[SharedUnit]) -> None:
    """Register shared units at the root of a model."""
    if not units:
        return
    if not isinstance(getattr(model, 'shared_attention', None), SharedAttentions):
        model.shared_attention = SharedAttentions()
        model.register_forward_hook(release, always_call=True)
    home = cast(SharedAttentions, model.shared_attention)
    for unit in units:
        key = name = unit.name.replace('.', '_') or 'model'
        number = 1
        while key in home:
            number += 1
            key = f'{name}_{number}'
        home[key] = unit


def unregister(model: nn.Module, used: set[int]) -> None:
    """Remove the units that are not in ``used`` (ids), and with the last one all that `register` has added."""
    for module in list(model.modules()):
        home = module._modules.get('shared_attention')
        if not isinstance(home, SharedAttentions):
            continue
        for key, unit in list(home.items()):
            if id(unit) not in used:
                del home[key]
        if not len(home):
            del module._modules['shared_attention']
            for number in [n for n, hook in module._forward_hooks.items() if hook is release]:
                del module._forward_hooks[number]
                module._forward_hooks_always_called.pop(number, None)
