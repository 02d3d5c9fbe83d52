"""The multi-head LSTM that stands in for an attention (FAR, arXiv 2505.21535; form as in its authors' repository)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.far.model.backends import EXECUTIONS, choose
from asr_downstream.far.model.head import HeadLSTM
from asr_downstream.far.model.mixer import VARIANTS, Mixer, uncast
from asr_downstream.far.model.scan import build_scan

__all__ = ['MultiHeadLSTM', 'linear']


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer, which may have no inputs: then it is a bias."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Initializing zero-element')
        return nn.Linear(inputs, outputs)


class MultiHeadLSTM(Mixer):
    """Multi-head bidirectional LSTM over tokens: ``(B, N, channels) -> (B, N, channels)``.

    A linear map, one bidirectional LSTM for each slice of ``channels / heads`` channels, and, by variant, a linear map
    a head or one of all states. States start at zero. Under autocast the recurrences keep the dtype of their weights
    (oneDNN has no LSTM of lower precision for float32 weights, cuDNN none in bfloat16 before 9.13), and the linear maps
    follow autocast; a module converted to bfloat16 or float16 as a whole runs in it.

    Args:
        channels: of a token.
        heads: number of heads; must divide ``channels``.
        variant: a key of `VARIANTS`.
        widths: hidden units of each head, ``(ahead, back)``; default: ``channels / heads``.
        execution: a key of `asr_downstream.far.model.backends.EXECUTIONS`, or ``'auto'``.
        out_channels: of the output; default: ``channels``.
        scan: in which order the heads read the tokens: a key of `asr_downstream.far.model.scan.SCANS`, or a dict with
            its arguments.
        before: tokens in front of those of an image, such as the class token, where the scan does not say.

    Initial LSTM weights are uniform in ``+-1 / sqrt(channels)``: the authors' heads are slices of one LSTM that wide.

    Raises:
        PlugError: sizes do not fit, or a name is not known.
    """

    name = 'lstm'
    note = 'multi-head LSTMs (FAR, arXiv 2505.21535)'
    takes = ('widths', 'execution', 'scan', 'before')
    apart = True

    def __init__(
        self,
        channels: int,
        heads: int,
        variant: str = 'M3',
        widths: Sequence[Sequence[int]] | None = None,
        execution: str = 'auto',
        out_channels: int | None = None,
        scan: Any = 'raster',
        before: int = 0,
    ) -> None:
        super().__init__(channels, heads, variant)
        if execution != 'auto' and execution not in EXECUTIONS:
            raise PlugError(
                f'FAR: execution={execution!r} is not known; {did_you_mean(str(execution), [*EXECUTIONS, "auto"])}'
            )
        self.execution = execution
        size = channels // heads
        widths = [(size, size)] * heads if widths is None else widths
        if len(widths) != heads or any(len(pair) != 2 or min(pair) < 0 for pair in widths):
            raise PlugError(f'FAR: widths={widths!r} should be {heads} pairs (ahead, back) of numbers of hidden units')
        self.scan, self.before = build_scan(scan), before
        self.scan.check(heads)
        self.pre_proj = nn.Linear(channels, channels)
        self.heads = nn.ModuleList(HeadLSTM(size, pair, 1 / math.sqrt(channels)) for pair in widths)
        out = channels if out_channels is None else out_channels
        self.head_proj: nn.ModuleList | None = None
        self.out_proj: nn.Linear | None = None
        if VARIANTS[variant].head_proj:
            if out % heads:
                raise PlugError(f'FAR: {out} channels of the projection cannot be split into {heads} heads')
            self.head_proj = nn.ModuleList(linear(sum(pair), out // heads) for pair in widths)
        else:
            self.out_proj = linear(sum(map(sum, widths)), out)

    @property
    def widths(self) -> list[tuple[int, int]]:
        """Hidden units of each head, ``(ahead, back)``."""
        return [head.widths for head in self.heads]  # type: ignore[misc]

    @property
    def full(self) -> int:  # type: ignore[override]
        """Hidden units before pruning."""
        return 2 * self.channels

    @property
    def reads(self) -> str:  # type: ignore[override]
        """Name of the scan."""
        return self.scan.name

    def fit(self, tokens: int) -> None:
        """Scan a grid of this many tokens."""
        self.scan = self.scan.fitted(tokens)

    def states(self, tokens: Tensor, size: Sequence[int] | None = None) -> list[Tensor]:
        """Hidden states of each head, ``(B, N, ahead + back)``, for what the pre-projection made of the tokens.

        Args:
            tokens: ``(B, N, channels)``.
            size: rows and columns of the image, where they are known.
        """
        heads: Any = self.heads
        dtype = next(heads.parameters(), tokens).dtype
        with uncast(tokens.device.type):
            pieces = self.scan.read(tokens.to(dtype).chunk(len(heads), -1), size, self.before)
            name = choose(heads, pieces) if self.execution == 'auto' else self.execution
            return self.scan.restore(EXECUTIONS[name](heads, pieces), size, self.before)

    def outputs(self, tokens: Tensor, size: Sequence[int] | None = None) -> list[Tensor]:
        """States of each head, projected, if each has a projection; see `states`."""
        states = self.states(tokens, size)
        if self.head_proj is None:
            return states
        return [proj(s) for proj, s in zip(self.head_proj, states, strict=True)]

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Mix tokens ``(B, N, channels)``, of images of ``size``, rows and columns, where that is known."""
        mixed = super().forward(x, size)
        return mixed if self.out_proj is None else self.out_proj(mixed)

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f'channels={self.channels}, heads={len(self.heads)}, variant={self.variant!r}, '
            f'execution={self.execution!r}, scan={self.scan.name!r}'
        )
