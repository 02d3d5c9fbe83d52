"""Tiny shipped models of every kind, with random weights and statistics, to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import randomise

from asr_downstream.far import replace
from helpers.far import unet, vit

STRICTER = {'model.test_cfg.score_thr': 0.2}
FAR = dict(type='FAR', variant='M3', layers='all')


def classifier(folder: Path) -> Path:
    """What `train-cls` ships."""
    from asr_downstream.classification.export import save_classifier
    from asr_downstream.models.resnet_cifar import resnet

    facts: dict[str, Any] = {
        'model': {'type': 'ResNet', 'depth': 8, 'width': 4},
        'classes': [str(digit) for digit in range(10)],
        'resolution': 16,
        'channels': 3,
        'image_mean': [0.5, 0.4, 0.6],
        'image_std': [0.2, 0.3, 0.25],
        'training': {'plug': None, 'seed': 0, 'step': 1},
        'accuracy': 0.5,
        'images': 100,
        'data': 'digits',
    }
    return save_classifier(randomise(resnet(depth=8, width=4)).eval(), folder / 'classifier', facts)


def pipeline(folder: Path, flow: dict[str, Any] | None = None) -> Path:
    """What `fold` ships of a UNet; ``flow``: of one that was trained to follow one."""
    import diffusers

    model: Any = randomise(
        diffusers.UNet2DModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
            norm_num_groups=4, attention_head_dim=4,
        )
    )  # fmt: skip
    scheduler: Any = diffusers.DDPMScheduler(num_train_timesteps=100)
    if flow is not None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, **flow)
    diffusers.DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(folder / 'pipeline')
    return folder / 'pipeline'


def far_vit(folder: Path) -> Path:
    """A ViT of transformers whose attention is replaced."""
    from asr_downstream.far.export import save_far

    model = vit()
    replace(model, FAR)
    return save_far(randomise(model).eval(), folder / 'vit')


def far_unet(folder: Path) -> Path:
    """A UNet of diffusers whose attention is replaced."""
    from asr_downstream.far.export import save_far

    model = unet()
    replace(model, FAR)
    return save_far(randomise(model).eval(), folder / 'unet')


def detector(folder: Path, digits: Path, stock: bool = True, **options: Any) -> Path:
    """What `fold` ships of a detector; not stock: with its gates.

    Random weights find hundreds of boxes of nearly one score, whose order rounding decides: only the best may stay.
    """
    from asr_downstream.detection.config import stock_config
    from asr_downstream.detection.models.detectors import build_detector
    from helpers.tiny_detection import tiny

    torch.manual_seed(0)
    config = tiny(digits, validate=True, **{**STRICTER, **options})
    config = stock_config(config) if stock else config
    (folder / 'detector.py').write_text(config.pretty_text)
    model = randomise(build_detector(config))
    meta = {'dataset_meta': {'classes': tuple(map(str, range(10)))}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, folder / 'detector.pth')
    return folder / 'detector.pth'
