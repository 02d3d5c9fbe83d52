"""The smallest training of a classifier: a ResNet-8 of width 4 on the digits, for a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_downstream.classification.config import SCHEMA
from asr_downstream.classification.evaluate import evaluate_run
from asr_downstream.classification.task import Classification
from asr_downstream.classification.train import train

TINY: dict[str, Any] = dict(
    model=dict(type='ResNet', depth=8, width=4), data=dict(type='Digits', resolution=8), images_per_class=20,
    augment=[dict(type='Crop', padding=1), dict(type='Flip')], train_batch_size=32, max_train_steps=6,
    checkpointing_steps=100, validation_steps=3, logging_steps=2, dataloader_num_workers=0, report_to=[],
    lr_scheduler='step', lr_scheduler_kwargs=dict(milestones=[0.5]), images_in='device',
)  # fmt: skip


def config_of(folder: Path, **settings: Any) -> Any:
    config = SCHEMA.from_dict({**TINY, **settings}, 'tiny.py')
    config.output_dir = str(folder)
    return config


def run_of(folder: Path, resume: str | None = None, **settings: Any) -> tuple[Classification, Path]:
    return train(config_of(folder, **settings), resume)


def evaluated(folder: Path, calibrate: int | None = None, **settings: Any) -> dict[str, Any]:
    return evaluate_run(*run_of(folder, **settings), calibrate)


def write_config(folder: Path, **settings: Any) -> Path:
    path = folder / 'tiny.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in {**TINY, **settings}.items()) + '\n')
    return path
