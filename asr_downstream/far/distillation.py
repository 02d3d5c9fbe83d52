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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from asr_downstream.configs import plain
from asr_downstream.engine.reporting import Reporter
from asr_downstream.engine.task import Task
from asr_downstream.errors import AsrError
from asr_downstream.far.description import mixers
from asr_downstream.far.features import DISTANCES, Features, block_of, check_feature
from asr_downstream.far.hosts import StandIn
from asr_downstream.far.lstm import VARIANTS
from asr_downstream.far.pruning import hoyer_square
from asr_downstream.far.replacing import find_attentions
from asr_downstream.registry import build

__all__ = ['Distillation', 'keep_statistics', 'learning']


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
        self.distance: Any = None
        if config.distance is not None:
            arguments = plain(config.distance)
            self.feature = arguments.pop('feature', 'heads')
            self.weight = arguments.pop('weight', 1.0)
            check_feature(self.feature, spec.get('variant', 'M3'), self.places)
            self.distance = build(DISTANCES, arguments)
            self.teacher = teacher.requires_grad_(False).eval()
            if hidden := [key for key in ('gradient_checkpointing', 'torch_compile') if config[key]]:
                raise AsrError(f'{hidden[0]} hides the features that distance compares; leave one of them out')
        if not config.task_weight and self.distance is None and not config.hoyer:
            raise AsrError('task_weight=0 and no distance: there is nothing to learn')
        learning(self.model, config.learns)

    def samples(self) -> Dataset[dict[str, Any]]:
        """Samples of the task."""
        return self.base.samples()

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """Groups of the task."""
        return self.base.parameter_groups(config)

    def to(self, device: torch.device) -> None:
        """Move the teacher, and what the task has."""
        self.base.to(device)
        if self.distance is not None:
            self.teacher.to(device)

    def train_mode(self) -> None:
        """Set the student to training mode; batch norms that do not learn keep their statistics too."""
        self.model.train()
        keep_statistics(self.model)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As the task does."""
        return self.base.prepare(batch)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """``task_weight`` x loss of the task + ``weight`` x sum of the distances + ``hoyer`` x regulariser."""
        inputs = self.base.inputs(batch)
        parts: dict[str, Tensor] = {}
        if self.distance is None:
            output = model(**inputs)
        else:
            with torch.no_grad(), Features(self.teacher, self.places, self.feature) as wanted:
                self.teacher(**inputs)
            with Features(self.model, self.places, self.feature) as own:
                output = model(**inputs)
            for place in self.places:
                parts[f'distance/{place.path}'] = self.distance(own.found[place.path], wanted.found[place.path])
        parts['task'] = self.base.objective(output, batch)
        total = self.config.task_weight * parts['task']
        if self.distance is not None:
            parts['distance'] = torch.stack([v for k, v in parts.items() if k.startswith('distance/')]).sum()
            total = total + self.weight * parts['distance']
        if self.config.hoyer:
            parts['hoyer'] = hoyer_square(self.model)
            total = total + self.config.hoyer * parts['hoyer']
        return total, {name: value.detach() for name, value in parts.items()}

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        """As the task does."""
        self.base.validate(model, step, run, reporter)

    def config_text(self) -> str:
        """As the task does."""
        return self.base.config_text()


def learning(model: Any, learns: str) -> None:
    """Set which parameters of a student learn.

    Args:
        model: with replaced attentions.
        learns: ``'replacements'`` (LSTMs and their projections; the teacher's output projections stay), ``'blocks'``
            (all of the blocks they are in) or ``'all'``.
    """
    model.requires_grad_(learns == 'all')
    for path, mixer in mixers(model):
        if learns == 'blocks':
            model.get_submodule(block_of(model, path)).requires_grad_(True)
        mixer.requires_grad_(True)
        if VARIANTS[mixer.variant].projection == 'fresh':
            projection_of(model, path).requires_grad_(True)


def keep_statistics(model: nn.Module) -> None:
    """Set batch norms whose weights do not learn to eval mode, so that what is frozen stays as it is."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def projection_of(model: nn.Module, path: str) -> nn.Module:
    """Output projection of a replaced attention."""
    stand_in = model.get_submodule(path)
    return stand_in.get_submodule(stand_in.kept[0] if isinstance(stand_in, StandIn) else 'to_out.0')
