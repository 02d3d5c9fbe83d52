"""A family of pruned models from one run: FAR-100 is the distilled student, FAR-50 has half of its hidden units.

One training with the Hoyer-square regulariser makes units comparable; each member is then cut by one threshold of its
own, made smaller, and fine-tuned.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from asr_downstream.engine.loop import train
from asr_downstream.engine.state import checkpoints
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.far.config import derived, with_epochs
from asr_downstream.far.distil.stages import (
    build_task,
    finished,
    is_finished,
    load_student,
    load_teacher,
    load_weights,
    of_this_launch,
    replaced,
    say_once,
    students,
    world,
)
from asr_downstream.far.distil.task import Distillation
from asr_downstream.far.export import save_far
from asr_downstream.far.model.describe import describe
from asr_downstream.far.prune.budgets import Budget, cut
from asr_downstream.far.prune.scores import check_units, scores, shrink, units_above
from asr_downstream.files.atomic import first_line, write_json
from asr_downstream.plugging import describe as gates

__all__ = ['prune_family', 'ship_trained']

SHIPPED, CUT_FILE = 'shipped', 'cut.json'
STUDENT = 'FAR-100'  # before pruning


def ship_trained(config: Config, out: Path) -> list[Path]:
    """Write ``out/shipped/teacher`` and ``out/shipped/FAR-100`` from the stages of a config; on the main process."""
    if int(os.environ.get('RANK', '0')):
        return []
    with of_this_launch(out):
        return ship(config, out)


def ship(config: Config, out: Path) -> list[Path]:
    """See `ship_trained`."""
    found = [save_checked(config, load_teacher(config, out), out / SHIPPED / 'teacher', {'name': 'teacher'})]
    if after := students(config):
        student = load_student(config, out, after[-1])
        about = {'name': STUDENT, 'config': Path(config.filename).name}
        found.append(save_checked(config, student, out / SHIPPED / STUDENT, about))
    return found


def save_checked(config: Config, model: Any, folder: Path, about: dict[str, Any]) -> Path:
    """Write a model to a folder; gates are folded, and the folded model is compared with it on an input of its task."""
    inputs = build_task(config, model).example() if gates.describe(model).sites else None
    return save_far(model, folder, about, check=inputs)


def prune_family(
    config: Config,
    out: Path,
    budgets: Sequence[Budget],
    resume: bool = False,
    relative: bool = True,
    say: Callable[[str], None] = say_once,
) -> list[Path]:
    """Regularise the distilled student, then cut, fine-tune and ship a member for each budget.

    Args:
        config: a FAR config whose stages are finished; ``config.prune`` says how to train.
        out: folder of the stages; adds ``sparse``, a folder a member, and ``shipped/<member>``.
        budgets: of the members.
        resume: whether to pass over what is finished and continue what was interrupted.
        relative: see `cut`.
        say: takes lines for the user.

    Returns:
        Folders of the shipped members.

    Raises:
        AsrError: the stages are not finished, a budget cannot be met, or the family was pruned before.
    """
    with of_this_launch(out):
        return make_family(config, out, budgets, resume, relative, say)


def make_family(
    config: Config,
    out: Path,
    budgets: Sequence[Budget],
    resume: bool,
    relative: bool,
    say: Callable[[str], None],
) -> list[Path]:
    """See `prune_family`."""
    names = students(config)
    if not names or not all(finished(config, out, stage['name']) for stage in config.stages):
        raise AsrError(
            f'{out}: has no distilled student, or its stages are not finished; run tools/distill_far.py '
            f'{config.filename} first'
        )
    if len({budget.name for budget in budgets}) < len(budgets):
        raise AsrError(f'budgets: {", ".join(budget.name for budget in budgets)}: each can be given once')
    if any(budget.name == STUDENT for budget in budgets):
        raise AsrError(f'budgets: {STUDENT} is the student before pruning, which would be lost; give shares below 1')
    if world() > 1 and any(budget.kind == 'latency' for budget in budgets):
        raise AsrError('budgets: latency is measured on one process; run this without a launcher of several')
    teacher = load_teacher(config, out)
    sparse = derived(config, 'sparse', config.prune.get('sparse', {}))
    say(f'sparse: Hoyer-square regulariser, weight {sparse.hoyer:g}')
    student = load_student(config, out, names[-1])
    check_units(student)
    run_once(sparse, student, teacher, out / 'sparse', resume, say)
    shipped = []
    for budget in budgets:
        settings = derived(config, budget.name, config.prune.get('finetune', {}))
        member = load_weights(replaced(config, teacher), out / 'sparse').eval()
        threshold = cut_once(member, budget, settings, relative, out / budget.name / CUT_FILE if resume else None)
        if not int(os.environ.get('RANK', '0')):
            content = {'threshold': threshold, 'relative': relative, 'widths': member.replace_spec['widths']}
            write_json(out / budget.name / CUT_FILE, content)
        table = describe(member)
        units, every = sum(row.units for row in table.rows), sum(row.full for row in table.rows)
        say(f'{budget.name}: threshold {threshold:.4g}, {units:,} of {every:,} hidden units stay')
        run_once(settings, member, teacher, out / budget.name, resume, say)
        load_weights(member, out / budget.name).eval()
        about = {
            'name': budget.name,
            'budget': {budget.kind: budget.value},
            'threshold': threshold,
            'relative': relative,
        }
        if not int(os.environ.get('RANK', '0')):
            shipped.append(save_checked(settings, member, out / SHIPPED / budget.name, about))
    return shipped


def cut_once(model: Any, budget: Budget, settings: Config, relative: bool, file: Path | None) -> float:
    """Cut a model, or do as ``file`` says that it was cut before: a latency measured again would give other widths."""
    if file is not None and file.exists():
        content = read_cut(file)
        if content['relative'] != relative:
            raise AsrError(
                f'{file}: was cut by {"relative" if content["relative"] else "absolute"} norms; resume with the same'
            )
        shrink(model, units_above(scores(model, relative), content['threshold']))
        if model.replace_spec['widths'] != content['widths']:
            raise CheckpointError(
                f'{file}: its threshold {content["threshold"]:g} gives other widths than it says: it is damaged, or '
                f'the stage before was trained again; delete the folder, or prune without --resume'
            )
        return content['threshold']
    return cut(model, budget, build_task(settings, model).example(), relative)


def read_cut(file: Path) -> dict[str, Any]:
    """Read how a member was cut.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        threshold, relative, widths = content['threshold'], content['relative'], content['widths']
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f'{file}: is damaged ({first_line(error)[:120]}); delete it to cut again') from error
    number = type(threshold) in (int, float) and math.isfinite(threshold)
    if not number or not isinstance(relative, bool) or not isinstance(widths, dict):
        raise CheckpointError(f'{file}: is damaged (a value is of another kind); delete it to cut again')
    return content


def run_once(
    settings: Config, student: nn.Module, teacher: nn.Module, folder: Path, resume: bool, say: Callable[[str], None]
) -> None:
    """Train a student, or go on with it, or leave it if it is finished."""
    if resume and is_finished(settings, folder):
        say(f'{folder.name}: finished before')
        return
    task = Distillation(build_task(settings, student), copy.deepcopy(teacher), settings)
    task.use(with_epochs(settings, len(task.samples()), world()))  # type: ignore[arg-type]
    train(task, task.config, folder, 'latest' if resume and checkpoints.checkpoints_in(folder) else None)
