"""Attention blocks of a model: finding them, measuring their gates, and putting constants in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from asr_downstream.errors import FoldError
from asr_downstream.folding.constancy import Constancy, Moments
from asr_downstream.folding.passes import Step, passes
from asr_downstream.modules.copies import copy_of
from asr_downstream.modules.native import Native, native_of

__all__ = ['Constant', 'Watched', 'find_blocks', 'measure_blocks', 'put', 'registered_once', 'with_constants']


class Constant(nn.Module):
    """Stands in the place of a block: multiplies its input by constant gates ``(C,)``."""

    gates: Tensor

    def __init__(self, gates: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer('gates', gates)

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` along the axis of its channels."""
        return x * along(self.gates.to(x), x, self.axis)


def along(gates: Tensor, x: Tensor, axis: int) -> Tensor:
    """View gates ``(B, C)`` or ``(C,)`` so that they multiply ``x`` along ``axis``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    if gates.dim() == 2:
        shape[0] = gates.shape[0]
    return gates.view(shape)


def find_blocks(model: nn.Module) -> dict[str, Native]:
    """Attention blocks that are known, by path, in the order of ``model.named_modules()``; none inside of another."""
    found: dict[str, Native] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f'{outer}.') for outer in found)
        if path and not inside and (native := native_of(module)) is not None:
            found[path] = native
    return found


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at ``path``, in place."""
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module.eval())


def with_constants(model: nn.Module, sites: Iterable[Constancy]) -> nn.Module:
    """Copy ``model`` with the mean gates in the place of blocks."""
    found: nn.Module = copy_of(model, FoldError)
    for site in sites:
        native = native_of(found.get_submodule(site.path))
        assert native is not None
        put(found, site.path, Constant(site.mean, native.axis))
    return found


def registered_once(model: nn.Module) -> set[int]:
    """Ids of the modules that have one path only."""
    count = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {key for key, number in count.items() if number == 1}


class Watched:
    """Gates of one block, as its forward computes them.

    Args:
        block: the block.
        native: what its gates are.
        take: is given the gates ``(B, C)`` of every forward; default: they are added to ``moments``.

    Attributes:
        moments: of the gates so far.
        odd: why the block is not what its entry says; '' if it is.
    """

    def __init__(self, block: nn.Module, native: Native, take: Callable[[Tensor], None] | None = None) -> None:
        self.axis = native.axis
        self.moments = Moments()
        self.take = take or self.moments.add
        self.odd = ''
        self.gates: list[Tensor] = []
        self.handles: list[RemovableHandle] = []
        try:
            gate = block.get_submodule(native.gate)
        except AttributeError:
            self.odd = f'has no {native.gate!r}, which should compute its gates'
            return
        self.handles = [
            gate.register_forward_hook(lambda module, args, output: self.gates.append(output)),
            block.register_forward_hook(lambda module, args, output: self.add(args, output)),
        ]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()

    def add(self, args: Any, output: Any) -> None:
        """Take the gates of one forward, if the output is the input times them."""
        gates, self.gates = self.gates, []
        if self.odd:
            return
        x = args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None
        if x is None or not isinstance(output, Tensor) or len(gates) != 1:
            self.odd = 'does not take one tensor, compute gates of it once, and return one tensor'
            return
        g = gates[0].flatten(1)
        fits = g.shape == (x.shape[0], x.shape[self.axis]) and output.shape == x.shape
        tolerance = 10 * torch.finfo(output.dtype).eps
        if not fits or not torch.allclose(output, x * along(g, x, self.axis), rtol=tolerance, atol=0, equal_nan=True):
            self.odd = 'does not return its input times the gates of each image and channel'
            return
        self.take(g)


@torch.no_grad()
def measure_blocks(
    model: nn.Module, blocks: Mapping[str, Native], data: Iterable[Any], step: Step
) -> tuple[list[Constancy], dict[str, str]]:
    """Run a copy of ``model`` over ``data``.

    Returns:
        The constancy of the gates of every block, least constant last; and blocks that have none, with the reason.

    Raises:
        FoldError: no data, data that the model does not take, or gates that are not finite.
    """
    model = copy_of(model, FoldError)
    watched = {path: Watched(model.get_submodule(path), native) for path, native in blocks.items()}
    for _ in passes(model, data, step, 'calibrating', FoldError, 'calibrate: '):
        pass
    reasons = {path: seen.odd for path, seen in watched.items() if seen.odd}
    found = []
    for path, seen in watched.items():
        if path not in reasons and not seen.moments.count:
            reasons[path] = 'was not reached by the calibration data'
        elif path not in reasons:
            found.append(seen.moments.constancy(path, path))
    return sorted(found, key=lambda site: site.ratio), reasons
