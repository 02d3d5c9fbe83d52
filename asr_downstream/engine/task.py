"""`Task`: the model, the samples and the loss that `asr_downstream.engine.loop.train` trains with.

A training of something new is a subclass of `Task`. It needs ``model``, ``samples``, ``inputs``, ``objective`` and
``config_text``; everything else has a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils.data import Dataset

from asr_downstream.engine.config import Schema
from asr_downstream.engine.data.images import Images
from asr_downstream.engine.optim import decay_of
from asr_downstream.engine.trackers import Reporter

__all__ = ['Task']


class Task:
    """Base class of the tasks.

    Attributes:
        model: is trained; its state dict is what a checkpoint holds. Parameters that do not require grad stay as they
            are.
        config: of the training.
        images: what `samples` are read from, to name and count files that cannot be decoded; None: nothing can be bad.
        schema: of its config.
        fixed: keys of the config that a checkpoint is bound to: with another value it would be another training.
    """

    model: nn.Module
    config: Config
    images: Images | None = None
    schema: Schema
    fixed: tuple[str, ...] = ()

    def same(self, key: str, before: Any, now: Any) -> bool:
        """Whether two values of a fixed key, of a checkpoint and of the config, mean the same training."""
        return bool(before == now)

    def use(self, config: Config) -> None:
        """Use a config from here on: that of the task, with epochs turned into steps."""
        self.config = config

    def samples(self) -> Dataset[dict[str, Any]]:
        """Data set whose item ``(index, number)`` is a dict of tensors, and of ``bad``.

        The pairs are those of `asr_downstream.engine.data.sampler.Draws`. ``bad`` is the index of an image that could
        not be decoded, or -1; see `asr_downstream.engine.data.images.Images.decodable`.
        """
        raise NotImplementedError

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, each with ``params`` and ``weight_decay``."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [{'params': trained, 'weight_decay': decay_of(config)}]

    def begin(self, run: Path | None) -> None:
        """Called before the first step, with the weights that the training starts from, or goes on from.

        Args:
            run: folder of the run; on the main process alone.
        """

    def to(self, device: torch.device) -> None:
        """Move what is frozen besides the model; the loop moves the model."""

    def train_mode(self) -> None:
        """Set the model to training mode."""
        self.model.train()

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn a batch on the device into what `loss` takes; what should not run in half precision belongs here."""
        return batch

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model for a batch of `prepare`; apart, so that two models can see the same."""
        raise NotImplementedError

    def objective(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Loss, a scalar, of what a model returned for `inputs`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and further scalars for the log, by the same names for every batch.

        Args:
            model: `model`, wrapped for processes and half precision; call this one.
            batch: of `prepare`.
        """
        return self.objective(model(**self.inputs(batch)), batch), {}

    def after_step(self, step: int) -> None:
        """Called after every optimiser step, counted from 1, before weights are averaged."""

    def validates_at_start(self) -> bool:
        """Whether to validate before the first step."""
        return bool(self.config.validate_at_start)

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        """Measure or show what was learnt, on the main process.

        Args:
            model: `model`, in eval mode and with the averaged weights, if there are some; gradients are off.
            step: optimiser steps done.
            run: folder.
            reporter: for `Reporter.numbers` and `Reporter.picture`.
        """

    def saved(self, checkpoint: Path, step: int, reporter: Reporter) -> None:
        """Called on the main process after a checkpoint was written."""

    def config_text(self) -> str:
        """Text of ``config.py`` of the run: the resolved config, see `asr_downstream.engine.config.portable`."""
        raise NotImplementedError
