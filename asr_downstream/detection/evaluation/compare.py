"""A detector beside its folded copy: metrics, cost, speed, and how far their detections differ."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.console.text import Printed
from asr_downstream.detection.evaluation.evaluate import (
    Detections,
    Evaluation,
    evaluate,
    first_image,
    measure_latency,
    metric,
)
from asr_downstream.measure.timing import ratio

__all__ = ['Comparison', 'Differences', 'compare', 'differences']


TIED = 1e-5  # difference of scores that rounding makes
MOVED = 0.1  # px that rounding does not make
RARE = 0.05  # part of all detections that may be exchanged where no tie is seen


class Differences(NamedTuple):
    """How far the detections of two detectors differ.

    Attributes:
        boxes_px, scores: largest differences over the images whose detections correspond one to one.
        unmatched: images where the number of detections of some class differs.
        images: images compared.
        pairs: detections of the one that have their counterpart; of 0 nothing was compared.
        tied: detections in whose place another of the same score is, whose boxes are not compared.
    """

    boxes_px: float
    scores: float
    unmatched: int
    images: int
    pairs: int
    tied: int = 0


@dataclass(repr=False)
class Comparison(Printed):
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

    def parts(self) -> list[Table | str]:
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
        table.add_row('detections compared', '', '', f'{self.difference.pairs:,}')
        table.add_row('boxes, px', '', '', f'{self.difference.boxes_px:.1e}')
        table.add_row('scores', '', '', f'{self.difference.scores:.1e}')
        table.add_row('detections exchanged at tied scores', '', '', str(self.difference.tied))
        table.add_row('images with other detections', '', '', str(self.difference.unmatched))
        return [table]


def compare(
    config: Config,
    plugged: nn.Module,
    folded: nn.Module,
    fast: bool = False,
    pictures: int = 0,
    processes: Processes = ALONE,
) -> Comparison:
    """Evaluate a plugged detector and its folded copy on the test set of ``config``, and compare their detections.

    ``fast``, ``pictures`` and ``processes``: see `asr_downstream.detection.evaluation.evaluate.evaluate`. The
    detections are compared on the first process.
    """
    arms = ((plugged, 'unfolded'), (folded, 'folded'))
    a, b = (evaluate(config, model, name, fast, pictures, processes) for model, name in arms)
    image = first_image(config)
    times = processes.first(lambda: measure_latency({a.name: plugged, b.name: folded}, image))
    for arm in (a, b):
        arm.latency_ms = median(times[arm.name])
    slower = ratio(times[b.name], times[a.name]).median
    return Comparison(a, b, differences(a.detections, b.detections), slower)


def differences(a: dict[Any, Detections], b: dict[Any, Detections]) -> Differences:
    """Compare the detections of two detectors, image by image.

    Detections of one class are paired by the nearest boxes, since rounding may swap two whose scores are equal. It also
    decides which of two candidates with equal scores is kept, by NMS or at the end of the list; such a pair is counted,
    and its boxes are not compared: where another detection of the image has the score too, or else where the
    boxes overlap as those of one object do, unless so many boxes have moved that this is no coincidence.
    """
    boxes = scores = hidden_px = 0.0
    unmatched = pairs = tied = hidden = 0
    for image, (boxes_a, scores_a, labels_a) in a.items():
        boxes_b, scores_b, labels_b = b[image]
        if not torch.equal(labels_a.sort().values, labels_b.sort().values):
            unmatched += 1
            continue
        for label in labels_a.unique():
            in_a, in_b = (labels == label for labels in (labels_a, labels_b))
            apart = torch.cdist(boxes_a[in_a], boxes_b[in_b], p=torch.inf)  # (n, n) px
            rows, columns = linear_sum_assignment(apart)
            px = apart[rows, columns]
            own, other = scores_a[in_a][rows], scores_b[in_b][columns]
            scores = max(scores, float((own - other).abs().max()))
            level = ((own - other).abs() <= TIED) & (px > MOVED)
            seen = level & (count_of(own, scores_a) + count_of(other, scores_b) > 2)
            overlap = bbox_overlaps(boxes_a[in_a][rows], boxes_b[in_b][columns], is_aligned=True)
            unseen = level & ~seen & (overlap >= 0.5)
            boxes = max([boxes, *px[~seen & ~unseen].tolist()])
            hidden_px = max([hidden_px, *px[unseen].tolist()])
            pairs, tied, hidden = pairs + len(px), tied + int(seen.sum()), hidden + int(unseen.sum())
    if hidden > RARE * pairs:
        boxes, hidden = max(boxes, hidden_px), 0
    return Differences(boxes, scores, unmatched, len(a), pairs, tied + hidden)


def count_of(scores: Tensor, among: Tensor) -> Tensor:
    """How many of ``among`` tie with each of ``scores``."""
    return ((scores[:, None] - among[None]).abs() <= TIED).sum(dim=1)
