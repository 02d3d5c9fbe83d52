"""Results of several trainings: one record a run, and a table with mean and spread over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from huggingface_hub import EvalResult

from asr_downstream.errors import DataError
from asr_downstream.files.atomic import write_atomically
from asr_downstream.files.card import measured
from asr_downstream.files.configs import read_config
from asr_downstream.files.folders import config_of_run

__all__ = ['markdown', 'read_run', 'results_of', 'tested_before', 'write_jsonl']

# As hubs call the tasks -> metrics.
TASKS = {'object-detection': ('AP', 'AP50', 'AP75'), 'image-segmentation': ('segm_AP', 'segm_AP50')}
KEPT = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR', 'segm_AP', 'segm_AP50', 'parameters', 'gmacs', 'classes')


def read_run(folder: Path) -> dict[str, Any]:
    """Summarise a run of `tools/train_det.py` that `tools/test_det.py --work-dir` has tested.

    Returns:
        Config, seed, epochs, batch, loss by epoch, metrics as trained (at the last epoch) and folded, versions.

    Raises:
        DataError: the run is not complete, was not tested, or was tested at another epoch than its last; or it was
            trained by steps.
    """
    if not (folder / 'last_checkpoint').is_file():
        raise DataError(f'{folder}: is no run of tools/train_det.py: it has no last_checkpoint')
    path = config_of_run(folder)
    if not (folder / 'test.json').is_file():
        raise DataError(f'{folder}: was not tested; python tools/test_det.py CONFIG CHECKPOINT --work-dir {folder}')
    config = read_config(path, 'det_configs/')
    tested = read_test(folder / 'test.json')
    last = Path((folder / 'last_checkpoint').read_text().strip()).name
    if Path(tested['checkpoint']).name != last:
        raise DataError(f'{folder}: test.json is about {tested["checkpoint"]}, but the last checkpoint is {last}')
    epochs = config.train_cfg.get('max_epochs')
    if epochs is None:
        raise DataError(f'{folder}: was trained by steps; runs are compared by epochs, of an EpochBasedTrainLoop')
    losses = losses_by_epoch(folder)
    if len(losses) < epochs:
        raise DataError(f'{folder}: has logs of {len(losses)} of {epochs} epochs')
    record: dict[str, Any] = {
        'config': path.stem,
        'seed': config.get('randomness', {}).get('seed'),
        'epochs': epochs,
        'batch': config.train_dataloader.batch_size,
        'checkpoint': last,
        'loss': [round(value, 4) for value in losses],
        'data': tested.get('data'),
        'trained': kept(tested.get('unfolded', tested)),
    }
    if 'folded' in tested:
        record['folded'] = kept(tested['folded'])
        record['difference'] = tested['difference']
        sites = (tested.get('calibration') or {}).get('sites', [])
        record['calibrated_on'] = max((site['samples'] for site in sites), default=None)
    return {**record, 'sha256': tested['sha256'], 'versions': tested['versions']}


def read_test(path: Path) -> dict[str, Any]:
    """Read what `tools/test_det.py` wrote.

    Raises:
        DataError: it is damaged, or something else.
    """
    try:
        found = json.loads(path.read_bytes())
        sound = isinstance(found['checkpoint'], str) and {'sha256', 'versions'} <= found.keys()
        metrics = found.get('unfolded', found)
        sound = sound and isinstance(metrics, dict)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DataError(f'{path}: is damaged or not of tools/test_det.py; test the run again')
    if 'AP' not in metrics:
        raise DataError(f'{path}: has no AP; runs are compared by that of COCO, so give the config a CocoMetric')
    return found


def tested_before(checkpoint: Path, hashed: str) -> dict[str, Any] | None:
    """Read what `tools/test_det.py` has written beside a checkpoint, if it is about this checkpoint.

    Args:
        checkpoint: what training wrote.
        hashed: its SHA-256.
    """
    try:
        found = read_test(checkpoint.parent / 'test.json')
    except (DataError, OSError):  # never tested, or a file of something else
        return None
    return found if found['sha256'] == hashed else None


def results_of(tested: dict[str, Any], report: dict[str, Any]) -> list[EvalResult]:
    """AP of a folded detector, for the metadata of its card.

    Where an exact fold was not tested, it is that of the detector as it was trained, which computes the same, and says
    so. That of a calibrated fold is taken only if the same gates were replaced by the same means.

    Args:
        tested: see `tested_before`.
        report: of the fold that is shipped.
    """
    calibration = report['calibration']
    data = tested.get('data')
    if not isinstance(data, list) or not data or not all(isinstance(name, str) for name in data):
        return []  # of an older version, which did not say what it was tested on
    if calibration is not None and tested.get('calibration') != json.loads(json.dumps(calibration)):
        return []
    metrics = tested.get('folded')
    how = None if metrics or not report['sites'] else {'measured': 'before folding'}
    metrics = metrics or tested.get('unfolded', tested)
    name, split = Path(data[0]).parts[0], ', '.join(data)
    found: list[EvalResult] = []
    for task, names in TASKS.items():
        numbers = {name: ('mAP', metrics[name]) for name in names if isinstance(metrics.get(name), float)}
        numbers = {name: value for name, value in numbers.items() if value[1] >= 0}  # COCO's -1: nothing to find
        found += measured(task, name, numbers, split, how)
    return found


def kept(metrics: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an evaluation: no latency, which belongs to a machine."""
    return {key: metrics[key] for key in KEPT if key in metrics}


def losses_by_epoch(folder: Path) -> list[float]:
    """Mean of the logged losses of each epoch, over all logs of the run; what was run twice counts once."""
    steps: dict[int, tuple[int, float]] = {}
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for number, line in enumerate(log.read_text(errors='replace').splitlines(), 1):
            try:
                entry = json.loads(line)
                wanted = 'loss' in entry and 'epoch' in entry and 'iter' in entry
            except (ValueError, TypeError) as error:
                raise DataError(f'{log}: line {number} is damaged ({error}); take it out, or train again') from error
            if wanted:
                steps[entry['iter']] = entry['epoch'], entry['loss']
    epochs: dict[int, list[float]] = {}
    for epoch, loss in steps.values():
        epochs.setdefault(epoch, []).append(loss)
    return [mean(epochs[epoch]) for epoch in sorted(epochs)]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one record a line."""
    write_atomically(path, lambda p: p.write_text(''.join(json.dumps(record) + '\n' for record in records)))


def markdown(records: list[dict[str, Any]]) -> str:
    """Table with one row a config: mean and standard deviation over its seeds.

    The difference to the first config is taken seed by seed: runs of one seed have the same stock weights at the start,
    and the same order of the data.

    Raises:
        DataError: runs of one config were tested on other data, or have one seed.
    """
    first: dict[str, dict[str, Any]] = {}
    seeds: set[tuple[str, Any]] = set()
    for record in records:
        name, data = record['config'], record.get('data')
        known = first.setdefault(name, record).get('data')
        if None not in (data, known) and data != known:
            raise DataError(f'{name}: was tested on {known} and on {data}; tabulate one set at a time')
        if record['seed'] is not None and (name, record['seed']) in seeds:
            raise DataError(f'{name}: has seed {record["seed"]} twice; give one run of each config and seed')
        seeds.add((name, record['seed']))
    lines = [
        '| config | seeds | AP | AP50 | AP - AP of the first, by seed | folded AP | calibrated | parameters | folded |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    base = {r['seed']: r['trained']['AP'] for r in records if r['config'] == records[0]['config']}
    for name in dict.fromkeys(record['config'] for record in records):
        runs = [record for record in records if record['config'] == name]
        trained = [run['trained'] for run in runs]
        folded = [run['folded'] for run in runs if 'folded' in run]
        calibrated = any(run.get('calibrated_on') for run in runs)
        cells = [
            f'`{name}`',
            ', '.join(str(run['seed']) for run in runs),
            spread([m['AP'] for m in trained]),
            spread([m['AP50'] for m in trained]),
            '' if runs[0] is records[0] else difference(runs, base),
            spread([m['AP'] for m in folded]) if folded else '',
            ('yes' if calibrated else 'no: exact') if folded else '',
            f'{trained[0]["parameters"]:,}',
            f'{folded[0]["parameters"]:,}' if folded else '',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def difference(runs: list[dict[str, Any]], base: dict[Any, float]) -> str:
    """AP minus that of the run of the same seed."""
    found = [run['trained']['AP'] - base[run['seed']] for run in runs if run['seed'] in base]
    return spread(found, '+.3f') if found else ''


def spread(values: list[float], form: str = '.3f') -> str:
    """Mean and standard deviation; without the latter for one value."""
    return f'{mean(values):{form}} ± {stdev(values):.3f}' if len(values) > 1 else f'{values[0]:{form}}'
