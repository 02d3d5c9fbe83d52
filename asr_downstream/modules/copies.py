"""Deep copies of models and inputs that a plain `copy.deepcopy` refuses or gets wrong."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from asr_downstream.errors import AsrError
from asr_downstream.modules.leaves import CLOSED, VALUES, slots

__all__ = ['batch_of', 'copy_of']


def copy_of(value: Any, error: type[AsrError] = AsrError) -> Any:
    """Copy a model or nested inputs.

    Tensors that were computed with gradients (priors made from an embedding, weights under ``weight_norm``), which
    torch does not copy, are copied without their graph.

    Raises:
        AsrError: of type ``error``: something in it cannot be copied.
    """
    try:
        try:
            return copy.deepcopy(value)
        except RuntimeError:
            detached = {id(tensor): tensor.detach().clone() for tensor in computed(value)}
            if not detached:
                raise
            return copy.deepcopy(value, detached)
    except AsrError:
        raise
    except Exception as cause:
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:160]
        raise error(
            f'{type(value).__name__}: cannot be copied ({first}); take out what holds it (hooks, open files, locks), '
            f'or load the weights into a fresh model first'
        ) from cause


def batch_of(batch: Any) -> Any:
    """Copy a batch, which a forward may change; one that cannot be copied, as it has a lock, is given as it is."""
    try:
        return copy_of(batch)
    except AsrError:
        return batch


def computed(value: Any) -> Iterator[Tensor]:
    """Find tensors with a graph, and nested ones.

    Objects and Python's own containers are opened without running code of theirs.
    """
    opened: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            if not part.is_leaf or part.is_nested:
                yield part
        elif id(part) not in opened and not isinstance(part, (*VALUES, *CLOSED)):
            opened[id(part)] = part  # kept, so that its id stays its own
            waiting.extend(parts_of(part))


def parts_of(value: Any) -> Iterator[Any]:
    """Items of a container and attributes of an object."""
    if isinstance(value, dict):
        yield from dict.values(value)
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset, deque)
    for kind in kinds:
        if isinstance(value, kind):
            yield from kind.__iter__(value)
    yield from getattr(value, '__dict__', {}).values()
    for name in slots(value):
        if hasattr(value, name):
            yield getattr(value, name)
