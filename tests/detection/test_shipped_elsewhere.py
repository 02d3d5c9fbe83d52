"""Folded detectors in programs that others wrote: they are stock, so these know nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.det
pytest.importorskip('mmdet')

from helpers import exports
from helpers.tiny_detection import pictures
from mmdet.apis import DetInferencer, inference_detector, init_detector
from PIL import Image


@pytest.fixture(scope='module')
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folded detector, and a picture."""
    folder = tmp_path_factory.mktemp('interop')
    data = pictures(folder)
    return exports.detector(folder, data), next(path for path in sorted(data.rglob('*.png')) if 'val' in path.parts)


def found(shipped: tuple[Path, Path]) -> Any:
    file, image = shipped
    model = init_detector(str(file.with_suffix('.py')), str(file), device='cpu')
    return model, inference_detector(model, str(image)).pred_instances


def test_the_inferencer_of_mmdetection_finds_the_same(shipped: tuple[Path, Path]) -> None:
    file, image = shipped
    inferencer = DetInferencer(str(file.with_suffix('.py')), str(file), device='cpu', show_progress=False)
    (given,) = inferencer(str(image), no_save_vis=True, no_save_pred=True)['predictions']
    theirs = found(shipped)[1]
    assert len(given['scores']) == len(theirs) > 0
    assert np.allclose(given['scores'], theirs.scores, atol=1e-6)
    assert np.allclose(given['bboxes'], theirs.bboxes, atol=1e-4)


def test_compiled_feature_maps_are_the_same(shipped: tuple[Path, Path]) -> None:
    model, _ = found(shipped)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(model.extract_feat, backend='aot_eager', fullgraph=True)(x)
        for ours, theirs in zip(compiled, model.extract_feat(x), strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_supervision_reads_the_detections(shipped: tuple[Path, Path]) -> None:
    supervision = pytest.importorskip('supervision')
    model, theirs = found(shipped)
    given = supervision.Detections.from_mmdetection(inference_detector(model, str(shipped[1])))
    assert np.array_equal(given.xyxy, theirs.bboxes.numpy())
    assert np.array_equal(given.class_id, theirs.labels.numpy())
    picture = np.asarray(Image.open(shipped[1]).convert('RGB'))
    assert supervision.BoxAnnotator().annotate(picture.copy(), given).shape == picture.shape
