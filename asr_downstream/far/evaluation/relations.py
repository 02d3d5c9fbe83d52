"""Who looks at whom, in numbers: token relations of a FAR family beside those of its teacher.

For every attention and what stands in for it: the similarity to the map of the teacher, and where a token looks: at
itself, at its eight neighbours in the image, and how far on average. Two controls are measured as well, see
`asr_downstream.far.evaluation.evaluate.compare_relations`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from asr_downstream.console.text import render
from asr_downstream.errors import AsrError
from asr_downstream.far.evaluation.evaluate import TEACHER, load_family, relation_maps, task_of
from asr_downstream.far.evaluation.token_relations import similarity
from asr_downstream.files.atomic import check_writable
from asr_downstream.folding.analysis.figures.base import MAP, figure
from asr_downstream.folding.analysis.suite import Job

__all__ = ['Looks', 'locality', 'relations']


@dataclass(frozen=True)
class Looks:
    """Where tokens look, mean over images and tokens; tokens outside of the image (class tokens) are left out.

    Attributes:
        itself: part that a token gives to itself.
        near: part that it gives to its neighbours in the image, up to eight.
        distance: mean distance to what it looks at, in tokens.
    """

    itself: float
    near: float
    distance: float


def locality(maps: Tensor) -> Looks:
    """Measure maps ``(B, N, N)``; the last tokens are a square image, row by row.

    What a token gives to tokens outside of the image is left out, and the rest scaled to sum to 1.
    """
    side = math.isqrt(maps.shape[-1])
    inside = maps[:, -side * side :, -side * side :].double()
    inside = inside / inside.sum(-1, keepdim=True)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij'), -1).flatten(0, 1)
    steps = (places[:, None] - places[None]).abs().to(inside.device)
    most = steps.amax(-1)
    return Looks(
        itself=float((inside * (most == 0)).sum(-1).mean()),
        near=float((inside * (most == 1)).sum(-1).mean()),
        distance=float((inside * steps.double().norm(dim=-1)).sum(-1).mean()),
    )


def relations(job: Job) -> str:
    """Measure and draw the token relations of families.

    Args:
        job: its runs are folders that `tools/distill_far.py` has written.

    Returns:
        Tables.

    Raises:
        AsrError: a folder has no family, or its data are not there.
    """
    check_writable(job.out)
    texts, content = [], {}
    for name, folder in job.runs.items():
        if not (folder / 'shipped').is_dir():
            raise AsrError(f'{folder}: has no shipped models; relations are of what tools/distill_far.py wrote')
        models = load_family(folder)
        task = task_of(folder, models[TEACHER], job.wanted.data)
        maps = relation_maps(models, task, job.wanted.images)
        looks = {model: {layer: locality(found) for layer, found in layers.items()} for model, layers in maps.items()}
        alike = {
            model: {layer: similarity(found, maps[TEACHER][layer]) for layer, found in layers.items()}
            for model, layers in maps.items()
        }
        content[name] = {
            model: {layer: {'similarity': alike[model][layer], **asdict(look)} for layer, look in layers.items()}
            for model, layers in looks.items()
        }
        draw(job.path(name, 'relations'), maps, looks)
        texts.append(table(name, alike, looks))
    job.write('relations', content)
    return '\n'.join(texts)


def table(name: str, alike: Mapping[str, Mapping[str, float]], looks: Mapping[str, Mapping[str, Looks]]) -> str:
    """One row a model, means over its attentions."""
    out = Table('model', title=f'{name}: token relations, mean over attentions, images and tokens')
    for head in ('similarity to the teacher', 'at itself', 'at neighbours', 'mean distance, tokens'):
        out.add_column(head, justify='right')
    for model, layers in looks.items():
        found = layers.values()
        numbers = [mean(alike[model].values()), mean(x.itself for x in found), mean(x.near for x in found)]
        out.add_row(model, *(f'{n:.3f}' for n in numbers), f'{mean(x.distance for x in found):.2f}')
    return render(out)


def draw(path: Path, maps: Mapping[str, Mapping[str, Tensor]], looks: Mapping[str, Mapping[str, Looks]]) -> None:
    """Draw the maps, mean over images: a row an attention, a column a model."""
    layers: Sequence[str] = list(maps[TEACHER])
    with figure(path, len(layers), len(maps), (2.2 * len(maps), 2.4 * len(layers))) as axes:
        for row, layer in zip(axes, layers, strict=True):
            for axis, (model, found) in zip(row, maps.items(), strict=True):
                shown: Any = found[layer].mean(0).cpu()
                axis.imshow((shown / shown.amax(-1, keepdim=True)).numpy(), cmap=MAP, vmin=0, vmax=1, rasterized=True)
                axis.set_xticks([])
                axis.set_yticks([])
                look = looks[model][layer]
                head = f'{model}\n' if row is axes[0] or layer == layers[0] else ''
                axis.set_title(f'{head}distance {look.distance:.2f}, near {look.near + look.itself:.0%}', fontsize=8)
            row[0].set_ylabel(layer, fontsize=7)
        drawn = axes[0, 0].figure
        drawn.supxlabel('token that is read', fontsize=9)
        drawn.supylabel('token that reads', fontsize=9)
