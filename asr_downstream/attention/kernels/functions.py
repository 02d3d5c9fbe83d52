"""When an autograd function of this package may run, and its derivatives by torch's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ['derivatives', 'eager', 'ordinary']


def eager() -> bool:
    """Whether operators run as they are called: no compiler, transform, tracing or forward-mode derivatives."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and torch.autograd.forward_ad._current_level < 0
    )


def ordinary() -> bool:
    """Whether autograd records as usual."""
    return torch.is_grad_enabled() and eager()


def derivatives(
    f: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], *dys: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs`` under ``f``, by torch's functions and with graphs of their own; None where unwanted.

    Args:
        f: plain formula.
        inputs: tensors that it takes.
        *dys: gradients of its outputs; None is zero.
    """
    aliases = [t.view_as(t) for t in inputs]  # of each only what goes through f
    wanted = [t for t in aliases if t.requires_grad]
    ys = f(*aliases)
    pairs = [(y, dy) for y, dy in zip(ys if isinstance(ys, tuple) else (ys,), dys, strict=True) if dy is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, materialize_grads=True
        )
    )
    return tuple(next(found) if t.requires_grad else None for t in aliases)
