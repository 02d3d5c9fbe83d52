"""AdamW and its learning rate, as a config says."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files.configs import plain

__all__ = ['build_optimiser', 'build_schedule', 'decaying_groups', 'decays_of', 'set_rates']

# What the config says elsewhere, or the loop itself.
NOT_KWARGS = ('optimizer', 'num_warmup_steps', 'num_training_steps', 'last_epoch')


def decaying_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for AdamW: matrices decay, vectors (biases, norms) do not, as timm's optimisers have it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {'params': [p for p in trained if p.ndim > 1], 'weight_decay': weight_decay},
        {'params': [p for p in trained if p.ndim <= 1], 'weight_decay': 0.0},
    ]
    return [group for group in groups if group['params']]


def build_optimiser(groups: list[dict[str, Any]], config: Config) -> torch.optim.AdamW:
    """AdamW over groups of parameters; a group without ``weight_decay`` has that of the config."""
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def build_schedule(optimiser: Any, config: Config) -> Any:
    """Learning rate by step.

    Raises:
        AsrError: ``lr_scheduler_kwargs`` do not fit the schedule, or it does not fit the rate or the steps.
    """
    name, kwargs = config.lr_scheduler, plain(config.lr_scheduler_kwargs)
    takes = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters) - set(NOT_KWARGS)
    for key in kwargs:
        if key not in takes:
            hint = did_you_mean(key, takes) if takes else 'it takes none'
            raise AsrError(f'lr_scheduler_kwargs: {name} takes no {key!r}; {hint}')
    try:
        schedule = get_scheduler(
            name,
            optimiser,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            scheduler_specific_kwargs=kwargs,
        )
        last = schedule.lr_lambdas[0](config.max_train_steps)  # else a bad value is found at the end of the warmup
        if not math.isfinite(last):
            raise ValueError(f'the rate ends at {last} times learning_rate')
    except (TypeError, ValueError, ArithmeticError) as error:
        raise AsrError(
            f'lr_scheduler: {name} does not fit lr_scheduler_kwargs={kwargs}, lr_warmup_steps='
            f'{config.lr_warmup_steps}, max_train_steps={config.max_train_steps} ({error})'
        ) from error
    return schedule


def decays_of(optimiser: Any) -> list[float]:
    """Weight decay of every group of parameters."""
    return [group['weight_decay'] for group in optimiser.param_groups]


def set_rates(config: Config, optimiser: Any, schedule: Any, scheduled: int, decays: list[float]) -> None:
    """Let optimiser and schedule follow the config from here on; a checkpoint brings the settings of its own."""
    schedule.last_epoch = scheduled
    rates = zip(optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, decays, strict=True)
    for group, base, factor, decay in rates:
        group |= {
            'initial_lr': base,
            'lr': base * factor(scheduled),
            'betas': (config.adam_beta1, config.adam_beta2),
            'weight_decay': decay,
            'eps': config.adam_epsilon,
        }
    schedule._last_lr = [group['lr'] for group in optimiser.param_groups]
