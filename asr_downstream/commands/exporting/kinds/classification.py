"""Classifiers that `train-cls` has shipped: images in, logits out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.commands.exporting.images import open_images, tensors_of
from asr_downstream.commands.exporting.kinds.base import Kind, Request
from asr_downstream.commands.exporting.subject import Axes, Outputs, Subject, refuse_gates
from asr_downstream.engine.data.labelled import normal
from asr_downstream.files.atomic import read_json

__all__ = ['Classification', 'batches', 'scorer']

BATCH: Axes = {'image': {0: ('batch', 1)}}


class Classification(Kind):
    """A folder with ``config.json`` and ``model.safetensors``."""

    name = 'classification'
    shipped = 'the folder shipped/ of train-cls'

    def is_shipped(self, path: Path) -> bool:
        from asr_downstream.classification.export import is_shipped

        return path.is_dir() and is_shipped(path)

    def open(self, request: Request) -> Subject:
        from asr_downstream.classification.export import CONFIG, WEIGHTS, load_classifier

        folder = request.shipped
        model = load_classifier(folder)
        refuse_gates(model, folder, 'train-cls ships folded models')
        facts = read_json(folder / CONFIG)
        size, channels = facts['resolution'], facts['channels']
        mean, std = normal(facts['image_mean'], facts['image_std'], channels)
        score, data = None, 'random numbers'
        if request.data is None:
            given = torch.rand(8, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        else:
            images = open_images(request.data, size, channels)
            given, used = tensors_of(images, request.images)
            data = f'{len(used)} images of {request.data}'
            labels, known = images.source.labels, tuple(images.source.classes) == tuple(facts['classes'])
            if labels is not None and known:
                score = scorer((given - mean) / std, torch.tensor([labels[index] for index in used]))
        given = (given - mean) / std
        return Subject(
            kind=self.name,
            name=type(model).__name__,
            model=Outputs(model, lambda model, image: {'logits': model(image)}, ('image',)),
            calls=batches(given, 'image'),
            axes=(BATCH,),
            sources=(folder / CONFIG, folder / WEIGHTS),
            data=data,
            score=score,
            about={
                'classes': list(facts['classes']),
                'image_mean': facts['image_mean'],
                'image_std': facts['image_std'],
            },
        )


def batches(given: Tensor, name: str, **others: Any) -> list[dict[str, Tensor]]:
    """Calls with batches of two, one, and three, then of eight, as far as the images go."""
    calls, start = [], 0
    for count in (2, 1, 3, *[8] * (len(given) // 8)):
        part = given[start : start + count]
        if len(part) == count:
            calls.append({name: part, **{key: value[start : start + count] for key, value in others.items()}})
        start += count
    return calls


def scorer(given: Tensor, labels: Tensor, name: str = 'image', output: str = 'logits') -> Any:
    """Make a function that measures the accuracy of a model."""

    @torch.no_grad()
    def score(model: nn.Module, text: str) -> dict[str, float]:
        found = torch.cat([model(**{name: part})[output] for part in given.split(8)])
        return {'accuracy': float((found.argmax(1) == labels).double().mean())}

    return score
