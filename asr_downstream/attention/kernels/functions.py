"""When an autograd function of this package may run."""

from __future__ import annotations

import torch

__all__ = ['eager', 'ordinary']


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
