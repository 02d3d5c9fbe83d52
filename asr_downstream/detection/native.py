"""Removing the attention that a stock detector has by itself, and shipping what is left."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.device import get_device
from torch import nn

from asr_downstream.detection.card import card_path, detector_card
from asr_downstream.detection.config import REMOVED, stock_config
from asr_downstream.detection.evaluation.calibrate import (
    CalibrationPlan,
    calibration_batches,
    check_exact,
    preprocessed_features,
)
from asr_downstream.detection.evaluation.evaluate import evaluate
from asr_downstream.detection.export import FORMATS, compared, report_content, write_shipped
from asr_downstream.detection.models.detectors import build_detector, load_detector
from asr_downstream.errors import AsrError, CheckpointError, DataError, FoldError
from asr_downstream.files.atomic import check_could_write
from asr_downstream.files.card import card_of
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.native.fold import fold_native
from asr_downstream.folding.native.report import NativeReport
from asr_downstream.folding.report import FoldReport
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.weights import load_state

__all__ = ['remove_attention']

# Arguments of parts of MMDetection's models that leave their attention out: CSPNeXt, the backbone of RTMDet.
SWITCHES: dict[str, Any] = {'channel_attention': False}


def remove_attention(
    config: Config,
    checkpoint: Path,
    out: Path,
    plan: CalibrationPlan,
    trust: bool = False,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Remove the attention of a detector, see `asr_downstream.fold_native`, and write it like a folded one.

    ``out``: the weights; ``<out>.py``: the config; ``fold_report.json`` and a model card. Where MMDetection can build
    the detector without its attention, the config says so and is a stock one. Otherwise the config names the blocks
    under the key ``removed_attention``: before the weights are loaded, ``nn.Identity`` has to take their places, as the
    card shows; commands of this package do it by themselves. Plugs with constant gates are folded first.

    Args:
        config: the config it was trained with.
        checkpoint: what training wrote.
        out: file to write, ``.pth`` or ``.safetensors``.
        plan: number of training images, and the AP that may be lost.
        trust: see `asr_downstream.files.weights.read_checkpoint`.
        card: for the card, see `asr_downstream.files.card.card_of`.

    Returns:
        The report; ``report['report']`` prints.

    Raises:
        CheckpointError, FoldError: it does not load, has no attention, or none that can be removed within the budget.
        AsrError: ``out`` cannot be written.
    """
    if out.suffix not in FORMATS:
        raise AsrError(f'{out}: the checkpoint should end in {" or ".join(FORMATS)}')
    for source in (checkpoint, Path(config.filename)):
        if source.resolve() in (out.resolve(), out.with_suffix('.py').resolve()):
            raise AsrError(f'{out}: would overwrite {source}; give the detector another name or folder')
    if plan.max_drop is not None and not plan.evaluate:
        raise DataError('max_drop is about AP, which has to be measured: leave evaluate=True')
    if config.get(REMOVED):
        raise FoldError(
            f'{config.filename}: its attention was removed before; start from the config it was trained with'
        )
    said = card_of(config, card)
    check_could_write(out.parent)
    model, meta = load_detector(config, checkpoint, trust)
    first = FoldReport()
    if describe(model).sites:
        check_exact(model, checkpoint, '--calibrate N alone, first')
        model, first = fold_exactly(model)
    start = time.perf_counter()
    folded, found = removed(config, model, plan)
    if not found.removed:
        reasons = '; '.join(f'{block.path} {block.kept}' for block in found.blocks[:3])
        raise FoldError(f'{checkpoint}: no attention could be removed, so nothing was written ({reasons})')
    seconds = time.perf_counter() - start
    plain = without(config, folded, found, checkpoint)
    shipped = build_detector(plain)
    load_state(shipped, folded.cpu().state_dict(), checkpoint)
    content = report_content(config, checkpoint, first, {'float32': compared(folded, shipped, checkpoint)}, seconds)
    content.update(still_plugged=[], native=found.as_dict(), **{REMOVED: list(plain.get(REMOVED, ()))})
    content['card'] = card_path(out).name
    text = detector_card(plain, out, content, meta, said)
    write_shipped(out, shipped, plain, meta, content, text)
    return {**content, 'report': found}


def removed(config: Config, model: nn.Module, plan: CalibrationPlan) -> tuple[nn.Module, NativeReport]:
    """Fold the attention of a detector over its own training images; the metric is AP on the test set."""
    model.to(get_device())

    def ap(detector: nn.Module) -> float:
        return evaluate(config, detector, 'AP').metrics['AP']

    return fold_native(
        model,
        calibration_batches(config, plan.images, plan.seed),
        step=preprocessed_features,
        metric=ap if plan.evaluate else None,
        max_drop=plan.max_drop,
    )


def without(config: Config, folded: nn.Module, report: NativeReport, checkpoint: Path) -> Config:
    """Config of the detector that is left: a stock one, or one that names what was removed."""
    plain = stock_config(config)
    if all(not block.kept for block in report.blocks):
        for switched in switches(plain):
            try:
                load_state(build_detector(switched), folded.state_dict(), checkpoint)
            except (CheckpointError, TypeError):
                continue
            return switched
    plain[REMOVED] = list(report.removed)
    return plain


def switches(config: Config) -> Iterator[Config]:
    """Configs whose parts take one of `SWITCHES`, set in all of them."""
    for name, value in SWITCHES.items():
        switched = copy.deepcopy(config)
        set_switch = partial(switch, name=name, value=value)
        if set_switch(switched.model):
            yield switched


def switch(node: Any, name: str, value: Any) -> bool:
    """Set an argument in all parts of a model's config whose classes take it, in place; whether there are any."""
    if not isinstance(node, dict):
        found = [switch(part, name, value) for part in node] if isinstance(node, list | tuple) else []
        return any(found)
    found = [switch(part, name, value) for part in node.values()]
    kind = node.get('type')
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if inspect.isclass(cls) and name in inspect.signature(cls).parameters:
        node[name] = value
        return True
    return any(found)
