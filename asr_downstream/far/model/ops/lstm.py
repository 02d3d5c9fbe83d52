"""Using the operator: loaded from the cache when it is first asked for, never compiled here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from asr_downstream.far.model.ops.build import built

__all__ = ['DTYPES', 'Operator', 'lstm_heads', 'operator']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOW = 'asr-downstream build-ops'


class Operator(NamedTuple):
    """Whether the operator can be used.

    Attributes:
        there: whether it is loaded.
        reason: why not, and what to do; '' if it is.
    """

    there: bool
    reason: str = ''


@cache
def operator() -> Operator:
    """Load the operator, once a process."""
    try:
        path = built()
        if path is None:
            return Operator(False, f'its operator is not built: {HOW}')
        torch.ops.load_library(str(path))
    except OSError as error:
        return Operator(False, f'its operator cannot be loaded ({str(error).splitlines()[0][:200]}): {HOW} --again')
    torch.library.register_fake('asr_downstream::lstm_heads', shapes)
    return Operator(True)


def lstm_heads(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], heads: Sequence[int], reverse: Sequence[bool]
) -> list[Tensor]:
    """Run the LSTMs of all heads; see `operator` first. Without gradients, on the CPU.

    Args:
        tokens: ``(B, N, inputs)`` of each head.
        weights: of each LSTM ``weight_ih, weight_hh, bias_ih, bias_hh``, as in `torch.nn.LSTM`.
        heads: whose tokens each LSTM reads.
        reverse: whether it reads them last to first.

    Returns:
        Hidden states of each head ``(B, N, widths of its LSTMs)``.
    """
    found: list[Tensor] = torch.ops.asr_downstream.lstm_heads(tokens, weights, heads, reverse)
    return found


def shapes(
    tokens: Sequence[Tensor], weights: Sequence[Tensor], heads: Sequence[int], reverse: Sequence[bool]
) -> list[Tensor]:
    """What `lstm_heads` returns, without values."""
    widths = [0] * len(tokens)
    for number, head in enumerate(heads):
        widths[head] += weights[4 * number + 1].shape[1]
    return [x.new_empty((*x.shape[:2], width)) for x, width in zip(tokens, widths, strict=True)]
