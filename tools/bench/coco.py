"""Scoring speed: faster-coco-eval against pycocotools, on detections that are made up for a set of the size of COCO."""

from __future__ import annotations

from typing import Any

import numpy as np

from asr_downstream.detection.evaluation.scores import score
from asr_downstream.measure.timing import Ratio, paired_times, ratio

__all__ = ['fake_set', 'measure_scoring']


def fake_set(
    images: int = 5000, per_image: int = 20, classes: int = 80, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make a truth of 1 to 14 boxes an image, and detections of which half lie near a true box.

    Returns:
        The content of a COCO annotation file and of a COCO result file.
    """
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in range(images):
        own = []
        for _ in range(int(rng.integers(1, 15))):
            w, h = rng.uniform(8, 300, 2)
            x, y = rng.uniform(0, 640 - w), rng.uniform(0, 480 - h)
            own.append((int(rng.integers(1, classes + 1)), [x, y, w, h]))
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image,
                    'category_id': own[-1][0],
                    'bbox': own[-1][1],
                    'area': w * h,
                    'iscrowd': int(rng.random() < 0.02),
                }
            )
        for number in range(per_image):
            label, box = own[int(rng.integers(len(own)))]
            near = number % 2 == 0
            found = (np.array(box) + rng.normal(0, 8, 4)).clip(1)
            if not near:
                found = rng.uniform([0, 0, 8, 8], [300, 200, 300, 200])
                label = int(rng.integers(1, classes + 1))
            entry = {'image_id': image, 'category_id': label, 'bbox': found.tolist()}
            detections.append({**entry, 'score': float(rng.random())})
    truth = {
        'images': [{'id': i, 'width': 640, 'height': 480, 'file_name': f'{i}.jpg'} for i in range(images)],
        'annotations': annotations,
        'categories': [{'id': c, 'name': str(c)} for c in range(1, classes + 1)],
    }
    return truth, detections


def measure_scoring(rounds: int, images: int = 5000, per_image: int = 20) -> tuple[Ratio, dict[str, Any]]:
    """Time both tools in paired rounds.

    Returns:
        How many times faster the fast one is, and the facts.

    Raises:
        AssertionError: the numbers differ.
    """
    truth, detections = fake_set(images, per_image)
    reference, fast = (score(truth, {'bbox': detections}, fast=f) for f in (False, True))
    assert reference == fast, 'faster-coco-eval gives other numbers than pycocotools'
    calls = {f: (lambda f=f: score(truth, {'bbox': detections}, fast=f)) for f in (False, True)}
    times = paired_times({str(f): call for f, call in calls.items()}, rounds, 'scoring', warmup=0)
    found = ratio(times['False'], times['True'])
    return found, {'images': images, 'detections': len(detections), 'faster': found, 'summary': reference.summary}
