"""`verify`: how far two models differ on the same inputs, output by output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed, some
from asr_downstream.errors import AsrError, FoldError
from asr_downstream.modules.check import check_module
from asr_downstream.modules.copies import copy_of
from asr_downstream.modules.leaves import leaves

__all__ = [
    'TOLERANCE',
    'Difference',
    'Verification',
    'beyond_rounding',
    'check_inputs',
    'check_same',
    'compare',
    'verify',
]

# Relative to the largest output. Folding rounds each weight once; a hundred layers, or a sampler, add roundings up.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
COARSE = 1e-2  # of any other precision


@dataclass(frozen=True)
class Difference:
    """Difference of one output.

    Attributes:
        output: its place in the value that the model returns, such as ``'[0]'`` or ``'sample'``.
        shape: of that output.
        absolute: largest absolute difference, over all inputs.
        relative: largest of the absolute differences of an input, over the largest magnitude of the second model's
            output for it.
        scale: largest magnitude of the second model's output, over all inputs.
    """

    output: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    scale: float = 0.0


@dataclass(frozen=True, repr=False)
class Verification(Printed):
    """Differences of all outputs, over all inputs; prints as a table.

    Attributes:
        outputs: that were compared: tensors, arrays and numbers.
        skipped: outputs that were not compared, and why: their kind is no number, or a tensor has no elements.
    """

    outputs: tuple[Difference, ...]
    skipped: tuple[str, ...] = ()

    @property
    def absolute(self) -> float:
        """Largest absolute difference of any output."""
        return max(d.absolute for d in self.outputs)

    @property
    def relative(self) -> float:
        """Largest relative difference of any output."""
        return max(d.relative for d in self.outputs)

    def parts(self) -> list[Table | str]:
        table = Table('output', 'shape', 'absolute', 'relative')
        for d in self.outputs:
            table.add_row(d.output, str(d.shape), f'{d.absolute:.2e}', f'{d.relative:.2e}')
        return [table, f'not compared: {some(list(self.skipped))}'] if self.skipped else [table]


@torch.no_grad()
def verify(a: nn.Module, b: nn.Module, inputs: Any) -> Verification:
    """Run both models on ``inputs`` and measure the largest difference, output by output.

    Each model gets a copy of the inputs, and outputs are copied before the other model runs, so models that work in
    place, or return a buffer of their own, are compared like others.

    Args:
        a: first model, such as the plugged one.
        b: second model, such as the folded one; relative differences are relative to its outputs.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of such calls.

    Returns:
        The differences; print them, or read ``.absolute`` and ``.relative``. ``.skipped`` names what was not compared.

    Raises:
        AsrError: training mode, inputs that do not fit, outputs that do not correspond (other names, kinds, shapes or
            texts), or nothing that could be compared.
    """
    for model in (a, b):
        check_module(model, 'verify')
    check_inputs(inputs, 'verify')
    return compare(a, b, inputs if isinstance(inputs, list) else [inputs], run)


def check_inputs(inputs: Any, what: str) -> None:
    """Refuse what cannot be inputs of a model.

    Raises:
        AsrError: there are none, or they are a text.
    """
    if inputs is None or isinstance(inputs, str | bytes) or (isinstance(inputs, list | tuple) and not inputs):
        raise AsrError(
            f'{what}: inputs={inputs!r} should be a tensor, a tuple of arguments, a dict of keyword arguments, or a '
            f'list of such calls'
        )


def compare(a: nn.Module, b: nn.Module, calls: list[Any], call: Callable[[nn.Module, Any], Any]) -> Verification:
    """See `verify`; ``call(model, inputs)`` runs a model."""
    for model in (a, b):
        if model.training:
            raise AsrError(f'{type(model).__name__} is in training mode: call model.eval() first')
    worst: dict[str, Difference] = {}
    skipped: dict[str, None] = {}
    for inputs in calls:
        ours, theirs = (outputs_of(model, inputs, call) for model in (a, b))
        if ours.keys() != theirs.keys():
            raise AsrError(f'the models return different outputs: {sorted(ours.keys() ^ theirs.keys())}')
        for name, x in ours.items():
            y = theirs[name]
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                found = difference(name, x, y)
                if not x.numel() or x.is_meta or y.is_meta:
                    skipped[f'{name} ({"no elements" if not x.numel() else "no values, on the meta device"})'] = None
                else:
                    worst[name] = larger(worst.get(name, found), found)
            elif isinstance(x, str | bytes) and isinstance(y, str | bytes):
                if x != y:
                    raise AsrError(f'output {name!r}: is {shortened(x)} of one model and {shortened(y)} of the other')
            elif type(x) is not type(y):
                raise AsrError(
                    f'output {name!r}: is a {type(x).__name__} of one model, a {type(y).__name__} of the other'
                )
            else:
                skipped[f'{name} ({type(x).__name__})'] = None
    if not worst:
        rest = f'; not compared: {some(list(skipped))}' if skipped else ''
        raise AsrError(f'{type(a).__name__} returns no tensors to compare{rest}')
    return Verification(tuple(worst.values()), tuple(skipped))


def larger(one: Difference, other: Difference) -> Difference:
    """Each number of two differences that is larger: that of one input may be lost beside the size of another."""
    numbers = (max(getattr(one, key), getattr(other, key)) for key in ('absolute', 'relative', 'scale'))
    return Difference(other.output, other.shape, *numbers)


def beyond_rounding(found: Verification, model: nn.Module) -> Difference | None:
    """Output that differs most among those that differ by more than rounding, in the precision of ``model``, or None.

    An output smaller than the rounding of the largest one, such as a sum that cancels, does not count.
    """
    dtype = dtype_of(model)
    tolerance = TOLERANCE.get(dtype, COARSE)
    noise = min(10 * torch.finfo(dtype).eps, tolerance) * max(d.scale for d in found.outputs)
    beyond = [d for d in found.outputs if not d.relative <= tolerance and not max(d.absolute, d.scale) <= noise]
    return max(beyond, key=lambda d: d.relative, default=None)


def check_same(found: Verification, model: nn.Module, what: str) -> None:
    """Refuse to write a folded model that computes something else than the model it was made from.

    Args:
        found: how the two differ.
        model: either of them, as it was compared.
        what: the checkpoint, for the message.

    Raises:
        FoldError: an output differs by more than rounding.
    """
    if (worst := beyond_rounding(found, model)) is not None:
        dtype = dtype_of(model)
        raise FoldError(
            f'{what}: the folded model differs by {worst.relative:.1e} in {str(dtype).removeprefix("torch.")}, more '
            f'than {TOLERANCE.get(dtype, COARSE):g}; nothing was written'
        )


def dtype_of(model: nn.Module) -> torch.dtype:
    """Precision of a model: that of its first parameter of floating point."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def shortened(text: str | bytes) -> str:
    """Repr of the beginning of a text."""
    return repr(text[:40])


def outputs_of(model: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Any]) -> dict[str, Any]:
    """Run a model on a copy of ``inputs`` and copy what it returns: place -> tensor, or another value as it is.

    Raises:
        AsrError: it cannot be run on them.
    """
    given = copy_of(inputs)
    try:
        value = call(model, given)
    except AsrError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise AsrError(f'{type(model).__name__} cannot be run on these inputs ({first})') from error
    return {place: as_tensor(leaf) for place, leaf in leaves(value, 'output')}


def as_tensor(leaf: Any) -> Any:
    """Copy a tensor, an array or a number into a dense tensor of its own; anything else is returned as it is."""
    if isinstance(leaf, Tensor):
        if leaf.is_meta:
            return leaf
        if hasattr(leaf, 'full_tensor'):
            leaf = leaf.full_tensor()
        if leaf.is_nested:
            leaf = leaf.to_padded_tensor(0.0)
        if leaf.is_quantized:
            leaf = leaf.dequantize()
        return (leaf.to_dense() if leaf.layout is not torch.strided else leaf).detach().clone()
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in 'biufc':
        return torch.from_numpy(np.array(leaf))
    if isinstance(leaf, bool | int | float | complex):
        try:
            return torch.tensor(leaf, dtype=torch.complex128 if isinstance(leaf, complex) else None)
        except (RuntimeError, OverflowError):
            return torch.tensor(float(leaf.real), dtype=torch.float64)
    return leaf


def difference(name: str, x: Tensor, y: Tensor) -> Difference:
    """Compare one output: in float64 or complex128, whole numbers exactly."""
    if x.shape != y.shape:
        raise AsrError(f'output {name!r}: shapes {tuple(x.shape)} and {tuple(y.shape)} differ')
    if x.is_complex() != y.is_complex():
        raise AsrError(f'output {name!r}: is complex of one model and real of the other')
    if not x.numel() or x.is_meta or y.is_meta:
        return Difference(name, tuple(x.shape), 0.0, 0.0)
    exact = not (x.is_floating_point() or x.is_complex() or y.is_floating_point())
    y = y.to(x.device)
    same = x == y
    wide = torch.complex128 if x.is_complex() else torch.float64
    x, y = x.to(wide), y.to(wide)
    apart = (x - y).abs()
    if exact:
        apart = apart.clamp_min(1.0)  # float64 does not tell large neighbours apart
    apart = torch.where(same, 0.0, apart).nan_to_num(nan=torch.inf)
    absolute, scale = float(apart.max()), float(y.abs().max())
    if absolute == 0 or not math.isfinite(absolute):
        return Difference(name, tuple(x.shape), absolute, absolute, scale)
    return Difference(name, tuple(x.shape), absolute, absolute / scale if scale else math.inf, scale)


def run(model: nn.Module, call: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(call, Mapping):
        return model(**call)
    return model(*call) if isinstance(call, tuple) else model(call)


def tensors(value: Any, name: str = 'output') -> Iterator[tuple[str, Tensor]]:
    """Walk nested tuples, lists, mappings and objects, and yield every tensor with its place."""
    yield from ((place, leaf) for place, leaf in leaves(value, name) if isinstance(leaf, Tensor))
