"""One head: a bidirectional LSTM whose two directions may have different widths, as pruning leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ['DIRECTIONS', 'Direction', 'HeadLSTM', 'from_dense', 'run_direction', 'to_dense']

DIRECTIONS = ('ahead', 'back')
KINDS = ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh')


class Direction(NamedTuple):
    """Weights of one direction of one head, gates in PyTorch's order (i, f, g, o), each of ``width`` rows.

    Attributes:
        weight_ih: ``(4 width, inputs)``.
        weight_hh: ``(4 width, width)``.
        bias_ih: ``(4 width,)``.
        bias_hh: ``(4 width,)``.
        reverse: whether it reads the tokens last to first.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    reverse: bool

    @property
    def width(self) -> int:
        """Number of hidden units."""
        return self.weight_hh.shape[1]


class HeadLSTM(nn.Module):
    """One-layer bidirectional LSTM: ``(B, N, inputs) -> (B, N, ahead + back)``.

    With equal widths it is one `torch.nn.LSTM`, else one a direction; a direction of width 0 is left out.

    Args:
        inputs: channels of a token.
        widths: hidden units of the forward and of the backward direction.
        bound: initial weights are uniform in +-bound.
    """

    def __init__(self, inputs: int, widths: Sequence[int], bound: float) -> None:
        super().__init__()
        self.inputs = inputs
        self.widths = (int(widths[0]), int(widths[1]))
        ahead, back = self.widths
        self.both = self.ahead = self.back = None
        if ahead == back and ahead:
            self.both = nn.LSTM(inputs, ahead, batch_first=True, bidirectional=True)
        else:
            self.ahead = nn.LSTM(inputs, ahead, batch_first=True) if ahead else None
            self.back = nn.LSTM(inputs, back, batch_first=True) if back else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def directions(self) -> list[Direction]:
        """Weights of the directions that have units."""
        found = []
        for number, name in enumerate(DIRECTIONS):
            lstm = self.both if self.both is not None else getattr(self, name)
            if lstm is not None:
                end = '_l0_reverse' if number and self.both is not None else '_l0'
                w_ih, w_hh, b_ih, b_hh = (getattr(lstm, kind + end) for kind in KINDS)
                found.append(Direction(w_ih, w_hh, b_ih, b_hh, bool(number)))
        return found

    def weights(self) -> list[Tensor]:
        """Read the weights of all `directions` in a row, in the shortest way; a wrapped LSTM has others."""
        lstms = [lstm for lstm in self._modules.values() if lstm is not None]
        return [weight for lstm in lstms for weight in lstm._parameters.values() if weight is not None]

    def forward(self, x: Tensor) -> Tensor:
        """Run both directions, with `torch.nn.LSTM`."""
        if self.both is not None:
            return self.both(x)[0]
        parts = []
        if self.ahead is not None:
            parts.append(self.ahead(x)[0])
        if self.back is not None:
            parts.append(self.back(x.flip(1))[0].flip(1))
        return torch.cat(parts, -1) if parts else x[..., :0]


def run_direction(direction: Direction, x: Tensor) -> Tensor:
    """Run one direction over ``(B, N, inputs)``; equal to its half of `HeadLSTM`."""
    x = x.flip(1) if direction.reverse else x
    start = x.new_zeros(1, x.shape[0], direction.width)
    out = torch._VF.lstm(x, (start, start), list(direction[:4]), True, 1, 0.0, False, False, True)[0]
    return out.flip(1) if direction.reverse else out


def to_dense(parts: Sequence[Direction]) -> Direction:
    """Join one direction of all heads to that of a single LSTM over all channels.

    Its weights are block-diagonal gate by gate: PyTorch stores all rows of i, then of f, g and o, so blocks of four
    gates a head would mix heads.
    """
    widths = [part.width for part in parts]

    def blocks(weights: Sequence[Tensor]) -> Tensor:
        gates = zip(*(w.split(width) for w, width in zip(weights, widths, strict=True)), strict=True)
        return torch.cat([torch.block_diag(*gate) for gate in gates])

    def rows(biases: Sequence[Tensor]) -> Tensor:
        gates = zip(*(b.split(width) for b, width in zip(biases, widths, strict=True)), strict=True)
        return torch.cat([torch.cat(gate) for gate in gates])

    return Direction(
        blocks([p.weight_ih for p in parts]),
        blocks([p.weight_hh for p in parts]),
        rows([p.bias_ih for p in parts]),
        rows([p.bias_hh for p in parts]),
        parts[0].reverse,
    )


def from_dense(lstm: nn.LSTM, heads: int) -> list[HeadLSTM]:
    """Split a bidirectional LSTM with block-diagonal weights into heads.

    Args:
        lstm: one layer, bidirectional, ``hidden_size`` a multiple of ``heads``.
        heads: number of heads.

    Raises:
        ValueError: weights outside of the blocks are not zero, as in models whose mask was laid out head by head.
    """
    width, inputs = lstm.hidden_size // heads, lstm.input_size // heads
    found = []
    for head in range(heads):
        part = HeadLSTM(inputs, (width, width), bound=0.0)
        assert part.both is not None
        for end in ('_l0', '_l0_reverse'):
            for kind, columns in (('weight_ih', inputs), ('weight_hh', width), ('bias_ih', 0), ('bias_hh', 0)):
                full = getattr(lstm, kind + end).detach()
                rows = full.unflatten(0, (4, heads, width))[:, head].flatten(0, 1)
                own = rows[:, head * columns : (head + 1) * columns] if columns else rows
                if columns and rows.count_nonzero() != own.count_nonzero():
                    raise ValueError(
                        f'{kind + end}: has weights outside of the blocks of its {heads} heads; a mask that is laid '
                        f'out head by head instead of gate by gate mixes heads, and such a model cannot be split'
                    )
                with torch.no_grad():
                    getattr(part.both, kind + end).copy_(own)
        found.append(part)
    return found
