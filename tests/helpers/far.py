"""Tiny models with self-attention, configs and commands for the tests of FAR."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from conftest import ROOT, randomise
from torch import Tensor, nn

FAR = dict(type='FAR', variant='M3', layers='all')


def vit(cls: str = 'ViT', layers: int = 2, width: int = 16, heads: int = 2, **kwargs: Any) -> nn.Module:
    """A ViT or DeiT for 8x8 grey images: 4 or 16 patches and a class token."""
    settings: Any = getattr(transformers, f'{cls}Config')(
        image_size=8, patch_size=kwargs.pop('patch_size', 4), num_channels=1, hidden_size=width,
        num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width, num_labels=10, **kwargs,
    )  # fmt: skip
    return getattr(transformers, f'{cls}ForImageClassification')(settings)


def unet() -> nn.Module:
    """UNet with attention over pixels, which adds its own shortcut."""
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
        norm_num_groups=4,
    )  # fmt: skip


def dit() -> nn.Module:
    """A DiT with two blocks."""
    return diffusers.DiTTransformer2DModel(
        sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1,
        num_embeds_ada_norm=5,
    )  # fmt: skip


class TimmAttention(nn.Module):
    """Self-attention as timm writes it: query, key and value in one layer."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Mix tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A pre-norm block of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = TimmAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and shortcut."""
        return x + self.attn(self.norm(x))


@dataclass(frozen=True)
class Case:
    """A model, its inputs, its attentions and how to name them."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    attentions: tuple[str, ...]
    layers: Any = 'all'
    heads_seen: bool = True

    def model(self) -> nn.Module:
        """The model in float64 and eval mode, with random weights."""
        torch.manual_seed(0)
        return randomise(self.build()).double().eval()

    def output(self, model: nn.Module) -> Tensor:
        """Tensor that the model gives for the inputs."""
        found = model(**{k: v.double() if v.is_floating_point() else v for k, v in self.inputs().items()})
        return found if isinstance(found, Tensor) else found[0]


def pixels() -> dict[str, Tensor]:
    """Grey images."""
    return {'pixel_values': torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


def noisy(size: int = 8, name: str = 'sample') -> dict[str, Tensor]:
    """Noise at two timesteps."""
    x = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(1))
    return {name: x, 'timestep': torch.tensor([3, 70])}


def tokens(name: str) -> dict[str, Tensor]:
    """Random tokens."""
    return {name: torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}


def encoder() -> nn.Module:
    """PyTorch's transformer encoder, whose attention is `torch.nn.MultiheadAttention`."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES = {
    'ViT': Case(vit, pixels, ('vit.layers.0.attention', 'vit.layers.1.attention')),
    'DeiT': Case(lambda: vit('DeiT'), pixels, ('deit.layers.0.attention', 'deit.layers.1.attention')),
    'UNet2DModel': Case(
        unet, noisy,
        ('down_blocks.1.attentions.0', 'up_blocks.0.attentions.0', 'up_blocks.0.attentions.1',
         'mid_block.attentions.0'),
    ),
    'DiT': Case(
        dit, lambda: noisy(4, 'hidden_states') | {'class_labels': torch.tensor([0, 4])},
        ('transformer_blocks.0.attn1', 'transformer_blocks.1.attn1'),
    ),
    'own blocks by pattern': Case(
        lambda: nn.Sequential(Block(), Block()), lambda: tokens('input'), ('0.attn', '1.attn'), layers=['*.attn'],
    ),
    'TransformerEncoder': Case(
        encoder, lambda: tokens('src'), ('layers.0.self_attn', 'layers.1.self_attn'), heads_seen=False,
    ),
}  # fmt: skip


def write_config(folder: Path, **settings: Any) -> Path:
    """Write a config of three short stages on digits; ``settings`` replace whole keys."""
    content = {
        'teacher': dict(
            type='ViTForImageClassification', image_size=8, patch_size=4, num_channels=1, hidden_size=16,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=10,
        ),
        'data': dict(type='Digits', resolution=8),
        'augment': [dict(type='Crop', padding=1)],
        'train_batch_size': 16,
        'learning_rate': 2e-3,
        'dataloader_num_workers': 0,
        'checkpointing_steps': 3,
        'validation_steps': 6,
        'logging_steps': 1,
        'report_to': [],
        'max_train_steps': 6,
        'stages': [
            dict(name='teacher', learns='teacher'),
            dict(name='distill', learns='replacements', distance=dict(type='MSE', feature='heads')),
            dict(name='finetune', learns='all'),
        ],
        'prune': dict(sparse=dict(learns='all', hoyer=1e-3), finetune=dict(learns='all')),
        **settings,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'tiny.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in content.items()) + '\n')
    return path


def launch(name: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a tool in processes of its own."""
    start = [sys.executable, '-W', 'ignore']
    if processes > 1:
        start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = [*start, f'tools/{name}.py', *map(str, arguments)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
