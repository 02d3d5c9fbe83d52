"""Distillation as a task: a task's own loss, and a distance to the teacher at every replaced attention.

Student and teacher each run on the inputs by themselves, and gradients flow through everything that is frozen, so the
distances of all blocks are learnt together (stage 1 of FAR; with ``distance=None``, its fine-tuning).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils.data import Dataset

from asr_downstream.engine.task import Task
from asr_downstream.engine.trackers import Reporter
from asr_downstream.errors import AsrError
from asr_downstream.far.distil.loss import Distances
from asr_downstream.far.model.replace import find_attentions
from asr_downstream.far.model.trainable import learning
from asr_downstream.far.prune.scores import hoyer_square
from asr_downstream.plugging.learning.restrict import keep_statistics

__all__ = ['Distillation']


class Distillation(Task):
    """Train a student whose attention was replaced.

    Args:
        base: task of the student: `base.model` is the student.
        teacher: the stock model; needed for a distance. Is kept in eval mode, without gradients.
        config: of the stage: ``learns``, ``task_weight``, ``distance``, ``hoyer``.

    Raises:
        AsrError: the keys do not fit together.
    """

    def __init__(self, base: Any, teacher: nn.Module, config: Config) -> None:
        self.base, self.config = base, config
        self.model, self.images = base.model, base.images
        self.schema, self.fixed = base.schema, base.fixed
        spec = base.model.replace_spec
        self.places = find_attentions(teacher, spec['layers'], spec.get('heads'), spec.get('projection'))
        self.distances: Distances | None = None
        if config.distance is not None:
            variant = spec.get('variant', 'M3')
            self.distances = Distances(config.distance, variant, logits=getattr(base, 'logits', None))
            self.distances.check(variant, self.places)
            self.teacher = teacher.requires_grad_(False).eval()
            hidden = [key for key in ('gradient_checkpointing', 'torch_compile') if config[key]]
            if hidden and self.distances.placed:
                raise AsrError(f'{hidden[0]} hides the features that distance compares; leave one of them out')
        if not config.task_weight and self.distances is None and not config.hoyer:
            raise AsrError('task_weight=0 and no distance: there is nothing to learn')
        learning(self.model, config.learns)

    def use(self, config: Config) -> None:
        """Use a config from here on, also in the task."""
        self.config = config
        self.base.use(config)

    def samples(self) -> Dataset[dict[str, Any]]:
        """Samples of the task."""
        return self.base.samples()

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """Groups of the task."""
        return self.base.parameter_groups(config)

    def to(self, device: torch.device) -> None:
        """Move the teacher, and what the task has."""
        self.base.to(device)
        if self.distances is not None:
            self.teacher.to(device)

    def train_mode(self) -> None:
        """Set the student to training mode; batch norms that do not learn keep their statistics too."""
        self.model.train()
        keep_statistics(self.model)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare a batch for the task."""
        return self.base.prepare(batch)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """``task_weight`` x loss of the task + each distance x its ``weight`` + ``hoyer`` x regulariser."""
        inputs = self.base.inputs(batch)
        parts: dict[str, Tensor] = {}
        distance: Tensor | float = 0.0
        if self.distances is None:
            output = model(**inputs)
        else:
            output, distance, parts = self.distances.measure(
                self.teacher, lambda: self.teacher(**inputs), self.model, lambda: model(**inputs), self.places
            )
        parts['task'] = self.base.objective(output, batch)
        total = self.config.task_weight * parts['task'] + distance
        if self.config.hoyer:
            parts['hoyer'] = hoyer_square(self.model)
            total = total + self.config.hoyer * parts['hoyer']
        return total, {name: value.detach() for name, value in parts.items()}

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        """Validate the student by the measure of the task."""
        self.base.validate(model, step, run, reporter)

    def config_text(self) -> str:
        """Text of the config of the task."""
        return self.base.config_text()
