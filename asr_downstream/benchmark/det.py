"""Faster R-CNN R50: what plugs cost in a training step, and what folding and fusing leave at inference.

All arms compute the same function at the start (``preserve=True``), so that they have the same proposals to work on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.benchmark.plug import SE, SPEC, STOCK, dia, ratios
from asr_downstream.description import render
from asr_downstream.detection.detectors import FeatureMaps, build_detector
from asr_downstream.folding import fold
from asr_downstream.fusing import fuse_conv_bn
from asr_downstream.plugging import plug
from asr_downstream.timing import paired_times

__all__ = ['measure_detector', 'table']

FOLDED, FUSED = 'folded', 'folded + conv-BN fused'
ARMS = {'ASR(SE)': SPEC, 'SE': SE, 'DIA r=4': dia(4)}


def faster_rcnn() -> nn.Module:
    """Faster R-CNN R50 as MMDetection configures it: stage 1 frozen, norms in eval mode."""
    init_default_scope('mmdet')
    return build_detector(get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'))


def batch(images: int, side: int, seed: int = 0) -> tuple[Tensor, list[DetDataSample]]:
    """Random images with four boxes each."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(images):
        corner = torch.rand(4, 2, generator=generator) * side / 2
        size = torch.rand(4, 2, generator=generator) * side / 3 + 16
        boxes = torch.cat([corner, (corner + size).clamp(max=side)], 1)
        truth = InstanceData(bboxes=boxes, labels=torch.randint(80, (4,), generator=generator))
        shape = (side, side)
        meta = {'img_shape': shape, 'ori_shape': shape, 'pad_shape': shape, 'batch_input_shape': shape}
        sample = DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0), 'img_id': 0})
        sample.gt_instances = truth
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return torch.randn(images, 3, side, side, generator=generator), samples


def training_step(model: Any, x: Tensor, samples: list[DetDataSample]) -> Callable[[], None]:
    """All losses, backward, and a step of SGD too small to change anything."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)

    def step() -> None:
        torch.manual_seed(0)  # the samples of proposals
        optimiser.zero_grad(set_to_none=True)
        total, _ = model.parse_losses(model.loss(x, copy.deepcopy(samples)))
        total.backward()
        optimiser.step()

    return step


def inference(model: Any, x: Tensor, samples: list[DetDataSample]) -> Callable[[], Any]:
    """Detections of one image."""

    def predict() -> Any:
        with torch.inference_mode():
            return model.predict(x, copy.deepcopy(samples))

    return predict


def measure_detector(rounds: int, side: int = 320, images: int = 2, seed: int = 0) -> dict[str, Any]:
    """Measure all arms in paired rounds.

    Returns:
        Ratios to stock: ``training`` and ``inference``; ``fused``: how many norms were fused.
    """
    torch.manual_seed(seed)
    stock: Any = faster_rcnn()
    stock.init_weights()
    stock.eval()
    x, samples = batch(images, side)
    models: dict[str, Any] = {STOCK: stock}
    for name, spec in ARMS.items():
        models[name] = copy.deepcopy(stock)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # stage 1 is frozen and left out
            plug(models[name].backbone, {**spec, 'preserve': True})
        models[name].eval()
    still = {**models, FOLDED: fold(models['ASR(SE)'])[0]}
    fused, pairs = fuse_conv_bn(FeatureMaps(still[FOLDED]), x[:1])
    still[FUSED] = fused.detector
    inference_times = paired_times(
        {name: inference(model, x[:1], samples[:1]) for name, model in still.items()}, rounds, 'inference'
    )
    training_times = paired_times(
        {name: training_step(model, x, samples) for name, model in models.items()}, rounds, 'training steps', warmup=1
    )
    return {
        'model': 'Faster R-CNN R50 FPN',
        'images': images,
        'side': side,
        'rounds': rounds,
        'fused': len(pairs),
        'training': ratios(training_times),
        'inference': ratios(inference_times),
    }


def table(result: dict[str, Any]) -> str:
    """Print the measurements."""
    title = f'{result["model"]}, {result["side"]} px: ratios to stock, {result["rounds"]} paired rounds'
    out = Table('arm', f'training step, {result["images"]} images', 'inference, 1 image', title=title)
    for arm in result['inference']:
        out.add_row(arm, str(result['training'].get(arm, '')), str(result['inference'][arm]))
    return render(out)
