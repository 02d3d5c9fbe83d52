"""Folding a checkpoint: from a training checkpoint to a file that the stock config loads strictly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from safetensors.torch import save_file
from torch import Tensor, nn

from asr_downstream.detection.card import card_path, detector_card
from asr_downstream.detection.config import partly_stock_config, stock_config
from asr_downstream.detection.evaluation.calibrate import CalibrationPlan, check_exact, fold_over_images
from asr_downstream.detection.evaluation.results import tested_before
from asr_downstream.detection.models.detectors import build_detector, compare_features, load_detector
from asr_downstream.errors import AsrError, CheckpointError, FoldError
from asr_downstream.far.model.describe import mixers
from asr_downstream.files.atomic import aside, check_could_write, sha256, write_together
from asr_downstream.files.card import card_of
from asr_downstream.folding.adapters.apply import Given
from asr_downstream.folding.adapters.file import Adapter
from asr_downstream.folding.adapters.save import save_of_training
from asr_downstream.folding.adapters.ship import apply_to_file
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.report import FoldReport
from asr_downstream.folding.verify import Verification, check_same
from asr_downstream.measure.versions import versions
from asr_downstream.modules.copies import copy_of
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.weights import load_state

__all__ = ['apply_to_detector', 'fold_checkpoint', 'save_adapter_of_detector']

FORMATS = ('.pth', '.safetensors')


def fold_checkpoint(
    config: Config,
    checkpoint: Path,
    out: Path,
    trust: bool = False,
    calibrate: CalibrationPlan | None = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fold ``checkpoint`` and write four files that need nothing of this package.

    ``out``: the stock weights; ``<out>.py``: the stock config; beside them ``fold_report.json``: sites, measured
    errors, hashes, versions; and a model card, ``README.md``, or ``<out>.md`` where somebody has written a README.
    Before anything is written, the folded weights are loaded strictly into the model of the stock config, and its
    feature maps are compared with the plugged model's in float32 and float64. A stock model is shipped as it is.

    Args:
        config: the config it was trained with.
        checkpoint: what training wrote.
        out: file to write, ``.pth`` or ``.safetensors``.
        trust: see `asr_downstream.files.weights.read_checkpoint`.
        calibrate: how to replace gates that depend on the input by their mean; None folds exactly or not at all. Where
            its budget leaves sites plugged, ``<out>.py`` is a config of this package with those sites only.
        card: for the card, see `asr_downstream.files.card.card_of`.

    Returns:
        The report.

    Raises:
        CheckpointError, FoldError: it does not load, does not fold, or the result differs.
        AsrError: ``out`` cannot be written.
    """
    if out.suffix not in FORMATS:
        raise AsrError(f'{out}: the folded checkpoint should end in {" or ".join(FORMATS)}')
    for source in (checkpoint, Path(config.filename)):
        if source.resolve() in (out.resolve(), out.with_suffix('.py').resolve()):
            raise AsrError(f'{out}: would overwrite {source}; give the folded detector another name or folder')
    said = card_of(config, card)
    check_could_write(out.parent)
    plugged, meta = load_detector(config, checkpoint, trust)
    if any(True for _ in mixers(plugged)):
        raise FoldError(
            f'{checkpoint}: attention of this detector is replaced, as in no stock detector; use it with '
            f'the config it was trained with'
        )
    stock = not describe(plugged).sites
    if stock and calibrate is not None:
        raise CheckpointError(
            f'{checkpoint}: nothing to fold, the model of {config.filename} has no plug with gates; '
            f'leave out --calibrate'
        )
    if calibrate is None:
        check_exact(plugged, checkpoint, '--calibrate N')
    check_could_write(out.parent, sum(v.numel() * v.element_size() for v in plugged.state_dict().values()))
    if calibrate is not None and calibrate.max_drop is not None:
        partly_stock_config(config, [row.path for row in describe(plugged).sites])  # refuses now, not after an hour
    start = time.perf_counter()
    if stock:
        folded, report = plugged, FoldReport()
    else:
        folded, report = fold_exactly(plugged) if calibrate is None else fold_over_images(config, plugged, calibrate)
    seconds = time.perf_counter() - start
    if not report.sites and not stock:
        raise FoldError(
            f'{checkpoint}: the budget leaves every site plugged, so nothing was folded or written; raise --max-drop'
        )
    kept = [row.path for row in describe(folded).sites]
    plain = partly_stock_config(config, kept) if kept else stock_config(config)
    shipped = build_detector(plain)
    load_state(shipped, folded.cpu().state_dict(), checkpoint)
    if report.calibration is None:
        checks = {'float32': compared(plugged.float(), shipped.float(), checkpoint)}
        if not stock:
            exact = copy_of(plugged).double()  # where nothing but the algebra is left
            checks['float64'] = compared(exact, fold_exactly(exact)[0], checkpoint)
    else:  # the plugged model is another function; what is shipped is to be the folded one
        checks = {'float32': compared(folded, shipped, checkpoint)}
    content = report_content(config, checkpoint, report, checks, seconds)
    content['still_plugged'] = kept
    content['card'] = card_path(out).name
    tested = tested_before(checkpoint, content['checkpoint']['sha256'])
    text = detector_card(plain, out, content, meta, said, tested)

    write_shipped(out, shipped, plain, meta, content, text)
    return {**content, 'report': report}


def write_shipped(
    out: Path, shipped: nn.Module, config: Config, meta: dict[str, Any], content: dict[str, Any], card: str
) -> None:
    """Write what belongs together: weights, the config beside them, the model card, and the report.

    Args:
        out: file of the weights.
        shipped: the detector.
        config: that builds it.
        meta: of the checkpoint that it was made from.
        content: of the report; gets the hash of the weights.
        card: text of the model card.
    """

    def write_report(path: Path) -> None:
        content['folded'] = {'file': out.name, 'sha256': sha256(aside(out)), 'config': out.with_suffix('.py').name}
        path.write_text(json.dumps(content, indent=2) + '\n')

    write_together(
        {
            out: lambda p: write_weights(p, out.suffix, shipped, meta),
            out.with_suffix('.py'): lambda p: p.write_text(config.pretty_text),
            card_path(out): lambda p: p.write_text(card),
            out.parent / 'fold_report.json': write_report,
        }
    )


def compared(model: nn.Module, folded: nn.Module, checkpoint: Path) -> Verification:
    """Compare the feature maps of two detectors of one precision.

    Raises:
        FoldError: they differ.
    """
    found = compare_features(model, folded)
    check_same(found, folded, str(checkpoint))
    return found


def write_weights(path: Path, suffix: str, stock: nn.Module, meta: dict[str, Any]) -> None:
    """Write the stock weights; a ``.pth`` also says which classes the boxes have, as mmdet's inference expects."""
    state = {k: v.clone(memory_format=torch.contiguous_format) for k, v in stock.state_dict().items()}
    if suffix == '.safetensors':
        save_file(state, path, {'format': 'pt'})
    else:
        kept = {k: meta[k] for k in ('dataset_meta', 'epoch', 'iter', 'seed') if k in meta}
        torch.save({'state_dict': state, 'meta': kept}, path)


def report_content(
    config: Config, checkpoint: Path, report: FoldReport, checks: dict[str, Verification], seconds: float
) -> dict[str, Any]:
    """Gather what a reader of the report wants to know."""
    return {
        'config': str(config.filename),
        'checkpoint': {'file': str(checkpoint), 'sha256': sha256(checkpoint)},
        'spec': report.spec,
        'fold_seconds': round(seconds, 3),
        'strict_load': True,
        'feature_map_difference': {
            precision: {'absolute': v.absolute, 'relative': v.relative} for precision, v in checks.items()
        },
        'sites': [asdict(site) for site in report.sites],
        'calibration': None if report.calibration is None else report.calibration.as_dict(),
        'versions': versions(),
    }


def save_adapter_of_detector(
    config: Config,
    checkpoint: Path,
    out: Path,
    heads: Sequence[str] | str | None = None,
    base: Path | None = None,
    learnt: bool = False,
    trust: bool = False,
) -> Adapter:
    """Write what the gates of a checkpoint have learnt, see `asr_downstream.save_gates`.

    The base is ``base``, or what the training has remembered in the folder of the checkpoint, or the file that the
    config starts from (``load_from``).

    Raises:
        CheckpointError, FoldError: the checkpoint does not load or fold, or its base was trained.
    """
    check_could_write(out.parent)
    model, meta = load_detector(config, checkpoint, trust)
    start = config.get('load_from')
    known = Path(start) if isinstance(start, str) and Path(start).is_file() else None
    classes = (meta.get('dataset_meta') or {}).get('classes')
    about = {'classes': list(map(str, classes))} if classes else {}
    return save_of_training(model, out, checkpoint.parent, heads, base, known, learnt=learnt, about=about)


def apply_to_detector(
    config: Config, base: Path, adapters: Sequence[Given], out: Path, force: bool = False, trust: bool = False
) -> dict[str, Any]:
    """Apply adapters to a checkpoint of MMDetection; beside the new one, its stock config as ``<out>.py``.

    The weights are loaded strictly into the model of that config before anything is written.

    Args:
        config: of the training or stock; its heads are those of the result.
        base: stock checkpoint.
        adapters: see `asr_downstream.folding.adapters.apply.given`.
        out: see `asr_downstream.folding.adapters.ship.apply_to_file`; likewise the rest.
        force: see above.
        trust: see above.
    """
    written = out.with_suffix('.py')
    if written.resolve() == Path(config.filename).resolve():
        raise AsrError(f'{written}: would overwrite the config that is read; give another name or folder')
    plain = stock_config(config)

    def config_of(state: dict[str, Tensor]) -> dict[Path, Callable[[Path], Any]]:
        load_state(build_detector(plain), state, base)
        return {written: lambda path: path.write_text(plain.pretty_text)}

    return apply_to_file(base, adapters, out, force, trust, config_of)
