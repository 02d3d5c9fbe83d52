"""Evaluation: COCO metrics, cost and speed of detectors, side by side."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.evaluator.metric import _to_cpu
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from rich.table import Table
from torch import nn

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.console.text import Printed, some
from asr_downstream.detection.evaluation.scores import KINDS, Scores, score
from asr_downstream.errors import DataError
from asr_downstream.measure import cost
from asr_downstream.measure.timing import paired_times
from asr_downstream.modules.copies import copy_of

__all__ = ['Detections', 'Evaluation', 'Seen', 'detect', 'evaluate', 'gmacs', 'measure_latency', 'metric']

# Boxes (n, 4) as x1, y1, x2, y2 in pixels, scores (n,), labels (n,).
Detections: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MEETING = 16  # batches of a process between two meetings: images take different times

METRICS = {'AP': 'mAP', 'AP50': 'mAP_50', 'AP75': 'mAP_75', 'APs': 'mAP_s', 'APm': 'mAP_m', 'APl': 'mAP_l'}


class Seen(NamedTuple):
    """An image that was tested: its file, the masks ``(n, H, W)`` that were found, if any, and what is annotated."""

    path: Path
    masks: torch.Tensor | None
    truth: Detections | None = None


@dataclass(repr=False)
class Evaluation(Printed):
    """Detections and metrics of one detector on one data set.

    Attributes:
        name: column head.
        metrics: see `asr_downstream.detection.evaluation.scores.Scores.summary`; of another evaluator, under its names.
        detections: by image id.
        parameters: number of parameters.
        gmacs: multiply-adds of convolutions and matrix products for one image, in units of 1e9.
        latency_ms: median time for one image.
        classes: AP by class.
        seen: of the first images, what a picture needs.
    """

    name: str
    metrics: dict[str, float]
    detections: dict[Any, Detections] = field(repr=False)
    parameters: int
    gmacs: float
    latency_ms: float = float('nan')
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    seen: dict[Any, Seen] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        sizes = {'parameters': self.parameters, 'gmacs': self.gmacs, 'latency_ms': self.latency_ms}
        return {**self.metrics, **sizes, 'classes': self.classes}

    def parts(self) -> list[Table | str]:
        table = Table('', self.name, title=f'{len(self.detections)} images')
        table.columns[1].justify = 'right'
        for name, value in self.metrics.items():
            table.add_row(name, metric(value))
        table.add_row('parameters', f'{self.parameters:,}')
        table.add_row('GMACs', f'{self.gmacs:.3f}')
        if not isnan(self.latency_ms):
            table.add_row('median latency, ms', f'{self.latency_ms:.1f}')
        return [table]


def metric(value: float) -> str:
    """Format an AP, which mmdet rounds to three digits; -1 means that the set has no such boxes."""
    return f'{value:.3f}' if value >= 0 else 'none'


@torch.no_grad()
def evaluate(
    config: Config, model: nn.Module, name: str, fast: bool = False, pictures: int = 0, processes: Processes = ALONE
) -> Evaluation:
    """Run ``model`` over the test set of ``config``, score it with the config's evaluator, and count what it costs.

    Args:
        config: with a test set and its evaluator. COCO metrics are scored by
            `asr_downstream.detection.evaluation.scores.score`; what other evaluators give is kept under its own names.
        model: a detector.
        name: column head.
        fast: score with faster-coco-eval instead of pycocotools.
        pictures: number of images to keep for pictures.
        processes: share the batches; all of them call this, and have the metrics.

    Raises:
        DataError: see `detect`.
    """
    scores, detections, seen = detect(config, model, name, fast, pictures, processes)
    result = described(model, name, scores.summary, detections, first_image(config))
    result.classes, result.seen = scores.classes, seen
    return result


@torch.no_grad()
def detect(
    config: Config, model: nn.Module, name: str, fast: bool = False, pictures: int = 0, processes: Processes = ALONE
) -> tuple[Scores, dict[Any, Detections], dict[Any, Seen]]:
    """Run ``model`` over the test set of ``config`` and score it; arguments as of `evaluate`.

    Returns:
        The scores; and on the first process the detections by image id, and of the first images what a picture needs.

    Raises:
        DataError: the config has no test set or evaluator, or ``fast`` is asked of metrics that are not COCO's.
    """
    if not config.get('test_dataloader') or not config.get('test_evaluator'):
        raise DataError(f'{config.filename}: has no test_dataloader and test_evaluator')
    MMLogger.get_current_instance().setLevel('WARNING')
    model.eval()
    model.to(get_device())
    with redirect_stdout(io.StringIO()):  # pycocotools prints
        loader, batches = own_batches(config.test_dataloader, processes)
        evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    if fast and not is_coco(evaluator):
        given = type(evaluator.metrics[0]).__name__
        raise DataError(f'--fast is for COCO metrics of boxes and masks, not for {given}')
    left = pictures

    def test(batch: Any) -> Tested:
        nonlocal left
        samples = model.test_step(batch)  # type: ignore[operator]
        evaluator.process(data_samples=samples, data_batch=batch)
        tested = Tested([taken(metric) for metric in evaluator.metrics], {}, {})
        for sample in samples:
            found = sample.pred_instances
            tested.detections[sample.img_id] = (found.bboxes.cpu(), found.scores.cpu(), found.labels.cpu())
            if left > 0:
                tested.seen[sample.img_id] = Seen(
                    Path(sample.img_path), found.masks.cpu() if 'masks' in found else None
                )
                left -= 1
        return tested

    detections: dict[Any, Detections] = {}
    seen: dict[Any, Seen] = {}
    for tested in processes.shared(test, loader, batches, f'testing {name}', MEETING):
        for metric, results in zip(evaluator.metrics, tested.results, strict=True):
            metric.results += results
        detections |= tested.detections
        seen |= tested.seen
    seen = dict(list(seen.items())[:pictures])
    truths = annotated(loader.dataset, seen)
    seen = {image: shown._replace(truth=truths.get(image)) for image, shown in seen.items()}
    return processes.first(lambda: scored(evaluator, len(loader.dataset), fast)), detections, seen


class Tested(NamedTuple):
    """What a batch leaves: the results of each metric, the detections by image id, and what pictures need."""

    results: list[list[Any]]
    detections: dict[Any, Detections]
    seen: dict[Any, Seen]


def taken(metric: Any) -> list[Any]:
    """Results that a metric has gathered, on the CPU; it is left without."""
    results, metric.results = _to_cpu(metric.results), []
    return results


def own_batches(settings: Any, processes: Processes) -> tuple[Any, int]:
    """Loader of the test batches of this process, and the number of batches of all.

    Batches are those of one process, and no image is in two, as MMEngine's sampler would fill up the last round.

    Raises:
        DataError: the config samples its images in another way than in their order.
    """
    if processes.count == 1:
        loader = Runner.build_dataloader(settings)
        return loader, len(loader)
    loader = Runner.build_dataloader({**settings, 'num_workers': 0, 'persistent_workers': False})
    if type(loader.sampler) is not DefaultSampler or loader.sampler.shuffle or settings.get('batch_sampler'):
        raise DataError(
            'several processes test images in the order of the set: use sampler=dict(type="DefaultSampler", '
            'shuffle=False) and no batch_sampler in test_dataloader'
        )
    size, count = settings.get('batch_size', 1), len(loader.dataset)
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    if settings.get('drop_last'):
        batches = batches[: count // size]
    own = {key: value for key, value in settings.items() if key not in ('batch_size', 'drop_last', 'sampler')}
    own |= {'dataset': loader.dataset, 'sampler': None, 'batch_sampler': processes.own(batches)}
    return Runner.build_dataloader(own), len(batches)


def annotated(dataset: Any, images: Collection[Any]) -> dict[Any, Detections]:
    """Boxes that a data set of MMDetection has for the images of these ids, as detections of score 1."""
    found: dict[Any, Detections] = {}
    if hasattr(dataset, 'coco') and not dataset.coco.anns:  # a test set
        return found
    for index in range(len(dataset)) if hasattr(dataset, 'get_data_info') else ():
        if len(found) == len(images):
            break
        info = dataset.get_data_info(index)
        if info.get('img_id') in images and 'instances' in info:
            boxes = torch.tensor([i['bbox'] for i in info['instances']], dtype=torch.float32).reshape(-1, 4)
            labels = torch.tensor([i['bbox_label'] for i in info['instances']], dtype=torch.long)
            found[info['img_id']] = boxes, torch.ones(len(boxes)), labels
    return found


def scored(evaluator: Evaluator, images: int, fast: bool) -> Scores:
    """Score what an evaluator has gathered; ``fast`` counts for COCO metrics only, and ``format_only`` gives no scores.

    Raises:
        DataError: the evaluator asks for something that the model does not find.
    """
    metric: Any = evaluator.metrics[0]
    if getattr(metric, 'format_only', False):  # its detections are written and not scored
        with redirect_stdout(io.StringIO()):
            computed(evaluator, images)
        return Scores({}, {})
    if not is_coco(evaluator):
        with redirect_stdout(io.StringIO()):
            numbers = computed(evaluator, images)
        return Scores({key.rpartition('/')[2]: float(value) for key, value in numbers.items()}, {})
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        metric.format_only, metric.outfile_prefix = True, f'{folder}/found'
        computed(evaluator, images)
        files = {kind: Path(f'{folder}/found.{kind}.json') for kind in metric.metrics}
        missing = [kind for kind, file in files.items() if not file.is_file()]
        if missing:
            raise DataError(f'the evaluator asks for {", ".join(missing)}, but the model finds no such thing')
        found = {kind: json.loads(file.read_bytes()) for kind, file in files.items()}
    classes, limits = evaluator.dataset_meta['classes'], metric.proposal_nums
    return score(metric._coco_api.dataset, found, classes, metric.img_ids, fast, limits)


def computed(evaluator: Evaluator, images: int) -> dict[str, float]:
    """``evaluator.evaluate`` of results that are all here; MMEngine's own waits for every process of a launch.

    Raises:
        DataError: a metric has its own way to gather.
    """
    if Processes.of_launch().count == 1:
        return evaluator.evaluate(images)
    found: dict[str, float] = {}
    for metric in evaluator.metrics:
        if type(metric).evaluate is not BaseMetric.evaluate:
            raise DataError(f'{type(metric).__name__} gathers results in its own way: test in one process')
        start = f'{metric.prefix}/' if metric.prefix else ''
        found |= {start + key: value for key, value in metric.compute_metrics(metric.results[:images]).items()}
        metric.results.clear()
    return found


def is_coco(evaluator: Evaluator) -> bool:
    """Whether an evaluator is MMDetection's CocoMetric with the thresholds of COCO, and nothing else."""
    metric: Any = evaluator.metrics[0]
    if len(evaluator.metrics) > 1 or type(metric) is not CocoMetric or not set(metric.metrics) <= set(KINDS):
        return False
    usual = np.allclose(metric.iou_thrs, np.linspace(0.5, 0.95, 10)) if len(metric.iou_thrs) == 10 else False
    return usual and len(metric.proposal_nums) == 3 and 100 in metric.proposal_nums


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
    """Multiply-adds of inference on a batch of one image, see `asr_downstream.measure.cost.gmacs`.

    NaN, with a warning, where the counter cannot follow a model.
    """
    counted = copy_of(model).requires_grad_(False)
    try:
        return cost.gmacs(lambda: counted.test_step(image))
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
