"""The second part of the demo: a ViT learns digits, LSTMs replace all its attention, half of their units are pruned."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from asr_downstream.engine.config import CONFIG_FILE
from asr_downstream.far.config import load_config
from asr_downstream.far.distil.stages import run_stages
from asr_downstream.far.evaluation.evaluate import (
    TEACHER,
    compare_relations,
    load_family,
    measure_family,
    table,
    task_of,
)
from asr_downstream.far.export import FAR_FILE
from asr_downstream.far.family import prune_family, ship_trained
from asr_downstream.far.prune.budgets import Budget
from asr_downstream.files.atomic import write_json
from asr_downstream.measure.versions import versions

__all__ = ['run_demo']

CONFIG = 'vit-w64_digits.py'
FULL, HALF = 'FAR-100', 'FAR-50'
POINT = 0.01
IMAGES = 32  # whose token relations are compared


def run_demo(out: Path, configs: Path, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run everything and write ``out/summary.json``, ``out/relations.png`` and the models ``out/shipped``.

    Args:
        out: folder to write; an earlier demo there is replaced.
        configs: folder of the configs.
        options: overrides of the config.

    Returns:
        The summary; ``summary['checks']`` says what held.
    """
    begin = time.perf_counter()
    for folder in {path.parent for name in (CONFIG_FILE, FAR_FILE) for path in out.glob(f'**/{name}')}:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
    config = load_config(configs / CONFIG, options)
    run_stages(config, out)
    ship_trained(config, out)
    prune_family(config, out, [Budget('units', 0.5)])
    models = load_family(out)
    task = task_of(out, models[TEACHER])
    numbers = measure_family(models, task)
    relations = compare_relations(models, task, IMAGES, out / 'relations.png')
    half, teacher = numbers[HALF], numbers[TEACHER]
    alike = {name: sum(scores.values()) / len(scores) for name, scores in relations.items()}
    summary = {
        'models': numbers,
        'images': len(task.held_out),
        'relations': alike,
        'checks': {
            'FAR_50_is_within_one_point_of_the_teacher': half['accuracy'] >= teacher['accuracy'] - POINT,
            'FAR_50_has_fewer_parameters_than_the_teacher': half['parameters'] < teacher['parameters'],
        },
        'versions': versions(),
        'wall_seconds': round(time.perf_counter() - begin, 1),
    }
    write_json(out / 'summary.json', summary)
    print(table(numbers, len(task.held_out)))
    found = ', '.join(f'{name} {value:.2f}' for name, value in alike.items())
    print(
        f'similarity of token relations to the attention of the teacher: {found}\n'
        f'{out / "relations.png"}: token relations\n{out / "shipped"}: the models\n'
        f'{out / "summary.json"}: all numbers\n{summary["wall_seconds"]:.0f} s in all'
    )
    return summary
