"""COCO scores of detections: pycocotools is the reference, faster-coco-eval gives the same numbers sooner."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr_downstream.errors import AsrError

__all__ = ['KINDS', 'NAMES', 'Scores', 'score']

# What is scored -> prefix of its names.
KINDS = {'bbox': '', 'segm': 'segm_'}
# Places in the summary of pycocotools. AP50 and AP75 and those by size: of all detections that are scored; AR: of the
# first 100 of an image, ARs, ARm, ARl of all.
NAMES = {'AP': 0, 'AP50': 1, 'AP75': 2, 'APs': 3, 'APm': 4, 'APl': 5, 'AR': 6, 'ARs': 9, 'ARm': 10, 'ARl': 11}
MAX_DETECTIONS = (100, 300, 1000)  # the default of MMDetection's CocoMetric


@dataclass(frozen=True)
class Scores:
    """Scores of one set of detections, in [0, 1] and rounded to three digits; -1 where the set has no such boxes.

    Attributes:
        summary: AP, AP50, AP75, APs, APm, APl, AR, ARs, ARm, ARl of boxes; of masks with the prefix ``segm_``.
        classes: name of the class -> AP of boxes, and with masks segm_AP.
    """

    summary: dict[str, float]
    classes: dict[str, dict[str, float]]


def score(
    truth: dict[str, Any],
    detections: dict[str, list[dict[str, Any]]],
    classes: Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
    fast: bool = False,
    max_detections: Sequence[int] = MAX_DETECTIONS,
) -> Scores:
    """Score detections.

    Args:
        truth: content of a COCO annotation file.
        detections: ``'bbox'`` and ``'segm'`` -> entries of a COCO result file.
        classes: names of the categories that count; default: all.
        images: ids of the images that count; default: all.
        fast: with faster-coco-eval.
        max_detections: three numbers of detections of an image that count, 100 among them.

    Raises:
        AsrError: faster-coco-eval is not installed.
    """
    dataset_class, evaluation_class = tools(fast)
    categories = {c['name']: c['id'] for c in truth['categories'] if classes is None or c['name'] in classes}
    with redirect_stdout(io.StringIO()):  # both print
        known = dataset_class()
        known.dataset = {**truth, 'annotations': [dict(a) for a in truth['annotations']]}  # they add to what they get
        known.createIndex()
    summary: dict[str, float] = {}
    of_class: dict[str, dict[str, float]] = {name: {} for name in categories}
    for kind, entries in detections.items():
        prefix = KINDS[kind]
        if not entries:  # neither tool takes an empty list
            summary.update({prefix + name: 0.0 for name in NAMES})
            for found in of_class.values():
                found[f'{prefix}AP'] = 0.0
            continue
        # Copies, for the same reason; the area of a mask is to be its own, not that of its box.
        entries = [{k: v for k, v in entry.items() if k != 'bbox' or kind == 'bbox'} for entry in entries]
        with redirect_stdout(io.StringIO()):
            evaluation = evaluation_class(known, known.loadRes(entries), kind)
            evaluation.params.catIds = list(categories.values())
            evaluation.params.imgIds = list(known.imgs if images is None else images)
            evaluation.params.maxDets = sorted(max_detections)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = np.asarray(evaluation.stats)
        places = {**NAMES, 'AR': NAMES['AR'] + sorted(max_detections).index(100)}
        summary.update({prefix + name: round(float(stats[place]), 3) for name, place in places.items()})
        precision = evaluation.eval['precision']  # (thresholds, recalls, classes, areas, detections)
        order = list(evaluation.params.catIds)
        for name, number in categories.items():
            own = precision[:, :, order.index(number), 0, -1]
            found = own[own > -1]
            of_class[name][f'{prefix}AP'] = round(float(found.mean()), 3) if found.size else -1.0
    return Scores(summary, of_class)


def tools(fast: bool) -> tuple[Any, Any]:
    """Classes of the data set and of the evaluation."""
    if not fast:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    try:
        module = importlib.import_module('faster_coco_eval')
    except ImportError as error:
        raise AsrError('--fast: faster-coco-eval is not installed; pip install faster-coco-eval') from error
    return module.COCO, module.COCOeval_faster
