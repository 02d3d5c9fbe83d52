"""The state that a recurrent shared attention carries from site to site.

One rule says which state a site continues from: that of the site of its unit which ran last in the same forward, if it
stands before this one in the same run; otherwise it starts from zero.

* In a forward, the last state lies in the unit's slot, one a thread. The last site of a run empties it, and so does an
  exception. A state may remain there when a part of the model runs alone; the first site of a run does not read it.
* Activation checkpointing computes a block again during the backward pass, when the slot is empty or belongs to another
  forward. The autograd graph then tells what ran before: the map at a site depends on the gates of the sites before,
  whose nodes carry their states. Non-reentrant checkpointing keeps that graph. Reentrant checkpointing cuts it wherever
  the gradient of the state would be lost, and is refused there.

Not supported: two inputs that go through the model at the same time in one thread, site by site in turn.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from asr_downstream.errors import AsrError

__all__ = ['Left', 'Place', 'Slot', 'before', 'last', 'leave']

TAG = 'asr_downstream: state of a shared unit'
ORDER = itertools.count()


class Place(NamedTuple):
    """Where a site stands: the slot of its unit, the number of its run, its position in it, and the run's length."""

    slot: Slot
    run: int
    position: int
    length: int


class Left(NamedTuple):
    """The state after a site has run.

    Attributes:
        place: of the site.
        state: what the attention's ``step`` returned.
        graph: whether gradients were recorded.
        order: larger is later.
    """

    place: Place
    state: Any
    graph: bool
    order: int


class Slot:
    """The last state of a unit in each thread, and functions that are called with each new one.

    Copies and pickles are empty: a state belongs to a forward.

    Args:
        name: of the unit, for messages.
    """

    def __init__(self, name: str = '') -> None:
        self.name = name
        self.local = threading.local()  # no base class: torch.compile loses what it writes into a subclass of it
        self.watchers: tuple[Callable[[Place, Any], None], ...] = ()

    @property
    def left(self) -> Left | None:
        """The last state of this thread."""
        return getattr(self.local, 'left', None)

    @left.setter
    def left(self, left: Left | None) -> None:
        self.local.left = left

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot(self.name)

    def __reduce__(self) -> tuple[type[Slot], tuple[str]]:
        return Slot, (self.name,)


def before(place: Place, anchor: Tensor, weights: Iterable[nn.Parameter]) -> Any:
    """State that the site at ``place`` continues from; None is the zero state.

    Args:
        place: of the site.
        anchor: its input, which leads to the forward that is being computed again.
        weights: of the unit; if one is trained, the gradient of the state must not be cut.

    Raises:
        AsrError: the gradient of the state would be lost.
    """
    if place.position == 0:
        return None
    left = last(place, anchor)
    if left is None and recomputing():
        cut_off(place)
    state = continued(left, place)
    if state is not None and left is not None and not left.graph and torch.is_grad_enabled():
        check_cut(place, weights)
    return state


def last(place: Place, anchor: Tensor) -> Left | None:
    """The last state of the unit in this forward, as far as it can be told."""
    if recomputing():
        return find(place, anchor)
    return place.slot.left


def continued(left: Left | None, place: Place) -> Any:
    """The state of ``left``, if it stands before ``place`` in the same run."""
    if left is None or left.place.run != place.run or left.place.position >= place.position:
        return None
    return left.state


def leave(place: Place, gates: Tensor, state: Any) -> Tensor:
    """Keep ``state`` for the next site; returns the gates."""
    slot = place.slot
    for watch in slot.watchers:
        watch(place, state)
    graph = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        slot.left = None if place.position == place.length - 1 else Left(place, state, graph, 0)
        return gates
    left = Left(place, state, graph, next(ORDER))
    if gates.grad_fn is not None:
        # Of a view, since the state may hold the gates: a node that owned itself would never be freed.
        gates = gates.view_as(gates)
        cast(Any, gates.grad_fn).metadata[TAG] = left
    if not recomputing():
        slot.left = None if place.position == place.length - 1 else left
    return gates


def recomputing() -> bool:
    """Whether a forward is being computed again by activation checkpointing."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def check_cut(place: Place, weights: Iterable[nn.Parameter]) -> None:
    """Refuse to continue, with gradients, from a state that was computed without."""
    if any(p.requires_grad for p in weights):
        raise AsrError(
            f'{place.slot.name}: the site before ran without gradients and this one runs with them, so the gradient of '
            f'the shared state would be lost without a word. Reentrant activation checkpointing does this: use '
            f'use_reentrant=False. If part of the model runs under torch.no_grad() on purpose, leave its sites out '
            f'(skip=[...]) or give it a unit of its own (share=[...])'
        )


def find(place: Place, anchor: Tensor) -> Left | None:
    """Walk the autograd graph back from ``anchor`` to the last state of the unit of ``place``; None if none is met.

    Nodes that carry a state are visited in the reverse order of their forwards, the others as they come.

    A store of states by site could not say which of them belongs to the block that is computed again. Several forwards
    can be alive at once (gradients accumulated over batches before one backward, a model called twice in a loss, two
    threads), and the store would hold, of each site, the state of the last of them; kept by forward instead, it would
    not know which forward a backward belongs to, nor when a state may go. The input of the block knows: it was computed
    from the gates of the sites before, in the same forward, and its graph goes away with that forward.
    """
    seen: set[Any] = set()
    untagged: list[Any] = [anchor.grad_fn]
    tagged: list[tuple[int, Left, Any]] = []
    while untagged or tagged:
        while untagged:
            node = untagged.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left = node.metadata.get(TAG)
            if left is None:
                untagged.extend(parent for parent, _ in node.next_functions)
            else:
                heapq.heappush(tagged, (-left.order, left, node))
        if tagged:
            _, left, node = heapq.heappop(tagged)
            if left.place.slot is place.slot:
                return left
            untagged.extend(parent for parent, _ in node.next_functions)
    return None


def cut_off(place: Place) -> None:
    """Say that a block that is computed again has lost its forward."""
    raise AsrError(
        f'{place.slot.name}: a block was computed again in the backward pass, and its input does not lead to the state '
        f'of the blocks before it. Reentrant activation checkpointing cuts it off and would give wrong gradients: use '
        f'use_reentrant=False (diffusers: enable_gradient_checkpointing() as it is; mmdet: with_cp=True in a backbone '
        f'of asr_downstream). Where nothing before this block is trained, there is no trace either: switch '
        f'checkpointing off for it'
    )
