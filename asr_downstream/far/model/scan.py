"""Scans: in which order the heads of a multi-head LSTM read the tokens of an image, which come row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asr_downstream.errors import PlugError
from asr_downstream.registry import Registry, build

__all__ = ['SCANS', 'Cross', 'Layout', 'Raster', 'build_scan']

SCANS = Registry('scan')
HOW = "scan=dict(type='cross', grid=(rows, columns), before=1), before: class tokens and the like in front"


class Layout(NamedTuple):
    """Where the grid of an image is among its tokens: ``before`` others, then ``rows x columns``, then ``after``."""

    before: int
    rows: int
    columns: int
    after: int


@SCANS.register_module(name='raster')
class Raster:
    """All heads read the tokens as they come: row by row."""

    name = 'raster'

    def check(self, heads: int) -> None:
        """Refuse a number of heads that it cannot do with."""

    def fitted(self, tokens: int) -> Raster:
        """The same over this many tokens, whatever they are, for timing."""
        return self

    def read(self, parts: Sequence[Tensor], size: Sequence[int] | None, before: int) -> Sequence[Tensor]:
        """Put the tokens ``(B, N, *)`` of each head into the order in which it reads them.

        Args:
            parts: of each head.
            size: rows and columns of the image; None: they are not known.
            before: tokens in front of those of the image.
        """
        return parts

    def restore(self, parts: list[Tensor], size: Sequence[int] | None, before: int) -> list[Tensor]:
        """Put what the heads made of the tokens back into the order of the tokens."""
        return parts


@SCANS.register_module(name='cross')
class Cross(Raster):
    """The first half of the heads reads row by row, the second column by column; of an odd number rows get one more.

    Tokens before and after those of the image, such as the class token, keep their places at the ends.

    Args:
        grid: rows and columns, where the attention does not know them; default: a square.
        before: tokens in front of those of the image; default: what is known of the class of the attention.
        after: tokens behind them.
    """

    name = 'cross'

    def __init__(self, grid: Any = None, before: int | None = None, after: int = 0) -> None:
        pair = isinstance(grid, list | tuple) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)
        if grid is not None and not pair:
            raise PlugError(f'scan: grid={grid!r} should be a pair (rows, columns) of whole numbers of at least 1')
        if min(before or 0, after) < 0:
            raise PlugError(f'scan: before={before}, after={after} should be at least 0')
        self.grid, self.before, self.after = grid, before, after

    def check(self, heads: int) -> None:
        """Refuse a single head.

        Raises:
            PlugError: see above.
        """
        if heads < 2:
            raise PlugError("FAR: scan='cross' needs 2 heads, one for rows and one for columns, and there is 1")

    def fitted(self, tokens: int) -> Raster:
        """The same over a grid of this many tokens, as near to a square as it can be."""
        rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
        return Cross((rows, tokens // rows), 0)

    def read(self, parts: Sequence[Tensor], size: Sequence[int] | None, before: int) -> Sequence[Tensor]:
        """Give the second half of the heads the tokens column by column."""
        return turned(parts, self.layout(parts[0].shape[1], size, before))

    def restore(self, parts: list[Tensor], size: Sequence[int] | None, before: int) -> list[Tensor]:
        """Put what the second half of the heads made back into rows."""
        layout = self.layout(parts[0].shape[1], size, before)
        return turned(parts, layout._replace(rows=layout.columns, columns=layout.rows))

    def layout(self, tokens: int, size: Sequence[int] | None, before: int) -> Layout:
        """Find the grid.

        Args:
            tokens: their number.
            size: rows and columns of the image, where the attention knows them.
            before: tokens in front of it, where the spec does not say.

        Raises:
            PlugError: the tokens are no such grid.
        """
        before = before if self.before is None else self.before
        count = tokens - before - self.after
        if size is None:
            size = self.grid or (math.isqrt(max(int(count), 0)),) * 2
        rows, columns = size
        if rows * columns != count or count < 1:
            grid = f'a grid of {rows} x {columns}' if self.grid is not None else 'a square grid'
            raise PlugError(
                f"FAR: scan='cross': {tokens} tokens, {before} in front and {self.after} behind, are not {grid}; say "
                f"where it is with {HOW}; or use scan='raster'"
            )
        return Layout(before, rows, columns, self.after)


def turned(parts: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Transpose the grid in the second half of the heads, all at once: they are few copies of many channels."""
    half = (len(parts) + 1) // 2
    joined = torch.cat([*parts[half:]], -1)
    before, rows, columns, after = layout
    front, grid, end = joined.split([before, rows * columns, after], 1)
    grid = grid.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
    found = torch.cat([front, grid, end], 1) if before or after else grid
    return [*parts[:half], *found.split([part.shape[-1] for part in parts[half:]], -1)]


def build_scan(spec: Any) -> Raster:
    """Build a scan from its name, or from a dict with its arguments.

    Raises:
        PlugError: it is not known, or takes other arguments.
    """
    found: Raster = build(SCANS, {'type': spec} if isinstance(spec, str) else spec)
    return found
