"""A tiny classifier of digits as a task of the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from asr_downstream.engine.config import Schema, portable
from asr_downstream.engine.data.images import Images, build_images
from asr_downstream.engine.loop import train
from asr_downstream.engine.task import Task
from asr_downstream.engine.trackers import Reporter
from asr_downstream.engine.values import Count
from asr_downstream.files.atomic import sha256

DEFAULTS = ModuleType('defaults')


DEFAULTS.width, DEFAULTS.learning_rate = 16, 1e-2  # type: ignore[attr-defined]


DEFAULTS.__annotations__ = {'width': Count, 'learning_rate': float}


SCHEMA = Schema('digits', 'tests/', DEFAULTS)


QUICK = dict(
    max_train_steps=6, train_batch_size=16, lr_warmup_steps=2, dataloader_num_workers=0, checkpointing_steps=3,
    validation_steps=0, logging_steps=1, report_to=[],
)  # fmt: skip


class Labelled(Dataset[dict[str, Any]]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        image, used = self.images.decodable(draw[0])
        assert self.images.source.labels is not None
        return {'image': image, 'label': self.images.source.labels[used], 'bad': draw[0] if used != draw[0] else -1}


class Classification(Task):
    schema = SCHEMA
    fixed = ('width',)

    def __init__(self, config: Any) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.images = build_images(config.data, 1)
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, config.width), nn.BatchNorm1d(config.width), nn.ReLU(),
            nn.Linear(config.width, 10),
        )  # fmt: skip
        self.model[1].requires_grad_(False)
        self.steps: list[int] = []
        self.seen: list[tuple[bool, bool]] = []

    def samples(self) -> Labelled:
        assert self.images is not None
        return Labelled(self.images)

    def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {'params': [p for p in trained if p.ndim > 1], 'weight_decay': config.adam_weight_decay},
            {'params': [p for p in trained if p.ndim == 1], 'weight_decay': 0.0},
        ]

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch['image'])
        accuracy = (logits.argmax(1) == batch['label']).float().mean()
        return F.cross_entropy(logits, batch['label']), {'accuracy': accuracy}

    def after_step(self, step: int) -> None:
        self.steps.append(step)
        with torch.no_grad():
            self.model[4].bias[0] = 0

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        self.seen.append((model.training, torch.is_grad_enabled()))
        reporter.numbers(step, {'val/accuracy': 0.5})

    def config_text(self) -> str:
        return portable(self.config)


def config_for(folder: Path, **settings: Any) -> Any:
    config = SCHEMA.from_dict({**QUICK, **settings}, 'stage')
    config.output_dir = str(folder)
    return config


def run_of(folder: Path, resume: str | None = None, **settings: Any) -> tuple[Classification, Path]:
    config = config_for(folder, **settings)
    task = Classification(config)
    return task, train(task, config, folder, resume)


def groups_of(checkpoint: Path) -> list[dict[str, Any]]:
    return torch.load(checkpoint / 'optimizer.bin', weights_only=True)['param_groups']


def seal(checkpoint: Path) -> None:
    """Write the manifest that fits the files of a checkpoint, whatever was done to them."""
    files = sorted(p for p in checkpoint.iterdir() if p.name != 'manifest.json')
    entries = {p.name: {'bytes': p.stat().st_size, 'sha256': sha256(p)} for p in files}
    (checkpoint / 'manifest.json').write_text(json.dumps({'files': entries}))


def change_progress(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change ``progress.json`` of a checkpoint, and what its manifest says of it."""
    path = checkpoint / 'progress.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    seal(checkpoint)
