"""The cases of `bench.plug` for UNets of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.forms import SE, Case, dia

__all__ = ['CASES', 'Denoiser']


class Denoiser(nn.Module):
    """A UNet at fixed timesteps, as a function of the noisy images alone."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor) -> Tensor:
        """Predict the noise of ``(B, C, H, W)``."""
        timesteps = torch.arange(len(x), device=x.device) * 37 % 1000
        return self.unet(x, timesteps).sample


def unet(widths: tuple[int, ...], layers: int, attention: int, groups: int) -> Denoiser:
    """A `UNet2DModel` for 32 px; ``attention``: level with self-attention, besides that of the middle."""
    import diffusers

    down = ['AttnDownBlock2D' if level == attention else 'DownBlock2D' for level in range(len(widths))]
    return Denoiser(
        diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=widths,
            layers_per_block=layers,
            down_block_types=tuple(down),
            up_block_types=tuple(name.replace('Down', 'Up') for name in reversed(down)),
            norm_num_groups=groups,
        )
    )


DYNAMIC = {'SE': SE, 'DIA r=4': dia(4)}
CASES = (
    Case(
        'UNet w32, 32 px', lambda: unet((32, 64, 64), 1, -1, 8), batch=32, side=32, dynamic=DYNAMIC, needs='diffusers'
    ),
    Case(
        'UNet w64 with attention, 32 px',
        lambda: unet((64, 128, 128), 2, 1, 32),
        batch=8,
        side=32,
        dynamic=DYNAMIC,
        needs='diffusers',
    ),
)
