"""Ablations of detectors: `train-det`, `test-det`, AP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asr_downstream.commands.ablation.arms import arm_of
from asr_downstream.commands.ablation.kinds.base import Kind, Run
from asr_downstream.commands.ablation.records import Record, arms_of_names, numbers_in
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.errors import DataError
from asr_downstream.files.configs import read_config

__all__ = ['Detection', 'read_lines']

ABOUT = ('config', 'checkpoint', 'sha256', 'calibrated_on', 'difference', 'loss', 'versions')


class Detection(Kind):
    """Detectors of MMDetection. Its metrics are rounded to three digits."""

    name = 'detection'
    folder = 'det_configs'
    metrics = {
        name: Metric(name, step=1e-3)
        for name in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR', 'segm_AP', 'segm_AP50')
    }

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return 'train_dataloader' in config and 'backbone' in (config.get('model') or {})

    def plug_of(self, config: Mapping[str, Any]) -> Any:
        return plug_in(config.get('model'))

    def pretrained(self, config: Mapping[str, Any]) -> str | None:
        from asr_downstream.detection.types import pretrained

        model = {key: value for key, value in config['model'].items() if key != 'distil'}
        return config.get('load_from') or next(pretrained(model), None)

    def keys(self, config: Mapping[str, Any], plug: Any) -> str:
        kind = config['model']['backbone']['type']
        name = (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
        return f'model = dict(backbone=dict(type={f"asr_downstream.{name}"!r}, plug={plug!r}))\n'

    def train(self, run: Run) -> list[str]:
        folder, seed = str(run.folder), str(run.seed)
        words = ['train-det', str(run.config), '--work-dir', folder, '--seed', seed, '--resume', 'auto']
        return words + run.plan.given('--data-root')

    def test(self, run: Run) -> list[str]:
        from asr_downstream.detection.training.checkpoints import noted

        checkpoint = noted(run.folder)
        if checkpoint is None:
            raise DataError(
                f'{run.folder}: its training wrote no checkpoint; see default_hooks.checkpoint of the config'
            )
        words = ['test-det', str(run.config), str(checkpoint), '--work-dir', str(run.folder), *run.folding]
        return [*words, *run.plan.test, *run.plan.given('--data-root')]

    def is_run(self, folder: Path) -> bool:
        return (folder / 'last_checkpoint').is_file()

    def read(self, folder: Path) -> Record:
        from asr_downstream.detection.evaluation.results import read_run, read_test

        found = read_run(folder)
        config = read_config(sorted(folder.glob('*.py'))[0], 'det_configs/')
        plug = plug_in(config.model)
        record = record_of(found, arm_of(plug), {'run': folder.name, 'folder': str(folder)})
        record.setting['data'] = read_test(folder / 'test.json').get('data')
        return record


def plug_in(node: Any) -> Any:
    """First plug in a model's config."""
    if isinstance(node, dict):
        if node.get('plug') is not None:
            return node['plug']
        node = list(node.values())
    found = (plug_in(value) for value in node) if isinstance(node, list | tuple) else ()
    return next((plug for plug in found if plug is not None), None)


def record_of(found: dict[str, Any], arm: str, about: dict[str, Any]) -> Record:
    """Make a record of one of `results-det`."""
    folded = found.get('folded')
    how = None if folded is None else 'calibrated' if found.get('calibrated_on') else 'exact'
    return Record(
        arm=arm,
        seed=int(found['seed']),
        trained=numbers_in(found['trained']),
        folded=None if folded is None else numbers_in(folded),
        folding=how,
        setting={key: found[key] for key in ('epochs', 'batch') if key in found},
        about={**about, **{key: found[key] for key in ABOUT if key in found}},
    )


def read_lines(path: Path) -> list[Record]:
    """Read the records that `results-det --out` has written.

    Raises:
        DataError: a line is damaged, or something else.
    """
    found = []
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
        try:
            row = json.loads(line)
            names = [row['config'], *row['trained'], *row.get('folded', {})]
            sound = all(isinstance(name, str) for name in names) and type(row['seed']) is int
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise DataError(f'{path}: line {number} is no record of results-det; make the file again, with its --out')
        found.append(row)
    arms = arms_of_names(dict.fromkeys(row['config'] for row in found))
    return [record_of(row, arms[row['config']], {'run': row['config'], 'folder': str(path)}) for row in found]
