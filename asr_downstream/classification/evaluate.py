"""What a run has learnt: accuracy of its last weights on the images held out, plugged and folded, and what ships."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr_downstream.classification.export import check_target, is_shipped, save_classifier
from asr_downstream.classification.task import Classification
from asr_downstream.engine.classification import accuracy, logits
from asr_downstream.engine.launch import world
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.train_state import AVERAGE, WEIGHTS
from asr_downstream.engine.trackers import read_log
from asr_downstream.files.atomic import sha256, write_json
from asr_downstream.files.configs import plain
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.folding.calibrated import fold_calibrated
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.report import FoldReport
from asr_downstream.measure.cost import parameters
from asr_downstream.measure.versions import versions
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.weights import check_weights_finite, load_state

__all__ = ['EVALUATION', 'SHIPPED', 'evaluate_run', 'folded', 'trained', 'verdict']

EVALUATION, SHIPPED = 'evaluation.json', 'shipped'
CHECKED = 16  # images on which plugged and folded model are compared number by number


def evaluate_run(task: Classification, checkpoint: Path, calibrate: int | None = None) -> dict[str, Any]:
    """Measure the weights of a checkpoint, fold them, write ``evaluation.json`` and the shipped folder of the run.

    The weights are the last ones, or their average, never the best: accuracy on images that chose the weights would
    be too high.

    Args:
        task: of the run.
        checkpoint: its last one.
        calibrate: training images to replace gates that depend on the input by their mean over; None: such a run is
            measured as it is, and nothing is shipped.

    Returns:
        What is in the file.

    Raises:
        CheckpointError: the weights are not those of the task.
        FoldError: the model does not fold to what it computes.
        AsrError: there is something else in the place of the shipped folder, or nothing can be written.
    """
    run = checkpoint.parent
    check_target(run / SHIPPED)
    weights = next((p for p in (checkpoint / AVERAGE, checkpoint / WEIGHTS) if p.is_file()), checkpoint / WEIGHTS)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model = trained(task, weights)
    found: dict[str, Any] = {'plugged': accuracy(model.to(device), task)}
    stock, report = folded(task, model.cpu(), calibrate)
    if stock is not None:
        found['folded'] = accuracy(stock.to(device), task)
    config = task.config
    step = checkpoints.step_of(checkpoint)
    content = {
        'config': Path(config.filename).name,
        'model': plain(config.model),
        'plug': plain(config.plug),
        'seed': config.seed,
        'step': step,
        'epochs': round(step_epochs(task, step or 0), 4),
        'weights': {'file': weights.name, 'sha256': sha256(weights)},
        'data': data_name(task),
        'training_images': len(task.train_indices),
        'images': len(task.held_out),
        'accuracy': {**found, 'folded': found.get('folded')},
        'difference': None if report is None or report.checked is None else report.checked.relative,
        'calibration': None if report is None or report.calibration is None else report.calibration.as_dict(),
        'parameters': {'plugged': parameters(model), 'folded': None if stock is None else parameters(stock)},
        'validations': [
            {'step': row['step'], 'epoch': round(step_epochs(task, row['step']), 4), 'accuracy': row['val/accuracy']}
            for row in read_log(run / 'log.jsonl', last_step=step, having='val/accuracy')
        ],
        'versions': versions(),
    }
    # the folder first: numbers without it would make the run look complete
    if stock is not None:
        save_classifier(stock.cpu(), run / SHIPPED, facts(task, content))
    elif is_shipped(run / SHIPPED):  # of an earlier step, or with other gates
        shutil.rmtree(run / SHIPPED)
    write_json(run / EVALUATION, content)
    return content


def trained(task: Classification, weights: Path) -> nn.Module:
    """The model of a task with the weights of a file, plugged, in eval mode, on the CPU.

    Raises:
        CheckpointError: they do not fit, or are not finite.
    """
    model = task.build()
    state = state_dict_of(read_checkpoint(weights), weights)
    check_weights_finite(state, weights, model)
    load_state(model, state, weights)
    return model.eval()


def folded(
    task: Classification, model: nn.Module, calibrate: int | None = None
) -> tuple[nn.Module | None, FoldReport | None]:
    """Fold a trained model, compared with it on images held out; None: its gates depend on the input.

    Raises:
        FoldError: it does not fold, or to something else.
    """
    sites = describe(model).sites
    check = batches(task, task.held_out[:CHECKED])
    if any(not site.folds for site in sites):
        if calibrate is None:
            return None, None
        order = torch.randperm(len(task.train_indices), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = sorted(task.train_indices[n] for n in order[:calibrate])
        return fold_calibrated(model, batches(task, chosen), step=run_logits, check=check)
    if not sites:
        return model, None
    return fold_exactly(model, step=run_logits, check=check)


def batches(task: Classification, indices: list[int]) -> list[dict[str, Any]]:
    """Arguments of the model for images of these indices, on the CPU."""
    found = []
    for batch in task.loader(indices):
        task.to(torch.device('cpu'))
        found.append(task.inputs(task.prepare(batch)))
    return found


def run_logits(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Run a model on one of `batches`."""
    return logits(model(**batch))


def step_epochs(task: Classification, step: int) -> float:
    """Epochs of a number of optimiser steps of this launch."""
    config = task.config
    images = config.train_batch_size * config.gradient_accumulation_steps * world()
    return step * images / len(task.train_indices)


def data_name(task: Classification) -> str:
    """Name of the data, without the folders of this machine."""
    named = str(task.config.data.get('path') or task.config.data.type)
    return Path(named).name if Path(named).exists() else named


def facts(task: Classification, content: dict[str, Any]) -> dict[str, Any]:
    """What `save_classifier` writes beside the weights."""
    config = task.config
    names = list(task.all_images.source.classes) or [str(n) for n in range(task.classes)]
    training = {key: content[key] for key in ('config', 'plug', 'seed', 'step', 'training_images', 'weights')}
    return {
        'model': content['model'],
        'classes': names,
        'resolution': task.all_images.resolution,
        'channels': config.channels,
        'image_mean': plain(config.image_mean),
        'image_std': plain(config.image_std),
        'training': training,
        'accuracy': content['accuracy']['folded'],
        'data': content['data'],
        'images': content['images'],
    }


def verdict(content: dict[str, Any], run: Path) -> str:
    """Lines for the user."""
    plugged, stock = content['accuracy']['plugged'], content['accuracy']['folded']
    lines = [f'accuracy on {content["images"]:,} images held out, last epoch: {plugged:.4f}']
    if stock is None:
        lines.append(
            'its gates depend on the input, so nothing was folded; --calibrate N replaces them by their mean over N '
            'training images'
        )
    else:
        lines.append(f'folded: {stock:.4f}; shipped: {run / SHIPPED}')
    return '\n'.join([*lines, str(run / EVALUATION)])
