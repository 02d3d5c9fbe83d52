"""Pictures of detections: one row an image, one column an arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from asr_downstream.detection.evaluation import Detections
from asr_downstream.files import write_atomically

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

__all__ = ['draw_detections']

PALETTE = plt.get_cmap('tab10').colors  # type: ignore[attr-defined]


def draw_detections(
    out: Path,
    images: dict[Any, Path],
    arms: dict[str, dict[Any, Detections]],
    classes: Sequence[str],
    threshold: float = 0.4,
    captions: dict[str, str] | None = None,
) -> None:
    """Write a PNG grid of detections.

    Args:
        out: file to write.
        images: image id -> file; one row each.
        arms: column head -> image id -> boxes ``(n, 4)`` as x1, y1, x2, y2 in pixels, scores ``(n,)``, labels ``(n,)``.
        classes: names of the labels.
        threshold: smallest score that is drawn.
        captions: second line of a column head.
    """
    figure, axes = plt.subplots(
        len(images), len(arms), figsize=(2.6 * len(arms), 2.6 * len(images) + 0.5), squeeze=False, layout='constrained'
    )
    for row, (image, path) in zip(axes, images.items(), strict=True):
        picture = Image.open(path).convert('RGB')
        for axis, detections in zip(row, arms.values(), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            draw(axis, detections[image], classes, threshold)
    for axis, name in zip(axes[0], arms, strict=True):
        axis.set_title('\n'.join(filter(None, [name, (captions or {}).get(name, '')])), fontsize=10)
    write_atomically(out, lambda p: figure.savefig(p, dpi=100, format='png'))
    plt.close(figure)


def draw(axis: Axes, detections: Detections, classes: Sequence[str], threshold: float) -> None:
    """Draw the boxes of one image."""
    for box, score, label in zip(*detections, strict=True):
        if score < threshold:
            continue
        x1, y1, x2, y2 = box.tolist()
        colour = PALETTE[int(label) % len(PALETTE)]
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
        text = classes[int(label)] if score >= 0.9995 else f'{classes[int(label)]} {score:.2f}'
        axis.text(
            x1, y1 - 1, text, fontsize=7, color='white', va='bottom', clip_on=True,
            bbox={'facecolor': colour, 'edgecolor': 'none', 'pad': 0.6},
        )  # fmt: skip
