"""Stacks of parameters that the backward pass does not keep but makes again.

A stack is a copy of parameters, which are there anyway. Small ones are kept, as making one again is an operator more a
group; of an SE on 2,048 channels it would be as much as a tenth of what the layers of its stage keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ['regained']

KEPT = 2**14  # elements of a stack that may be kept


class Piece(NamedTuple):
    """A view of a stack."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class Stack:
    """What it takes to make a stack again.

    Args:
        parameters: that were concatenated, in this order.
        address: of the stack's storage.
    """

    def __init__(self, parameters: Sequence[Tensor], address: int) -> None:
        self.parameters = parameters
        self.versions = [p._version for p in parameters]
        self.address = address
        self.packed = self.unpacked = 0
        self.flat: Tensor | None = None

    def pack(self, t: Tensor) -> Tensor | Piece:
        """Take the place of a view of the stack."""
        if t.untyped_storage().data_ptr() != self.address:
            return t
        self.packed += 1
        return Piece(t.size(), t.stride(), t.storage_offset())

    def unpack(self, kept: Tensor | Piece) -> Tensor:
        """Make the view again; the stack goes when all views of a backward pass have been made.

        Raises:
            RuntimeError: a parameter was changed in place, as autograd says of tensors that it keeps.
        """
        if isinstance(kept, Tensor):
            return kept
        if [p._version for p in self.parameters] != self.versions:
            raise RuntimeError(
                'one of the variables needed for gradient computation has been modified by an inplace operation: '
                'parameters of a gate, between the forward and the backward pass'
            )
        if self.flat is None:
            with torch.no_grad():
                self.flat = torch.cat([p.reshape(-1) for p in self.parameters])
        view = self.flat.as_strided(kept.size, kept.stride, kept.offset)
        self.unpacked += 1
        if self.unpacked % self.packed == 0:
            self.flat = None
        return view


@contextlib.contextmanager
def regained(parameters: Sequence[Sequence[Tensor]], stacks: Sequence[Tensor]) -> Iterator[None]:
    """In this context autograd keeps no stack that is large.

    Args:
        parameters: of each site.
        stacks: of them, views of one storage.
    """
    if not torch.is_grad_enabled() or sum(t.numel() for t in stacks) <= KEPT:
        yield
        return
    in_order = [p for same in zip(*parameters, strict=True) for p in same]
    stack = Stack(in_order, stacks[0].untyped_storage().data_ptr())
    hooks: Any = torch.autograd.graph.saved_tensors_hooks(stack.pack, stack.unpack)
    with hooks:
        yield
