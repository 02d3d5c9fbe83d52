"""`verify`: how far two models differ on the same inputs, output by output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.description import render
from asr_downstream.errors import AsrError

__all__ = ['Difference', 'Verification', 'verify']


@dataclass(frozen=True)
class Difference:
    """Difference of one output.

    Attributes:
        output: where it stands in what the model returns, such as ``'[0]'`` or ``'sample'``.
        shape: of that output.
        absolute: largest absolute difference.
        relative: the same, over the largest magnitude of the second model's output.
    """

    output: str
    shape: tuple[int, ...]
    absolute: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """Differences of all outputs, over all inputs; prints as a table."""

    outputs: tuple[Difference, ...]

    @property
    def absolute(self) -> float:
        """Largest absolute difference of any output."""
        return max(d.absolute for d in self.outputs)

    @property
    def relative(self) -> float:
        """Largest relative difference of any output."""
        return max(d.relative for d in self.outputs)

    def __str__(self) -> str:
        table = Table('output', 'shape', 'absolute', 'relative')
        for d in self.outputs:
            table.add_row(d.output, str(d.shape), f'{d.absolute:.2e}', f'{d.relative:.2e}')
        return render(table)


@torch.no_grad()
def verify(a: nn.Module, b: nn.Module, inputs: Any) -> Verification:
    """Run both models on ``inputs`` and measure the largest difference, output by output.

    Args:
        a: first model, such as the plugged one.
        b: second model, such as the folded one; relative differences are relative to its outputs.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of such calls.

    Returns:
        The differences; print them, or read ``.absolute`` and ``.relative``.

    Raises:
        AsrError: training mode, or outputs that do not correspond: other names, other shapes, no tensors.
    """
    for model in (a, b):
        if model.training:
            raise AsrError(f'{type(model).__name__} is in training mode: call model.eval() first')
    worst: dict[str, Difference] = {}
    for call in inputs if isinstance(inputs, list) else [inputs]:
        ours, theirs = (dict(tensors(run(model, call))) for model in (a, b))
        if ours.keys() != theirs.keys():
            raise AsrError(f'the models return different outputs: {sorted(ours.keys() ^ theirs.keys())}')
        if not ours:
            raise AsrError(f'{type(a).__name__} returns no tensors to compare')
        for name, x in ours.items():
            found = difference(name, x, theirs[name])
            if name not in worst or found.absolute > worst[name].absolute:
                worst[name] = found
    return Verification(tuple(worst.values()))


def difference(name: str, x: Tensor, y: Tensor) -> Difference:
    """Compare one output, in float64."""
    if x.shape != y.shape:
        raise AsrError(f'output {name!r}: shapes {tuple(x.shape)} and {tuple(y.shape)} differ')
    if not x.numel():
        return Difference(name, tuple(x.shape), 0.0, 0.0)
    x, y = x.double(), y.double()
    apart = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf)
    absolute, scale = float(apart.max()), float(y.abs().max())
    if absolute == 0 or not math.isfinite(absolute):
        return Difference(name, tuple(x.shape), absolute, absolute)
    return Difference(name, tuple(x.shape), absolute, absolute / scale if scale else math.inf)


def run(model: nn.Module, call: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(call, Mapping):
        return model(**call)
    return model(*call) if isinstance(call, tuple) else model(call)


def tensors(value: Any, name: str = 'output') -> Iterator[tuple[str, Tensor]]:
    """Walk nested tuples, lists, mappings and objects, and yield every tensor with its place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f'{name}.{key}')
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from tensors(item, f'{name}[{index}]')
    elif hasattr(value, '__dict__'):
        for key, item in vars(value).items():
            yield from tensors(item, f'{name}.{key}')
