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
from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, DataError
from asr_downstream.files.configs import read_config
from asr_downstream.files.folders import config_of_run

__all__ = ['Detection', 'read_lines']

ABOUT = ('config', 'checkpoint', 'sha256', 'calibrated_on', 'difference', 'loss', 'versions')


class Detection(Kind):
    """Detectors of MMDetection. Its metrics are rounded to three digits."""

    name = 'detection'
    folder = 'det_configs'
    result = 'test.json'
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

    def check(self, config: Mapping[str, Any], path: Path) -> None:
        if 'max_epochs' not in (config.get('train_cfg') or {}):
            raise AsrError(f'{path}: is trained by steps; runs are compared by epochs, of an EpochBasedTrainLoop')
        evaluators = config.get('test_evaluator') or []
        types = [str(each.get('type')) for each in (evaluators if isinstance(evaluators, list) else [evaluators])]
        if not any('CocoMetric' in name for name in types):
            raise AsrError(
                f'{path}: is evaluated by {some(types) or "nothing"}; runs are compared by AP, of a CocoMetric'
            )

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
        from asr_downstream.detection.evaluation.results import read_run

        found = read_run(folder)
        plug = plug_in(read_config(config_of_run(folder), 'det_configs/').model)
        return record_of(found, arm_of(plug), {'run': folder.name, 'folder': str(folder)})


def plug_in(node: Any) -> Any:
    """First plug in a model's config."""
    if isinstance(node, dict):
        if node.get('plug') is not None:
            return node['plug']
        node = list(node.values())
    found = (plug_in(value) for value in node) if isinstance(node, list | tuple) else ()
    return next((plug for plug in found if plug is not None), None)


def record_of(found: dict[str, Any], arm: str, about: dict[str, Any]) -> Record:
    """Make a record of one of `results-det`.

    Raises:
        DataError: its seed is not known.
    """
    if type(found['seed']) is not int:
        raise DataError(f'{about["folder"]}: its config has no seed; train it with --seed')
    folded = found.get('folded')
    how = None if folded is None else 'calibrated' if found.get('calibrated_on') else 'exact'
    return Record(
        arm=arm,
        seed=found['seed'],
        trained=defined(found['trained']),
        folded=None if folded is None else defined(folded),
        folding=how,
        setting={key: found[key] for key in ('epochs', 'batch', 'data') if found.get(key) is not None},
        about={**about, **{key: found[key] for key in ABOUT if key in found}},
    )


def defined(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of an evaluation, without the -1 of COCO, which stands for: there are no such boxes."""
    return {name: value for name, value in numbers_in(metrics).items() if value >= 0}


def read_lines(*paths: Path) -> list[Record]:
    """Read the records that `results-det --out` has written; arms are told by the names of all of them.

    Raises:
        DataError: a line is damaged, or something else; or a file has none.
    """
    rows = [(path, row) for path in paths for row in rows_of(path)]
    arms = arms_of_names(dict.fromkeys(row['config'] for _, row in rows))
    return [record_of(row, arms[row['config']], {'run': row['config'], 'folder': str(path)}) for path, row in rows]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of `results-det`.

    Raises:
        DataError: a line is damaged, or something else; or there is none.
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
    if not found:
        raise DataError(f'{path}: is empty; results-det --out writes a line for each run')
    return found
