"""Testing a checkpoint: the detector, or the detector beside its folded self."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from rich.table import Table
from torch import nn

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.console.text import render
from asr_downstream.detection.data.coco import check_datasets, named_sets
from asr_downstream.detection.evaluation.augmented import augmented
from asr_downstream.detection.evaluation.calibrate import CalibrationPlan, check_exact, fold_over_images
from asr_downstream.detection.evaluation.compare import compare
from asr_downstream.detection.evaluation.evaluate import Evaluation, evaluate, first_image, measure_latency, metric
from asr_downstream.detection.evaluation.pictures import show_each
from asr_downstream.detection.evaluation.scores import tools as scoring_tools
from asr_downstream.detection.models.detectors import load_detector
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import check_could_write, sha256, write_json
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.measure.versions import versions
from asr_downstream.plugging.describe import describe

__all__ = ['TestPlan', 'evaluate_checkpoint']


@dataclass(frozen=True)
class TestPlan:
    """What to do besides the metrics.

    Attributes:
        folding: None, ``'exact'``, or ``'calibrated'`` (input-dependent gates become their mean, see ``calibration``).
        calibration: for ``'calibrated'``.
        fast: score with faster-coco-eval.
        tta: also test with augmentation, the folded model if there is one.
        per_class: print AP class by class.
        show_dir: folder for pictures of the detections.
        show_images: number of pictures.
        trust: see `asr_downstream.files.weights.read_checkpoint`.
    """

    __test__ = False  # no test, says pytest

    folding: str | None = None
    calibration: CalibrationPlan = CalibrationPlan()
    fast: bool = False
    tta: bool = False
    per_class: bool = False
    show_dir: Path | None = None
    show_images: int = 20
    trust: bool = False


def evaluate_checkpoint(
    config: Config, checkpoint: Path, out: Path, plan: TestPlan, processes: Processes = ALONE
) -> str:
    """Evaluate a checkpoint, if asked for beside its folded copy; write ``out`` and return the tables.

    Args:
        config: the config it was trained with.
        checkpoint: what training wrote.
        out: JSON file to write.
        plan: what to do.
        processes: share the test; all of them call this, the first one measures speed, writes and has the tables.

    Raises:
        AsrError: data or checkpoint are missing or unsound, or the model does not fold.
    """
    check_datasets(config, 'test_dataloader', *(['train_dataloader'] if plan.folding == 'calibrated' else []))
    for folder in filter(None, (out.parent, plan.show_dir)):
        check_could_write(folder)
    if plan.fast:
        scoring_tools(fast=True)
    model, _ = load_detector(config, checkpoint, plan.trust)
    if plan.folding and not describe(model).sites:
        raise CheckpointError(
            f'{checkpoint}: nothing to fold, the model of {config.filename} has no gates; test without --fold'
        )
    if plan.folding == 'exact':
        check_exact(model, checkpoint, '--fold calibrated --calibrate N')
    if plan.tta:
        augmented(config, model)  # refuses now, not after the test
    pictures = plan.show_images if plan.show_dir else 0
    texts: list[str] = []
    content: dict[str, Any] = {}
    last = model
    if plan.folding:
        if plan.folding == 'exact':
            last, report = fold_exactly(model)
        else:
            last, report = fold_over_images(config, model, plan.calibration, processes)
        comparison = compare(config, model, last, plan.fast, pictures, processes)
        evaluations = [comparison.unfolded, comparison.folded]
        content = comparison.as_dict()
        if report.calibration is not None:
            content['calibration'] = report.calibration.as_dict()
        texts += [str(report), str(comparison)]
    else:
        result = evaluate(config, model, 'detector', plan.fast, pictures, processes)
        image = first_image(config)
        result.latency_ms = median(processes.first(lambda: measure_latency({'detector': model}, image))['detector'])
        evaluations = [result]
        content = result.as_dict()
        texts.append(str(result))
    if plan.tta:
        tested = evaluate_augmented(config, last, f'{evaluations[-1].name}, TTA', plan.fast, processes)
        evaluations.append(tested)
        content['tta'] = {**tested.metrics, 'classes': tested.classes}
        texts.append(str(tested))
    if not processes.is_first:
        return ''
    if plan.per_class:
        texts.append(by_class(evaluations))
    if plan.show_dir:
        with_pictures = [e for e in evaluations if e.seen]
        written = show_each(plan.show_dir, with_pictures, list(evaluations[0].classes) or config_classes(config))
        texts.append(f'{plan.show_dir}: {len(written)} pictures')
    provenance = {
        'config': str(config.filename),
        'checkpoint': str(checkpoint),
        'sha256': sha256(checkpoint),
        'data': named_sets(config, 'test_dataloader'),
        'scored_with': 'faster-coco-eval' if plan.fast else 'pycocotools',
    }
    write_json(out, {**content, **provenance, 'versions': versions()})
    return '\n'.join(texts)


def evaluate_augmented(
    config: Config, model: nn.Module, name: str, fast: bool, processes: Processes = ALONE
) -> Evaluation:
    """Evaluate with test-time augmentation."""
    changed, wrapped = augmented(config, model)
    return evaluate(changed, wrapped, name, fast, processes=processes)


def config_classes(config: Config) -> list[str]:
    """Names of the classes of the test data, where the metric does not give them."""
    return list(Runner.build_dataloader(config.test_dataloader).dataset.metainfo['classes'])


def by_class(evaluations: list[Evaluation]) -> str:
    """Table of AP, one row a class."""
    kinds = list(next(iter(evaluations[0].classes.values()), {}))
    heads = [f'{e.name}, {kind}' if len(kinds) > 1 else e.name for e in evaluations for kind in kinds]
    table = Table('class', *heads, title='AP by class')
    for column in table.columns[1:]:
        column.justify = 'right'
    for name in evaluations[0].classes:
        table.add_row(name, *(metric(e.classes[name].get(kind, -1.0)) for e in evaluations for kind in kinds))
    return render(table)
