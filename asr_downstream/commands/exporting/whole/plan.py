"""What surrounds the network of a detector: how its images are made, and how boxes come out of what it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asr_downstream.files.configs import plain

__all__ = ['HEADS', 'NotWhole', 'Plan', 'plan_of']

# Heads whose boxes come out of `BaseDenseHead` of MMDetection as it is, so that one decoder fits all of them.
HEADS = ('RetinaHead', 'RTMDetHead', 'RTMDetSepBNHead', 'ATSSHead', 'FCOSHead', 'SSDHead')
READ = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs')  # steps that change no pixels
UNKNOWN = 'is not written as ONNX'


class NotWhole(Exception):
    """A detector that has no whole file; the message says why."""


@dataclass(frozen=True)
class Plan:
    """How images are made and boxes are chosen.

    Attributes:
        scale: longer and shorter side at most, pixels; width and height, where the ratio is not kept.
        keep_ratio: whether the ratio of the sides stays.
        canvas: width and height that the resized image is padded to; None: it is not.
        canvas_value: of that padding, before the normalisation.
        divisor: the normalised image is padded to a multiple of it.
        divisor_value: of that padding.
        mean, std: of the normalisation, by channel; empty: none.
        reverse: whether the network takes blue, green, red.
        score_threshold, per_level, overlap, most, smallest: of the candidates: least score; how many a feature map;
            IoU from which NMS drops one; how many detections; side of a box, at least.
        by_class: whether NMS looks at each class alone.
    """

    scale: tuple[int, int]
    keep_ratio: bool
    canvas: tuple[int, int] | None
    canvas_value: float
    divisor: int
    divisor_value: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reverse: bool
    score_threshold: float
    per_level: int
    overlap: float
    most: int
    smallest: float
    by_class: bool


def plan_of(config: Any, model: Any) -> Plan:
    """Read what surrounds a detector from its config.

    Raises:
        NotWhole: something in it is not written as ONNX.
    """
    head: Any = getattr(model, 'bbox_head', None)
    if type(head).__name__ not in HEADS or getattr(model, 'with_mask', False):
        raise NotWhole(f'decoding of {type(head if head is not None else model).__name__} {UNKNOWN}')
    resize: dict[str, Any] = {}
    pad: dict[str, Any] = {}
    for step in plain(config.test_dataloader.dataset.pipeline):
        name = str(step['type']).rpartition('.')[2]
        if name == 'Resize':
            resize = step
        elif name == 'Pad' and 'size' in step:
            pad = step
        elif name not in READ:
            raise NotWhole(f'the step {name} of the test pipeline {UNKNOWN}')
    if not isinstance(resize.get('scale'), list) or pad.get('size_divisor'):
        raise NotWhole(f'a test pipeline without Resize(scale=(width, height)) {UNKNOWN}')
    given = model.data_preprocessor
    normal = getattr(given, '_enable_normalize', False)
    test = plain(head.test_cfg)
    nms = test.get('nms') or {}
    if nms.get('type', 'nms') != 'nms' or not {'nms_pre', 'max_per_img'} <= test.keys():
        raise NotWhole(f'the choice of boxes {test} {UNKNOWN}')
    value = pad.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, dict) else value
    if isinstance(value, list) and len(set(value)) > 1:
        raise NotWhole(f'padding by {value} {UNKNOWN}')
    return Plan(
        scale=tuple(resize['scale']),
        keep_ratio=bool(resize.get('keep_ratio', False)),
        canvas=tuple(pad['size']) if pad else None,
        canvas_value=float(value[0] if isinstance(value, list) else value),
        divisor=given.pad_size_divisor,
        divisor_value=float(given.pad_value),
        mean=tuple(given.mean.flatten().tolist()) if normal else (),
        std=tuple(given.std.flatten().tolist()) if normal else (),
        reverse=not given._channel_conversion,
        score_threshold=float(test.get('score_thr', 0)),
        per_level=int(test['nms_pre']),
        overlap=float(nms.get('iou_threshold', 0.5)),
        most=int(test['max_per_img']),
        smallest=float(test.get('min_bbox_size', -1)),
        by_class=not nms.get('class_agnostic', False),
    )
