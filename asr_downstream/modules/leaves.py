"""Leaves of nested values: the contents of containers, objects and modules, each with its place."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ['CLOSED', 'VALUES', 'leaves', 'slots']

# Code: not opened.
CLOSED = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.GenericAlias,
)
VALUES = (Tensor, np.ndarray, np.generic, str, bytes, bytearray, bool, int, float, complex)


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Walk tuples, lists, sets, mappings, modules and objects with a dict or slots; yield all other values in them.

    Every object is opened once, so values may refer to themselves. None has no leaves. Iterators are used up.

    Args:
        value: anything.
        place: name of the value, which the names of its leaves begin with.
    """
    yield from walk(value, place, {})


def walk(value: Any, place: str, opened: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """See `leaves`; ``opened`` are the objects met so far, by id; they are kept, or another could get the same id."""
    if value is None:
        return
    if isinstance(value, (*VALUES, *CLOSED)):
        yield place, value
        return
    if id(value) in opened:
        return
    opened[id(value)] = value
    parts = list(children(value))
    if not parts and not isinstance(value, Iterable) and not has_attributes(value):
        yield place, value
    for name, part in parts:
        yield from walk(part, f'{place}{name}', opened)


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Items or attributes of a value, each with its place in it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f'.{key}', item
    elif isinstance(value, AbstractSet):
        for index, item in enumerate(sorted(value, key=repr)):
            yield f'[{index}]', item
    elif isinstance(value, Iterable) and not isinstance(value, nn.Module):
        for index, item in enumerate(value):
            yield f'[{index}]', item
    else:
        for key, item in getattr(value, '__dict__', {}).items():
            yield f'.{key}', item
        for key in slots(value):
            if hasattr(value, key):
                yield f'.{key}', getattr(value, key)


def slots(value: Any) -> list[str]:
    """Names of the slots of an object, of all its classes."""
    found: dict[str, None] = {}
    for cls in type(value).__mro__:
        own = cls.__dict__.get('__slots__', ())
        names = (own,) if isinstance(own, str) else tuple(own)
        for name in names:
            if name not in ('__dict__', '__weakref__'):
                private = name.startswith('__') and not name.endswith('__')
                found[f'_{cls.__name__.lstrip("_")}{name}' if private else name] = None
    return list(found)


def has_attributes(value: Any) -> bool:
    """Whether an object can hold attributes, though it may have none."""
    return hasattr(value, '__dict__') or bool(slots(value))
