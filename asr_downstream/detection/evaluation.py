"""Evaluation: COCO metrics, cost and speed of detectors, side by side."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import nn

from asr_downstream import cost
from asr_downstream.description import render
from asr_downstream.errors import DataError
from asr_downstream.progress import bar
from asr_downstream.sites import some
from asr_downstream.timing import paired_times, ratio

__all__ = [
    'Comparison',
    'Evaluation',
    'compare',
    'evaluate',
    'gmacs',
    'measure_latency',
    'work_dir_of',
]

# Boxes (n, 4) as x1, y1, x2, y2 in pixels, scores (n,), labels (n,).
Detections: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

METRICS = {'AP': 'mAP', 'AP50': 'mAP_50', 'AP75': 'mAP_75', 'APs': 'mAP_s', 'APm': 'mAP_m', 'APl': 'mAP_l'}


@dataclass
class Evaluation:
    """Detections and metrics of one detector on one data set.

    Attributes:
        name: column head.
        metrics: AP, AP50, AP75, APs, APm, APl of boxes in [0, 1]; -1 where the set has no such boxes. With masks also
            ``segm_AP`` and so on.
        detections: by image id.
        parameters: number of parameters.
        gmacs: multiply-adds of convolutions and matrix products for one image, in units of 1e9.
        latency_ms: median time for one image.
    """

    name: str
    metrics: dict[str, float]
    detections: dict[Any, Detections] = field(repr=False)
    parameters: int
    gmacs: float
    latency_ms: float = float('nan')

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**self.metrics, 'parameters': self.parameters, 'gmacs': self.gmacs, 'latency_ms': self.latency_ms}

    def __str__(self) -> str:
        table = Table('', self.name, title=f'{len(self.detections)} images')
        table.columns[1].justify = 'right'
        for name, value in self.metrics.items():
            table.add_row(name, metric(value))
        table.add_row('parameters', f'{self.parameters:,}')
        table.add_row('GMACs', f'{self.gmacs:.3f}')
        table.add_row('median latency, ms', f'{self.latency_ms:.1f}')
        return render(table)


class Differences(NamedTuple):
    """How far the detections of two detectors differ.

    Attributes:
        boxes_px, scores: largest differences over the images whose detections correspond one to one.
        unmatched: images where the number of detections of some class differs.
        images: images compared.
    """

    boxes_px: float
    scores: float
    unmatched: int
    images: int


@dataclass
class Comparison:
    """Two evaluations, the difference of their detections, and the median of folded over unfolded latency."""

    unfolded: Evaluation
    folded: Evaluation
    difference: Differences
    latency_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            **{arm.name: arm.as_dict() for arm in (self.unfolded, self.folded)},
            'difference': self.difference._asdict(),
            'latency_ratio': self.latency_ratio,
        }

    def __str__(self) -> str:
        a, b = self.unfolded, self.folded
        table = Table('', a.name, b.name, 'difference', title=f'{self.difference.images} images')
        for column in table.columns[1:]:
            column.justify = 'right'
        for name in a.metrics:
            x, y = a.metrics[name], b.metrics[name]
            table.add_row(name, metric(x), metric(y), f'{y - x:+.3f}' if x >= 0 else '')
        table.add_row('parameters', f'{a.parameters:,}', f'{b.parameters:,}', f'{b.parameters - a.parameters:+,}')
        table.add_row('GMACs', f'{a.gmacs:.3f}', f'{b.gmacs:.3f}', f'{b.gmacs - a.gmacs:+.3f}')
        table.add_row('median latency, ms', f'{a.latency_ms:.1f}', f'{b.latency_ms:.1f}', f'x {self.latency_ratio:.3f}')
        table.add_row('boxes, px', '', '', f'{self.difference.boxes_px:.1e}')
        table.add_row('scores', '', '', f'{self.difference.scores:.1e}')
        table.add_row('images with other detections', '', '', str(self.difference.unmatched))
        return render(table)


def metric(value: float) -> str:
    """Format an AP, which mmdet rounds to three digits; -1 means that the set has no such boxes."""
    return f'{value:.3f}' if value >= 0 else 'none'


@torch.no_grad()
def evaluate(config: Config, model: nn.Module, name: str) -> Evaluation:
    """Run ``model`` over the test set of ``config`` and score it with the config's evaluator (pycocotools).

    Raises:
        DataError: the config has no test set or evaluator.
    """
    if not config.get('test_dataloader') or not config.get('test_evaluator'):
        raise DataError(f'{config.filename}: has no test_dataloader and test_evaluator')
    MMLogger.get_current_instance().setLevel('WARNING')
    model.eval()
    model.to(get_device())
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        loader = Runner.build_dataloader(config.test_dataloader)
        evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    detections: dict[Any, Detections] = {}
    for batch in bar(loader, f'testing {name}'):
        samples = model.test_step(batch)  # type: ignore[operator]
        evaluator.process(data_samples=samples, data_batch=batch)
        for sample in samples:
            found = sample.pred_instances
            detections[sample.img_id] = (found.bboxes.cpu(), found.scores.cpu(), found.labels.cpu())
    with redirect_stdout(io.StringIO()):
        scores = evaluator.evaluate(len(loader.dataset))
    return described(model, name, metrics_of(scores), detections, first_image(config))


def described(
    model: nn.Module, name: str, metrics: dict[str, float], detections: dict[Any, Detections], image: dict[str, Any]
) -> Evaluation:
    """Add size and cost of ``model``, on a batch of one image, to its metrics."""
    return Evaluation(name, metrics, detections, sum(p.numel() for p in model.parameters()), gmacs(model, image))


def metrics_of(scores: dict[str, float]) -> dict[str, float]:
    """Rename mmdet's ``coco/bbox_mAP_50`` to ``AP50``, ``coco/segm_mAP`` to ``segm_AP``."""
    found = {}
    for kind, prefix in (('bbox', ''), ('segm', 'segm_')):
        for ours, theirs in METRICS.items():
            key = f'coco/{kind}_{theirs}'
            if key in scores:
                found[prefix + ours] = float(scores[key])
    if not found and scores:
        raise DataError(
            f'expected COCO metrics (coco/bbox_mAP, ...), the evaluator of the config gives {some(list(scores))}'
        )
    return found or dict.fromkeys(METRICS, 0.0)  # mmdet scores nothing where nothing was detected


@torch.no_grad()
def gmacs(model: nn.Module, image: dict[str, Any]) -> float:
    """Multiply-adds of inference on a batch of one image, see `asr_downstream.cost.gmacs`.

    NaN, with a warning, where the counter cannot follow a model.
    """
    counted = copy.deepcopy(model).requires_grad_(False)
    try:
        return cost.gmacs(lambda: counted.test_step(image))  # type: ignore[operator]
    except Exception as error:
        warnings.warn(f'the multiply-adds of {type(model).__name__} cannot be counted: {error}', stacklevel=2)
        return float('nan')


def first_image(config: Config) -> dict[str, Any]:
    """First image of the test set, as a batch of one."""
    single = {**config.test_dataloader, 'batch_size': 1, 'num_workers': 0, 'persistent_workers': False}
    with redirect_stdout(io.StringIO()):
        return next(iter(Runner.build_dataloader(single)))


def measure_latency(models: dict[str, Any], image: dict[str, Any], rounds: int = 15) -> dict[str, list[float]]:
    """Time ``test_step`` of several detectors on a batch of one image: milliseconds of each, one a paired round."""
    with torch.no_grad():
        calls = {name: partial(model.test_step, image) for name, model in models.items()}
        return paired_times(calls, rounds, 'latency')


def compare(config: Config, plugged: nn.Module, folded: nn.Module) -> Comparison:
    """Evaluate a plugged detector and its folded copy on the test set of ``config``, and compare their detections."""
    a, b = evaluate(config, plugged, 'unfolded'), evaluate(config, folded, 'folded')
    times = measure_latency({a.name: plugged, b.name: folded}, first_image(config))
    for arm in (a, b):
        arm.latency_ms = median(times[arm.name])
    slower = ratio(times[b.name], times[a.name]).median
    return Comparison(a, b, differences(a.detections, b.detections), slower)


def differences(a: dict[Any, Detections], b: dict[Any, Detections]) -> Differences:
    """Compare the detections of two detectors, image by image.

    Detections of one class are paired by the nearest boxes, since rounding may swap two whose scores are equal.
    """
    boxes = scores = 0.0
    unmatched = 0
    for image, (boxes_a, scores_a, labels_a) in a.items():
        boxes_b, scores_b, labels_b = b[image]
        if not torch.equal(labels_a.sort().values, labels_b.sort().values):
            unmatched += 1
            continue
        for label in labels_a.unique():
            in_a, in_b = (labels == label for labels in (labels_a, labels_b))
            apart = torch.cdist(boxes_a[in_a], boxes_b[in_b], p=torch.inf)  # (n, n) px
            rows, columns = linear_sum_assignment(apart)
            boxes = max(boxes, float(apart[rows, columns].max()))
            scores = max(scores, float((scores_a[in_a][rows] - scores_b[in_b][columns]).abs().max()))
    return Differences(boxes, scores, unmatched, len(a))


def work_dir_of(config: Config, given: Path | None) -> Path:
    """Folder for results: as given, as the config says, or ``work_dirs/<config>``."""
    return given or Path(config.get('work_dir') or Path('work_dirs') / Path(config.filename).stem)
