"""Pictures of detections: one row an image, one column an arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from asr_downstream.console.progress import bar
from asr_downstream.detection.evaluation.evaluate import Detections, Evaluation
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import write_atomically

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

__all__ = ['draw_detections', 'show_each']

PALETTE = plt.get_cmap('tab10').colors  # type: ignore[attr-defined]


def draw_detections(
    out: Path,
    images: dict[Any, Path],
    arms: dict[str, dict[Any, Detections]],
    classes: Sequence[str],
    threshold: float = 0.4,
    captions: dict[str, str] | None = None,
    masks: dict[str, dict[Any, Tensor]] | None = None,
    width: float = 2.6,
) -> None:
    """Write a PNG grid of detections.

    Args:
        out: file to write.
        images: image id -> file; one row each.
        arms: column head -> image id -> boxes ``(n, 4)`` as x1, y1, x2, y2 in pixels, scores ``(n,)``, labels ``(n,)``.
        classes: names of the labels.
        threshold: smallest score that is drawn.
        captions: second line of a column head.
        masks: column head -> image id -> masks ``(n, H, W)`` of the detections.
        width: of a column, in inches of 100 pixels.
    """
    pictures = {image: Image.open(path).convert('RGB') for image, path in images.items()}
    heights = [width * picture.height / picture.width for picture in pictures.values()]
    figure, axes = plt.subplots(
        len(images), len(arms), figsize=(width * len(arms), sum(heights) + 0.5), squeeze=False, layout='constrained',
        height_ratios=heights,
    )  # fmt: skip
    for row, (image, picture) in zip(axes, pictures.items(), strict=True):
        for axis, (name, detections) in zip(row, arms.items(), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            draw(axis, detections[image], classes, threshold, (masks or {}).get(name, {}).get(image))
    for axis, name in zip(axes[0], arms, strict=True):
        axis.set_title('\n'.join(filter(None, [name, (captions or {}).get(name, '')])), fontsize=10)
    write_atomically(out, lambda p: figure.savefig(p, dpi=100, format='png'))
    plt.close(figure)


def show_each(
    folder: Path, evaluations: Sequence[Evaluation], classes: Sequence[str], threshold: float = 0.3
) -> list[Path]:
    """Write a picture for each image that the evaluations have kept: the ground truth, and a column for each of them.

    Returns:
        The files, named as the images are; with their id in front where several have one name.

    Raises:
        DataError: the folder is that of the images.
    """
    written = []
    shown = evaluations[0].seen
    stems = Counter(seen.path.stem for seen in shown.values())
    for image, seen in bar(list(shown.items()), 'pictures'):
        name = seen.path.stem if stems[seen.path.stem] == 1 else f'{image}-{seen.path.stem}'
        out = folder / f'{name}.png'
        if out.resolve() == seen.path.resolve():
            raise DataError(f'{out}: is an image of the data set; give another folder')
        truth = {} if seen.truth is None else {'ground truth': {image: seen.truth}}
        arms = truth | {e.name: {image: e.detections[image]} for e in evaluations}
        masks = {e.name: {image: m} for e in evaluations if (m := e.seen[image].masks) is not None}
        draw_detections(out, {image: seen.path}, arms, classes, threshold, masks=masks, width=6.4)
        written.append(out)
    return written


def draw(
    axis: Axes, detections: Detections, classes: Sequence[str], threshold: float, masks: Tensor | None = None
) -> None:
    """Draw the boxes, and masks if there are any, of one image."""
    for number, (box, score, label) in enumerate(zip(*detections, strict=True)):
        if score < threshold:
            continue
        x1, y1, x2, y2 = box.tolist()
        colour = PALETTE[int(label) % len(PALETTE)]
        if masks is not None:
            inside = masks[number].numpy().astype(bool)
            axis.imshow(np.dstack([np.broadcast_to(c, inside.shape) for c in colour] + [inside * 0.45]))
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        text = classes[int(label)] if score >= 0.9995 else f'{classes[int(label)]} {score:.2f}'
        axis.text(
            x1, y1 - 1, text, fontsize=7, color='white', va='bottom', clip_on=True,
            bbox={'facecolor': colour, 'edgecolor': 'none', 'pad': 0.6},
        )  # fmt: skip
