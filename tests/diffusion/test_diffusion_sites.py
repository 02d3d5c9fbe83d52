"""Sites of diffusers' one-dimensional UNets and of its block with conditioned norms: the real classes, at tiny size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.branches import ASR, SE, Case, assert_branches_end_there, assert_folds, assert_preserved, trained
from torch import Tensor, nn

from asr_downstream import describe, verify
from asr_downstream.plugging.sites import find_sites

diffusers = pytest.importorskip('diffusers')


def temporal() -> nn.Module:
    """Of the reinforcement learning pipeline: residual blocks with Mish."""
    return diffusers.UNet1DModel(
        sample_size=8, in_channels=3, out_channels=3, time_embedding_type='positional', use_timestep_embedding=True,
        flip_sin_to_cos=False, freq_shift=1, block_out_channels=(8, 16), norm_num_groups=4, act_fn='mish',
        down_block_types=('DownResnetBlock1D', 'DownResnetBlock1D'), up_block_types=('UpResnetBlock1D',),
        mid_block_type='MidResTemporalBlock1D', out_block_type='OutConv1DBlock', layers_per_block=1,
    )  # fmt: skip


def audio() -> nn.Module:
    """As Dance Diffusion: convolutions with GELU, self-attention, a last block without a norm."""
    return diffusers.UNet1DModel(
        sample_size=16, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32),
        down_block_types=('DownBlock1DNoSkip', 'AttnDownBlock1D'), up_block_types=('AttnUpBlock1D', 'UpBlock1DNoSkip'),
    )  # fmt: skip


class Conditioned(nn.Module):
    """Two blocks whose norms read a condition: an embedding, or a map."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        settings: dict[str, Any] = dict(temb_channels=6, time_embedding_norm=norm, output_scale_factor=2.0)
        block = diffusers.models.resnet.ResnetBlockCondNorm2D
        self.blocks = nn.ModuleList(
            [block(in_channels=32, **settings), block(in_channels=32, out_channels=64, **settings)]
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


def drawn(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def noisy(channels: int, size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*drawn((2, channels, size)), torch.tensor([3.0, 5.0]))


def shortcut(block: Any, x: Tensor) -> Tensor:
    if isinstance(block, diffusers.models.resnet.ResnetBlockCondNorm2D):
        return (x if block.conv_shortcut is None else block.conv_shortcut(x)) / block.output_scale_factor
    if hasattr(block, 'residual_conv'):
        return block.residual_conv(x)
    return block.conv_skip(x) if getattr(block, 'has_conv_skip', False) else x


def places(path: str, count: int, end: str) -> tuple[str, ...]:
    return tuple(f'{path}.{i}.{end}' for i in range(count))


NORM, ATTENTION = 'group_norm_2', 'proj_attn'
CASES = {
    'UNet1D, temporal': Case(
        temporal, noisy(3, 8),
        tuple(
            f'{block}.resnets.{i}.conv_out.group_norm'
            for block in ('down_blocks.0', 'down_blocks.1', 'up_blocks.0', 'mid_block') for i in (0, 1)
        ),
        'ResidualTemporalBlock1D', shortcut,
    ),
    'UNet1D, audio': Case(
        audio, noisy(2, 16),
        (
            *places('down_blocks.0.resnets', 3, NORM),
            *places('down_blocks.1.attentions', 3, ATTENTION), *places('down_blocks.1.resnets', 3, NORM),
            *places('up_blocks.0.attentions', 3, ATTENTION), *places('up_blocks.0.resnets', 3, NORM),
            *places('up_blocks.1.resnets', 2, NORM), 'up_blocks.1.resnets.2.conv_2',
            *places('mid_block.attentions', 6, ATTENTION), *places('mid_block.resnets', 6, NORM),
        ),
        'ResConvBlock SelfAttention1d', shortcut,
    ),
    'condition: embedding': Case(
        lambda: Conditioned('ada_group'), lambda: drawn((2, 32, 4, 4), (2, 6)),
        places('blocks', 2, 'conv2'), 'ResnetBlockCondNorm2D', shortcut,
    ),
    'condition: map': Case(
        lambda: Conditioned('spatial'), lambda: drawn((2, 32, 4, 4), (2, 6, 4, 4)),
        places('blocks', 2, 'conv2'), 'ResnetBlockCondNorm2D', shortcut,
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_residual_sites_end_the_branches(case: Case) -> None:
    assert_branches_end_there(case)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_trained_model_folds_and_plain_diffusers_loads_it(case: Case, tmp_path: Path) -> None:
    folded: Any = assert_folds(case)
    if not isinstance(folded, diffusers.UNet1DModel):
        return
    folded.save_pretrained(tmp_path)
    again, said = diffusers.UNet1DModel.from_pretrained(
        tmp_path, torch_dtype=torch.float64, output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(said[what] for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert verify(folded, again, case.inputs()).relative <= 1e-12


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_preserved_model_is_the_stock_one(case: Case) -> None:
    assert_preserved(case, ASR)
    assert len(describe(trained(case, SE)).sites) == len(case.sites)


def test_the_decoder_of_a_model_with_conditioned_norms_has_sites() -> None:
    model = diffusers.VQModel(
        block_out_channels=(32,), layers_per_block=1, latent_channels=4, num_vq_embeddings=8, norm_type='spatial'
    )
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == 'ResnetBlockCondNorm2D']
    assert len(blocks) >= 3
    assert {f'{name}.conv2' for name in blocks} <= {site.path for site in find_sites(model)}
