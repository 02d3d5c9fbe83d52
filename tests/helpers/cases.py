"""The tables that the contract tests are parametrised over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Attention -> parameters at the 54 sites of ResNet-164 on feature maps (ASR paper, Table 1; 100 classes: 1,727,284).
ATTENTION_COUNTS = {
    'SE': 1_929_388,
    'IE': 1_743_412,
    'SRM': 1_759_540,
    'ECA': 1_727_446,
    'SPA': 3_856_180,
    'CBAM': 1_926_220,
    'LayerScale': 1_735_348,
    'SigmoidVector': 1_735_348,
}
ATTENTIONS = tuple(ATTENTION_COUNTS)

# Gates of a fresh attention: exact where the formula fixes them, else the interval that they lie in.
FRESH_GATES = {
    'SE': (0.2, 0.8),
    'IE': (0.26894, 0.26895),
    'SRM': (0.5, 0.5),
    'ECA': (0.2, 0.8),
    'SPA': (0.2, 0.8),
    'CBAM': (0.2, 0.8),
    'LayerScale': (1e-5, 1e-5),
    'SigmoidVector': (0.5, 0.5),
}


@dataclass(frozen=True)
class LayerCase:
    """A stock layer of the fold table with an input for it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channel_dim: int = 1

    def input(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64)


def norm_cases() -> list[LayerCase]:
    found = []
    for d, space in ((1, (7,)), (2, (5, 4)), (3, (3, 4, 2))):
        found += [
            LayerCase(f'BatchNorm{d}d', lambda d=d: getattr(nn, f'BatchNorm{d}d')(8), (3, 8, *space)),
            LayerCase(
                f'InstanceNorm{d}d',
                lambda d=d: getattr(nn, f'InstanceNorm{d}d')(8, affine=True, track_running_stats=d == 2),
                (3, 8, *space),
            ),
        ]
    return [
        *found,
        LayerCase('BatchNorm1d-2dim', lambda: nn.BatchNorm1d(8), (5, 8)),
        LayerCase('BatchNorm2d-cumulative', lambda: nn.BatchNorm2d(8, momentum=None), (3, 8, 5, 4)),
        LayerCase('BatchNorm2d-no-stats', lambda: nn.BatchNorm2d(8, track_running_stats=False), (3, 8, 5, 4)),
        LayerCase('SyncBatchNorm', lambda: nn.SyncBatchNorm(8), (3, 8, 5, 4)),
        LayerCase('GroupNorm', lambda: nn.GroupNorm(4, 8), (3, 8, 5, 4)),
        LayerCase('LayerNorm', lambda: nn.LayerNorm(8), (3, 6, 8), -1),
        LayerCase('LayerNorm-no-bias', lambda: nn.LayerNorm(8, bias=False), (3, 6, 8), -1),
    ]


def affine_cases() -> list[LayerCase]:
    found = []
    for bias in (True, False):
        tag = '' if bias else '-no-bias'
        found += [
            LayerCase(f'Linear{tag}', lambda b=bias: nn.Linear(6, 8, bias=b), (3, 6), -1),
            LayerCase(f'Linear-tokens{tag}', lambda b=bias: nn.Linear(6, 8, bias=b), (3, 5, 6), -1),
        ]
        for d, space in ((1, (9,)), (2, (6, 5)), (3, (4, 5, 3))):
            for groups in (1, 4):
                found += [
                    LayerCase(
                        f'Conv{d}d-g{groups}{tag}',
                        lambda d=d, g=groups, b=bias: getattr(nn, f'Conv{d}d')(4, 8, 3, padding=1, groups=g, bias=b),
                        (2, 4, *space),
                    ),
                    LayerCase(
                        f'ConvTranspose{d}d-g{groups}{tag}',
                        lambda d=d, g=groups, b=bias: getattr(nn, f'ConvTranspose{d}d')(
                            4, 8, 3, stride=2, groups=g, bias=b
                        ),
                        (2, 4, *space),
                    ),
                ]
    found.append(
        LayerCase('Conv2d-reflect', lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode='reflect'), (2, 4, 6, 5))
    )
    return found


LAYER_CASES = [*norm_cases(), *affine_cases()]
