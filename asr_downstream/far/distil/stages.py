"""The stages of a FAR config, one training each, in folders beside each other: teacher, distillation, fine-tuning."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from asr_downstream.engine.launch import world
from asr_downstream.engine.loop import check_folder, check_is_new, train
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.train_state import AVERAGE, WEIGHTS, Progress, check_same_run, read_progress
from asr_downstream.errors import CheckpointError
from asr_downstream.far.config import stage_config, with_epochs
from asr_downstream.far.distil.task import Distillation
from asr_downstream.far.model.describe import describe
from asr_downstream.far.model.replace import replace
from asr_downstream.far.prune.scores import check_units
from asr_downstream.files.configs import plain
from asr_downstream.files.locks import check_free, occupied
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.measure import cost
from asr_downstream.plugging.weights import check_weights_finite, load_state
from asr_downstream.registry import TASKS, build, find

__all__ = [
    'build_task', 'finished', 'is_finished', 'load_student', 'load_teacher', 'load_weights',
    'of_this_launch', 'plan', 'replaced', 'run_stages', 'say_once', 'students', 'world',
]  # fmt: skip


def build_task(config: Config, model: nn.Module | None = None) -> Any:
    """Build the task of a config, around a model, or around the teacher.

    Raises:
        AsrError: it is not known, or does not fit.
    """
    return build(TASKS, plain(config.task), {'config': config, 'model': model})


def say_once(line: str) -> None:
    """Print a line, on the first process alone."""
    if not int(os.environ.get('RANK', '0')):
        print(line, flush=True)


def run_stages(config: Config, out: Path, resume: bool = False, say: Callable[[str], None] = say_once) -> Path:
    """Train all stages, one after the other.

    Args:
        config: see `asr_downstream.far.config.load_config`.
        out: folder; a stage is in the folder of its name.
        resume: whether to pass over finished stages and continue the one that was interrupted.
        say: takes lines for the user.

    Returns:
        Folder of the last stage.

    Raises:
        AsrError: something does not fit, or a stage was trained before and ``resume`` is not set.
    """
    names = [stage['name'] for stage in config.stages]
    tasks = {}
    if not resume:
        if not int(os.environ.get('RANK', '0')):
            check_free(out)
        for name in names:
            check_is_new(out / name, None)
        # what does not fit is refused before anything is written, and before a teacher is trained
        tasks[names[0]] = stage_task(config, names[0], out)
        student = tasks[names[0]].model
        if names[0] not in students(config) and students(config):
            with torch.random.fork_rng():
                student = replaced(config, student)
        if any(stage_config(config, name).hoyer for name in students(config)):
            check_units(student)
    with of_this_launch(out):
        if not resume:
            for name in names:
                check_folder(out / name, None)
        for number, name in enumerate(names, 1):
            if resume and finished(config, out, name):
                say(f'stage {number}/{len(names)}, {name}: finished before')
                continue
            settings = stage_config(config, name)
            say(f'stage {number}/{len(names)}, {name}: {settings.learns} learn')
            task = tasks.pop(name, None) or stage_task(config, name, out)
            latest = 'latest' if resume and checkpoints.checkpoints_in(out / name) else None
            train(task, task.config, out / name, latest)
    return out / names[-1]


@contextmanager
def of_this_launch(out: Path) -> Iterator[None]:
    """Lock the folder of the stages for this launch inside the block; its first process holds the lock.

    Raises:
        AsrError: another one has it.
    """
    with occupied(out) if not int(os.environ.get('RANK', '0')) else nullcontext():
        yield


def stage_task(config: Config, name: str, out: Path) -> Any:
    """Build the task of a stage, with the weights of the stages before it, which are finished."""
    settings = stage_config(config, name)
    if settings.learns == 'teacher':
        task = build_task(settings)
    else:
        teacher = load_teacher(config, out)
        before = students(config)
        before = before[: before.index(name)]
        student = load_student(config, out, before[-1]) if before else replaced(config, teacher)
        task = Distillation(build_task(settings, student), teacher, settings)
    task.use(with_epochs(settings, len(task.samples()), world()))
    return task


def students(config: Config) -> list[str]:
    """Names of the stages that train the student."""
    return [stage['name'] for stage in config.stages if stage.get('learns', config.learns) != 'teacher']


def finished(config: Config, out: Path, name: str) -> bool:
    """Whether a stage was trained to its end, by what its last checkpoint says."""
    return is_finished(stage_config(config, name), out / name)


def is_finished(settings: Config, run: Path) -> bool:
    """Whether a run is a training of this config, to its end.

    Epochs are counted in the images that the run was trained on; neither model nor data is opened.

    Raises:
        CheckpointError: it is of another one.
    """
    if not checkpoints.checkpoints_in(run):
        return False
    checkpoint = checkpoints.find(run)
    found = read_progress(checkpoint)
    images = found.settings.get('images')
    if type(images) is not int:
        raise CheckpointError(f'{checkpoint}: does not say on how many images it was trained; train it again')
    settings = with_epochs(settings, images, world())
    task = find(TASKS, settings.task['type'])
    expected = Progress.of(settings, world(), images, task.fixed)
    check_same_run(found, expected, checkpoint, task.fixed, task.schema.defaults, lambda line: None)
    return found.step >= settings.max_train_steps


def load_teacher(config: Config, out: Path) -> Any:
    """The teacher, with the weights of the config, or of the stage that trained it."""
    model = build_task(config).model.eval()
    for stage in config.stages:
        if stage.get('learns', config.learns) == 'teacher':
            load_weights(model, out / stage['name'])
    return model


def load_student(config: Config, out: Path, name: str) -> Any:
    """The student with the weights of a stage."""
    return load_weights(replaced(config, build_task(config).model), out / name).eval()


def plan(config: Config) -> str:
    """Say what would be replaced and trained, without the weights."""
    first = stage_config(config, config.stages[0]['name'])
    task = build_task(first)
    student = replaced(config, task.model)
    lines = [str(describe(student)), f'{cost.parameters(task.model):,} -> {cost.parameters(student):,} parameters']
    for stage in config.stages:
        settings = with_epochs(stage_config(config, stage['name']), len(task.samples()), world())
        what = f'distance {plain(settings.distance)}' if settings.distance else 'loss of the task alone'
        lines.append(f'{stage["name"]}: {settings.learns} learn, {settings.max_train_steps} steps, {what}')
    return '\n'.join(lines)


def replaced(config: Config, teacher: nn.Module) -> Any:
    """A copy of a teacher with its attention replaced."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    replace(student, plain(config.replace))
    return student


def load_weights(model: Any, run: Path) -> Any:
    """Load the weights of the newest complete checkpoint of a run; averaged ones, if it has some.

    Raises:
        CheckpointError: there is none, or they do not fit.
    """
    checkpoint = checkpoints.find(run)
    weights = next(
        (path for path in (checkpoint / AVERAGE, checkpoint / WEIGHTS) if path.is_file()), checkpoint / WEIGHTS
    )
    state = state_dict_of(read_checkpoint(weights), weights)
    check_weights_finite(state, weights, model)
    load_state(model, state, weights)
    return model
