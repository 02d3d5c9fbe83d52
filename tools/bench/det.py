"""Detectors: what plugs cost in a training step, and what folding and fusing leave at inference.

All arms compute the same function at the start (``preserve=True``), so that they have the same proposals to work on.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from rich.table import Table
from torch import Tensor

from asr_downstream.console.text import render
from asr_downstream.detection.models.detectors import FeatureMaps, build_detector
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.fuse_conv_bn import fuse_conv_bn
from asr_downstream.measure.timing import paired_times
from asr_downstream.plugging.plug import plug
from bench.forms import LAYER_SCALE, SE, SPEC, STOCK, dia
from bench.plug import ratios

__all__ = ['CASES', 'DetectorCase', 'measure_detector', 'table']

FOLDED, FUSED = 'folded', 'folded + conv-BN fused'
ASR = 'ASR(SE)'
ARMS = {ASR: SPEC, 'SE': SE, 'DIA r=4': dia(4)}
CONTROLS = {
    'ASR(DIA)': {**dia(4), 'type': 'ASR'},
    'LayerScale': LAYER_SCALE,
}


@dataclass(frozen=True)
class DetectorCase:
    """A detector, the plugs that are tried on it, and the images ``(images, 3, side, side)`` of a training step."""

    name: str
    config: Callable[[], Config]
    arms: dict[str, dict[str, Any]]
    side: int = 320
    images: int = 2


def faster_rcnn() -> Config:
    """Faster R-CNN R50 as MMDetection configures it: stage 1 frozen, norms in eval mode."""
    return get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')


def retinanet() -> Config:
    """The detector of `det_configs/bccd`: RetinaNet R18 of half the width, all of it trained."""
    config = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    config.model.backbone.update(base_channels=32, frozen_stages=-1, norm_eval=False)
    config.model.neck.update(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4)
    config.model.bbox_head.update(num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2)
    config.model.bbox_head.anchor_generator.strides = [8, 16, 32, 64]
    return config


CASES = (
    DetectorCase('Faster R-CNN R50', faster_rcnn, ARMS),
    DetectorCase('RetinaNet R18-w32', retinanet, {**ARMS, **CONTROLS}),
)


def batch(images: int, side: int, seed: int = 0) -> tuple[Tensor, list[DetDataSample]]:
    """Random images with four boxes each, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(images):
        corner = torch.rand(4, 2, generator=generator) * side / 2
        size = torch.rand(4, 2, generator=generator) * side / 3 + 16
        boxes = torch.cat([corner, (corner + size).clamp(max=side)], 1)
        truth = InstanceData(bboxes=boxes, labels=torch.randint(3, (4,), generator=generator))
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


def measure_detector(case: DetectorCase, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Measure all arms of a case in paired rounds.

    Returns:
        Ratios to stock: ``training`` and ``inference``; ``fused``: how many norms were fused.
    """
    torch.manual_seed(seed)
    init_default_scope('mmdet')
    MMLogger.get_current_instance().setLevel('WARNING')  # init_weights tells of every tensor
    stock: Any = build_detector(case.config())
    stock.init_weights()
    stock.eval()
    x, samples = batch(case.images, case.side)
    models: dict[str, Any] = {STOCK: stock}
    for name, spec in case.arms.items():
        models[name] = copy.deepcopy(stock)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # stage 1 is frozen and left out
            plug(models[name].backbone, {**spec, 'preserve': True})
        models[name].eval()
    still = {**models, FOLDED: fold_exactly(models[ASR])[0]}
    fused, pairs = fuse_conv_bn(FeatureMaps(still[FOLDED]), x[:1])
    still[FUSED] = fused.detector
    inference_times = paired_times(
        {name: inference(model, x[:1], samples[:1]) for name, model in still.items()}, rounds, f'{case.name}: inference'
    )
    training_times = paired_times(
        {name: training_step(model, x, samples) for name, model in models.items()},
        rounds,
        f'{case.name}: training steps',
        warmup=1,
    )
    return {
        'model': case.name,
        'images': case.images,
        'side': case.side,
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
