"""Testing a checkpoint: the detector, or the detector beside its folded self."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from mmengine.config import Config

from asr_downstream.detection.calibrating import CalibrationPlan, fold_calibrated
from asr_downstream.detection.coco import check_datasets
from asr_downstream.detection.detectors import load_detector
from asr_downstream.detection.evaluation import Comparison, Evaluation, compare, evaluate, first_image, measure_latency
from asr_downstream.errors import CheckpointError
from asr_downstream.files import sha256, write_json
from asr_downstream.folding import fold
from asr_downstream.versions import versions

__all__ = ['evaluate_checkpoint']


def evaluate_checkpoint(
    config: Config,
    checkpoint: Path,
    out: Path,
    folding: str | None = None,
    trust: bool = False,
    plan: CalibrationPlan | None = None,
) -> str:
    """Evaluate a checkpoint, with ``folding`` beside its folded copy; write ``out`` and return the table.

    Args:
        config: the config it was trained with.
        checkpoint: what training wrote.
        out: JSON file to write.
        folding: None, ``'exact'``, or ``'calibrated'`` (input-dependent gates become their mean, as ``plan`` says).
        trust: see `asr_downstream.checkpoint.read_checkpoint`.
        plan: for ``'calibrated'``.

    Raises:
        AsrError: data or checkpoint are missing or unsound, or the model does not fold.
    """
    check_datasets(config, 'test_dataloader', *(['train_dataloader'] if folding == 'calibrated' else []))
    model, _ = load_detector(config, checkpoint, trust)
    result: Evaluation | Comparison
    text, calibration = '', None
    if folding:
        if folding == 'exact':
            folded, report = fold(model)
        else:
            folded, report = fold_calibrated(config, model, plan or CalibrationPlan())
        if report.already_stock:
            raise CheckpointError(
                f'{checkpoint}: nothing to fold, {config.filename} plugs nothing; test without --fold'
            )
        result = compare(config, model, folded)
        text, calibration = f'{report}\n', report.calibration
    else:
        result = evaluate(config, model, 'detector')
        result.latency_ms = median(measure_latency({'detector': model}, first_image(config))['detector'])
    content = result.as_dict()
    if calibration is not None:
        content['calibration'] = calibration.as_dict()
    provenance = {'config': str(config.filename), 'checkpoint': str(checkpoint), 'sha256': sha256(checkpoint)}
    write_json(out, {**content, **provenance, 'versions': versions()})
    return f'{text}{result}'
