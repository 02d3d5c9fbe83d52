"""Detections beside detections: ties that fall the other way are no difference, and pictures show the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, randomise
from helpers.detsets import tiny_set
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(60)]

from asr_downstream.detection.config import load_config
from asr_downstream.detection.evaluation.compare import differences
from asr_downstream.detection.evaluation.evaluate import Detections, evaluate
from asr_downstream.detection.evaluation.pictures import show_each
from asr_downstream.detection.models.detectors import build_detector

DIGITS = ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
TEN = tuple('0123456789')


def found(boxes: list[list[float]], scores: list[float], labels: list[int] | None = None) -> dict[int, Detections]:
    return {1: (torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels or [0] * len(boxes)))}


A, B, FAR = [10.0, 10, 50, 50], [12.0, 13, 59.5, 52], [90.0, 90, 120, 120]
SURE = [[200.0 + 9 * n, 200, 240 + 9 * n, 240] for n in range(30)]
SCORES = [0.99 - 0.01 * n for n in range(30)]


def test_a_tie_that_falls_the_other_way_is_no_difference() -> None:
    """Two boxes of one object with the same score: which of them NMS keeps, rounding decides."""
    result = differences(found([*SURE, A], [*SCORES, 0.4]), found([*SURE, B], [*SCORES, 0.4 + 1e-7]))
    assert result.boxes_px == 0.0
    assert result.scores < 1e-6
    assert (result.tied, result.unmatched) == (1, 0)


def test_a_tie_at_the_end_of_the_list_is_no_difference() -> None:
    """The last of the detections that are kept: others with its score were cut off."""
    result = differences(
        found([*SURE, A, FAR], [*SCORES, 0.05, 0.05]), found([*SURE, A, B], [*SCORES, 0.05, 0.05])
    )  # fmt: skip
    assert result.boxes_px == 0.0
    assert (result.tied, result.unmatched) == (1, 0)


def test_classes_that_tie_may_change_places() -> None:
    result = differences(
        found([*SURE, A, FAR], [*SCORES, 0.3, 0.3], [0] * 30 + [1, 2]),
        found([*SURE, A, FAR], [*SCORES, 0.3, 0.3], [0] * 30 + [2, 1]),
    )
    assert result.boxes_px == 0.0
    assert (result.tied, result.unmatched) == (2, 0)


def test_boxes_that_moved_are_a_difference() -> None:
    """Controls: another score, no overlap and no tie, or all boxes of an image."""
    assert differences(found([*SURE, A], [*SCORES, 0.4]), found([*SURE, B], [*SCORES, 0.41])).boxes_px == 9.5
    assert differences(found([*SURE, A], [*SCORES, 0.4]), found([*SURE, FAR], [*SCORES, 0.4])).boxes_px == 80
    moved = [[value + 3 for value in box] for box in SURE]
    assert differences(found(SURE, SCORES), found(moved, SCORES)).boxes_px == 3
    assert differences(found([A], [0.4]), found([A, B], [0.4, 0.4])).unmatched == 1


def test_pictures_show_the_ground_truth(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', classes=TEN)
    for path in (root / 'images').glob('*.png'):
        Image.new('RGB', (64, 48), 'white').save(path)
    config = load_config(DIGITS, root, {'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False})
    result = evaluate(config, randomise(build_detector(config)), 'detector', pictures=2)
    boxes, scores, labels = result.seen[1].truth
    assert boxes.tolist() == [[4, 5, 24, 21], [5, 5, 25, 21]]
    assert (scores.tolist(), labels.tolist()) == ([1, 1], [0, 1])
    result.detections = {image: (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)) for image in result.detections}
    written = show_each(tmp_path / 'out', [result], list(TEN))
    assert len(written) == 2
    left, right = np.array_split(np.asarray(Image.open(written[0]).convert('RGB')).astype(int), 2, axis=1)
    coloured = [int((np.ptp(half[40:], axis=2) > 60).sum()) for half in (left, right)]
    assert coloured[0] > 100, 'boxes of the truth, in the first column'
    assert coloured[1] == 0, 'nothing was detected'
