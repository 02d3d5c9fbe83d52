"""Linear attention, the control of the LSTMs: what a cost that is linear in the tokens gives without a recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr_downstream.errors import PlugError
from asr_downstream.far.model.mixer import VARIANTS, Mixer, uncast

__all__ = ['MultiHeadLinear']

EPS = 1e-6


class MultiHeadLinear(Mixer):
    """Multi-head linear attention without softmax: ``(B, N, channels) -> (B, N, out_channels)``.

    ``phi(q) (phi(k)^T v) / (phi(q) sum phi(k))`` with ``phi = elu + 1``, over all tokens (Katharopoulos et al. 2020,
    arXiv 2006.16236). It has queries, keys and values of its own, as many weights as those it stands in for, which
    start anew. Sums over tokens are at least float32, under autocast and in a module of lower precision.

    Args:
        channels: of a token.
        heads: number of heads.
        variant: ``'M2'`` or ``'M3'``, which say what follows: a fresh output projection, or the teacher's.
        out_channels: of the output; default: ``channels``.

    Raises:
        PlugError: sizes do not fit, or the variant is another.
    """

    name = 'linear'
    note = 'linear attention (arXiv 2006.16236), distilled as in FAR (arXiv 2505.21535)'

    def __init__(self, channels: int, heads: int, variant: str = 'M3', out_channels: int | None = None) -> None:
        super().__init__(channels, heads, variant)
        if not VARIANTS[variant].head_proj:
            raise PlugError(f"FAR: variant={variant!r} is of LSTMs; mixer='linear' has M2 or M3")
        out = channels if out_channels is None else out_channels
        if out % heads:
            raise PlugError(f'FAR: {out} channels of the projection cannot be split into {heads} heads')
        self.pre_proj = nn.Identity()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, out) for _ in range(3))

    def outputs(self, tokens: Tensor, size: Sequence[int] | None = None) -> list[Tensor]:
        """Output of each head ``(B, N, out_channels / heads)``; the tokens have no order."""
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(tokens).unflatten(-1, (self.count, -1)).transpose(1, 2) for layer in layers)
        dtype = torch.promote_types(q.dtype, torch.float32)
        with uncast(tokens.device.type):
            query, key = F.elu(q.to(dtype)) + 1, F.elu(k.to(dtype)) + 1
            sums = key.sum(-2).unsqueeze(-1)
            found = query @ (key.mT @ v.to(dtype)) / (query @ sums + EPS)
        return [head.to(v.dtype) for head in found.unbind(1)]

    def extra_repr(self) -> str:
        """Sizes."""
        return f'channels={self.channels}, heads={self.count}, variant={self.variant!r}'
