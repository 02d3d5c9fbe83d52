"""Ablations of image classifiers: `train-cls`, which evaluates too, and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asr_downstream.commands.ablation.arms import arm_of, folding_of
from asr_downstream.commands.ablation.kinds.base import Kind, Run, setting_of
from asr_downstream.commands.ablation.kinds.diffusion import CONFIG_FILE, MODELS
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import read_json
from asr_downstream.files.configs import read_config

__all__ = ['Classification']

SETTING = ('step', 'data', 'training_images', 'images')


class Classification(Kind):
    """Image classifiers, measured on images that are held out of the training."""

    name = 'classification'
    folder = 'tools/cls_configs'
    result = 'evaluation.json'
    metrics = {'accuracy': Metric('points of accuracy', form='.2f', scale=100)}
    tests_as_it_trains = True

    def recognises(self, config: Mapping[str, Any]) -> bool:
        model = config.get('model') or {}
        return 'train_dataloader' not in config and 'type' in model and model['type'] not in MODELS

    def steps(self, run: Run) -> list[Callable[[], list[str]]]:
        return [lambda: self.train(run)]

    def train(self, run: Run) -> list[str]:
        words = ['train-cls', str(run.config), '--output-dir', str(run.folder), '--seed', str(run.seed)]
        calibrate = ['--calibrate', str(run.plan.calibrate)] if 'calibrated' in run.folding else []
        resume = ['--resume'] if any(run.folder.glob('checkpoint-*')) else []
        return [*words, *calibrate, *resume, *run.plan.test, *run.plan.given('--data')]

    def is_run(self, folder: Path) -> bool:
        try:
            found = read_json(folder / self.result)
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and isinstance(found.get('accuracy'), dict)

    def read(self, folder: Path) -> Record:
        if not self.is_run(folder):
            raise DataError(f'{folder}: was not evaluated; train it again with --resume, which measures it')
        found = read_json(folder / self.result)
        config = read_config(folder / CONFIG_FILE, self.folder, imports=False)
        total = config.get('max_train_steps')
        try:
            accuracy, sizes, plug = found['accuracy'], found['parameters'], found['plug']
            if found['step'] != total:
                raise DataError(f'{folder}: was evaluated at step {found["step"]} of {total}; go on with --resume')
            folding = folding_of(plug)
            folded = None
            if folding is not None and accuracy['folded'] is not None:
                folded = {'accuracy': accuracy['folded'], 'parameters': sizes['folded']}
            return Record(
                arm=arm_of(plug),
                seed=found['seed'],
                trained={'accuracy': accuracy['plugged'], 'parameters': sizes['plugged']},
                folded=folded,
                folding=folding if folded else None,
                setting={**{key: found[key] for key in SETTING}, **setting_of(config)},
                about={
                    'run': folder.name,
                    'folder': str(folder),
                    'sha256': found['weights']['sha256'],
                    'versions': found['versions'],
                },
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f'{folder}: evaluation.json is damaged ({error!r}); train it again with --resume'
            ) from error
