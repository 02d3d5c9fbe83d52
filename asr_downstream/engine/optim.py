"""The optimiser and its learning rate, as a config says."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files.configs import plain

__all__ = [
    'Optimiser',
    'build_optimiser',
    'build_schedule',
    'decay_of',
    'decaying_groups',
    'decays_of',
    'optimiser_of',
    'set_rates',
]

STEP = 'step'
# What the config says elsewhere, or the loop itself.
NOT_KWARGS = ('optimizer', 'num_warmup_steps', 'num_training_steps', 'last_epoch')


@dataclass(frozen=True)
class Optimiser:
    """What there is to know of an optimiser that configs name.

    Attributes:
        cls: of torch, or a function that makes one.
        settings: config -> arguments besides rate and decay; also settings of its groups.
        decay: key of its weight decay where ``weight_decay`` is None; '' for none.
        moments: config -> tensors that it keeps of every parameter; a fraction where it keeps sums, or 8 bits, of them.
    """

    cls: Any
    settings: Callable[[Config], dict[str, Any]]
    decay: str
    moments: Callable[[Config], float]


def adamw_of_8_bits(groups: list[dict[str, Any]], **settings: Any) -> Any:
    """AdamW of bitsandbytes, which keeps the moments of large weights in 8 bits.

    Raises:
        AsrError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise AsrError(
            f'optimizer: adamw8bit needs bitsandbytes ({error}); install it with: pip install bitsandbytes, or use '
            f"optimizer='adamw', or 'adafactor', which keeps even less"
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def adam_settings(config: Config) -> dict[str, Any]:
    """Arguments of AdamW."""
    return {'betas': (config.adam_beta1, config.adam_beta2), 'eps': config.adam_epsilon}


OPTIMISERS: Mapping[str, Optimiser] = {
    'adamw': Optimiser(
        torch.optim.AdamW,
        adam_settings,
        'adam_weight_decay',
        lambda config: 2,
    ),
    'adamw8bit': Optimiser(adamw_of_8_bits, adam_settings, 'adam_weight_decay', lambda config: 0.5),
    'sgd': Optimiser(
        torch.optim.SGD,
        lambda config: {'momentum': config.momentum, 'nesterov': config.nesterov},
        '',
        lambda config: int(config.momentum > 0),
    ),
    'adafactor': Optimiser(torch.optim.Adafactor, lambda config: {}, '', lambda config: 0.01),
}


def optimiser_of(config: Config) -> Optimiser:
    """Entry of the optimiser that a config names."""
    return OPTIMISERS[config.optimizer]


def decay_of(config: Config) -> float:
    """Weight decay of a config."""
    if config.weight_decay is not None:
        return config.weight_decay
    key = optimiser_of(config).decay
    return config[key] if key else 0.0


def decaying_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters: matrices decay, vectors (biases, norms) do not, as timm's optimisers have it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {'params': [p for p in trained if p.ndim > 1], 'weight_decay': weight_decay},
        {'params': [p for p in trained if p.ndim <= 1], 'weight_decay': 0.0},
    ]
    return [group for group in groups if group['params']]


def build_optimiser(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """Optimiser over groups of parameters; a group without ``weight_decay`` has that of the config.

    Raises:
        AsrError: its settings do not fit each other.
    """
    known = optimiser_of(config)
    settings = known.settings(config)
    try:
        return known.cls(groups, lr=config.learning_rate, weight_decay=decay_of(config), **settings)
    except ValueError as error:
        said = ', '.join(f'{key}={value}' for key, value in settings.items())
        raise AsrError(f'optimizer: {config.optimizer} does not take {said} ({error})') from error


def build_schedule(optimiser: Any, config: Config) -> Any:
    """Learning rate by step.

    Raises:
        AsrError: ``lr_scheduler_kwargs`` do not fit the schedule, or it does not fit the rate or the steps.
    """
    name, kwargs = config.lr_scheduler, plain(config.lr_scheduler_kwargs)
    function: Any = get_step_schedule if name == STEP else TYPE_TO_SCHEDULER_FUNCTION[name]
    takes = set(inspect.signature(function).parameters) - set(NOT_KWARGS)
    for key in kwargs:
        if key not in takes:
            hint = did_you_mean(key, takes) if takes else 'it takes none'
            raise AsrError(f'lr_scheduler_kwargs: {name} takes no {key!r}; {hint}')
    warmup, total = config.lr_warmup_steps, config.max_train_steps
    try:
        if name == STEP:
            schedule = get_step_schedule(optimiser, warmup, total, **kwargs)
        else:
            schedule = get_scheduler(
                name,
                optimiser,
                num_warmup_steps=warmup,
                num_training_steps=total,
                scheduler_specific_kwargs=kwargs,
            )
        last = schedule.lr_lambdas[0](total)  # else a bad value is found at the end of the warmup
        if not math.isfinite(last):
            raise ValueError(f'the rate ends at {last} times learning_rate')
    except (TypeError, ValueError, ArithmeticError) as error:
        raise AsrError(
            f'lr_scheduler: {name} does not fit lr_scheduler_kwargs={kwargs}, lr_warmup_steps={warmup}, '
            f'max_train_steps={total} ({error})'
        ) from error
    return schedule


def get_step_schedule(
    optimizer: Any,
    num_warmup_steps: int,
    num_training_steps: int,
    milestones: Sequence[float],
    gamma: float = 0.1,
    last_epoch: int = -1,
) -> LambdaLR:
    """Rates of torch's ``MultiStepLR``, as a factor of the step, which a training that is resumed asks for.

    Args:
        optimizer: of the training.
        num_warmup_steps: of a linear warmup.
        num_training_steps: all of them.
        milestones: from which steps on the rate is multiplied by ``gamma`` once more; a number between 0 and 1 is a
            share of all steps.
        gamma: see above.
        last_epoch: see torch.

    Raises:
        ValueError: these are no milestones in order, or no factor.
    """
    if not isinstance(milestones, list | tuple) or not all(type(m) in (int, float) for m in milestones):
        raise ValueError(f'milestones={milestones!r} should be a list of steps or of shares')
    steps = [max(1, round(m * num_training_steps)) if 0 < m < 1 else m for m in milestones]
    each_later = sorted(steps) == steps and len(set(milestones)) == len(milestones)
    if any(type(step) is not int or step < 1 for step in steps) or not each_later:
        raise ValueError(f'milestones={milestones!r} should be steps, or shares between 0 and 1, each after the last')
    if type(gamma) not in (int, float) or not 0 < gamma < math.inf:
        raise ValueError(f'gamma={gamma!r} should be a number greater than 0')

    def factor(step: int) -> float:
        warm = min(1.0, step / num_warmup_steps) if num_warmup_steps else 1.0
        return warm * gamma ** bisect_right(steps, step)

    return LambdaLR(optimizer, factor, last_epoch)


def decays_of(optimiser: Any) -> list[float]:
    """Weight decay of every group of parameters."""
    return [group['weight_decay'] for group in optimiser.param_groups]


def set_rates(config: Config, optimiser: Any, schedule: Any, scheduled: int, decays: list[float]) -> None:
    """Let optimiser and schedule follow the config from here on; a checkpoint brings the settings of its own."""
    schedule.last_epoch = scheduled
    settings = optimiser_of(config).settings(config)
    rates = zip(optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, decays, strict=True)
    for group, base, factor, decay in rates:
        group |= {'initial_lr': base, 'lr': base * factor(scheduled), 'weight_decay': decay, **settings}
    schedule._last_lr = [group['lr'] for group in optimiser.param_groups]
