"""Shipping a run: a folder of diffusers' own, that loads where this package is not installed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from asr_downstream.console.text import some
from asr_downstream.diffusion.card import Metadata, far_card, model_card
from asr_downstream.diffusion.evaluation.fold import as_trained, compare, fold_run, verify_forward
from asr_downstream.diffusion.evaluation.pictures import save_grid
from asr_downstream.diffusion.evaluation.results import Result, read_results
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.models.conditions import Text
from asr_downstream.diffusion.pipelines import folder_of, pipeline_of
from asr_downstream.diffusion.runs import Run, load_run
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.far.export import save_far
from asr_downstream.files.atomic import check_writable, files_in, not_ours, sha256, whole_folder, write_json
from asr_downstream.files.configs import plain
from asr_downstream.folding.adapters.file import Adapter
from asr_downstream.folding.adapters.save import save_of_training
from asr_downstream.folding.report import FoldReport
from asr_downstream.folding.verify import check_same
from asr_downstream.measure.cost import parameters
from asr_downstream.measure.versions import versions
from asr_downstream.plugging.describe import describe

__all__ = ['fold_and_ship', 'save_adapter_of_run', 'save_pipeline']

REPORT = 'fold_report.json'
PICTURES, PICTURE_STEPS = 16, 50


def fold_and_ship(
    run: Run, out: Path, calibrate: int | None = None, metadata: Metadata | None = None
) -> dict[str, Any]:
    """Fold the model of a run, if it has a plug, and write a folder that plain diffusers loads.

    It holds the pipeline (safetensors only), a model card, ``samples.png`` and ``fold_report.json``. It is written
    aside, read back, compared with the model of the run, and then renamed. A run whose attention is replaced is written
    by `asr_downstream.far.export.save_far`, which needs this package.

    Args:
        run: loaded; with its data if ``calibrate`` is given.
        out: folder to write; one that this function has written before is replaced.
        calibrate: see `asr_downstream.diffusion.evaluation.fold.fold_run`.
        metadata: of the card.

    Returns:
        The report.

    Raises:
        CheckpointError, FoldError: the model does not fold, or the result differs.
        AsrError: ``out`` cannot be written or holds something else; said before the work.
    """
    metadata = metadata or Metadata()
    plugged = bool(describe(run.parts.model).sites)
    if calibrate is not None and not plugged:
        raise CheckpointError(
            f'{run.folder}: nothing to calibrate, its model has no plug with gates; leave --calibrate out'
        )
    results = [r for r in read_results(run.folder) if r.step == run.step and r.weights == run.sha256]
    check_writable(out.absolute().parent)
    if run.config.replace is not None:
        return ship_replaced(run, out, results, metadata)
    if strange := not_ours(out, REPORT):
        raise AsrError(f'{out}: holds {some(strange, 3)}, which this tool has not written; give another name')
    start = time.perf_counter()
    stock, folding = fold_run(run, calibrate) if plugged else as_trained(run)
    seconds = time.perf_counter() - start
    # what a calibrated fold ships is another function: only an exact one can be compared with the run
    difference = compare(run, stock) if folding.calibration is None else None
    sampler = build_sampler(None, run.parts.scheduler)
    steps = min(PICTURE_STEPS, sampler.config.num_train_timesteps)
    images = generate(stock, run.parts, sampler, range(PICTURES), steps, run.config.seed)
    with whole_folder(out, sum(value.nbytes for value in stock.state_dict().values())) as aside:
        part = save_parts(run, stock, aside)
        check_loads(stock, aside / part)
        save_grid(aside / 'samples.png', images, captions=[run.parts.condition.caption(n) for n in range(PICTURES)])
        about = {'fold_seconds': round(seconds, 3), 'difference': difference}
        report = report_of(run, stock, folding, aside / part, about)
        report['files'] = sorted([*files_in(aside), REPORT, 'README.md'])
        write_json(aside / REPORT, report)
        (aside / 'README.md').write_text(model_card(run, report, results, metadata), encoding='utf-8')
    return {**report, 'report': folding}


def save_pipeline(run: Run, out: Path) -> None:
    """Write what `fold_and_ship` writes without what takes long: no samples, no card, and one forward is compared.

    Args:
        run: loaded; its gates fold exactly.
        out: folder, which is replaced.

    Raises:
        CheckpointError, FoldError, AsrError: see `fold_and_ship`.
    """
    stock, folding = fold_run(run) if describe(run.parts.model).sites else as_trained(run)
    forward = verify_forward(run, run.parts.model, stock, torch.float32)
    check_same(forward, stock, str(run.checkpoint))
    with whole_folder(out, sum(value.nbytes for value in stock.state_dict().values())) as aside:
        part = save_parts(run, stock, aside)
        check_loads(stock, aside / part)
        report = report_of(run, stock, folding, aside / part, {'difference': {'float32': {'model': forward.relative}}})
        report['files'] = sorted([*files_in(aside), REPORT])
        write_json(aside / REPORT, report)


def report_of(run: Run, stock: Any, folding: FoldReport, part: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Report on a folder that was just written: what is in it, where it comes from, and ``about``."""
    return {
        'run': run.folder.name,
        'step': run.step,
        'ema': run.ema,
        'checkpoint_sha256': run.sha256,
        'weights': {path.name: sha256(path) for path in sorted(part.glob('*.safetensors'))},
        'model': type(stock).__name__,
        'pipeline': (part.parent / 'model_index.json').is_file(),
        'plug': plain(run.config.plug),
        'parameters': {'plugged': parameters(run.parts.model), 'shipped': parameters(stock)},
        **about,
        'sites': [asdict(site) for site in folding.sites],
        'calibration': None if folding.calibration is None else folding.calibration.as_dict(),
        'versions': versions(),
    }


def save_adapter_of_run(
    path: Path,
    out: Path,
    heads: Sequence[str] | str | None = None,
    base: Path | None = None,
    learnt: bool = False,
    ema: bool | None = None,
) -> Adapter:
    """Write what the gates of a run have learnt, see `asr_downstream.save_gates`.

    The base is ``base``, or what the run has remembered, or the folder that its model starts from
    (``pretrained_model_name_or_path``).

    Raises:
        CheckpointError, FoldError: the run does not load or fold, or its base was trained.
    """
    check_writable(out.absolute().parent)
    run = load_run(path, ema=ema)
    start = run.config.model.get('pretrained_model_name_or_path')
    known = Path(start) if start and Path(start).is_dir() else None
    about = {'run': run.folder.name, 'step': run.step, 'ema': run.ema}
    return save_of_training(run.parts.model, out, run.folder, heads, base, known, learnt=learnt, about=about)


def ship_replaced(run: Run, out: Path, results: list[Result], metadata: Metadata) -> dict[str, Any]:
    """Write a run whose attention is replaced, for `asr_downstream.far.export.load_far`."""
    facts = {'model': type(run.parts.model).__name__, 'parameters': parameters(run.parts.model)}

    def others(folder: Path) -> None:
        save_others(run, folder)
        (folder / 'README.md').write_text(far_card(run, facts, results, metadata), encoding='utf-8')

    about = {'run': run.folder.name, 'step': run.step, 'ema': run.ema, 'checkpoint_sha256': run.sha256}
    save_far(run.parts.model, out, about, others, run.parts.inputs(2))
    return {**facts, **about, 'replaced': True, 'sites': [], 'pipeline': False}


def save_parts(run: Run, stock: Any, folder: Path) -> str:
    """Write the pipeline, or where diffusers has none, its parts in folders of their usual names.

    Returns:
        Name of the folder of the model.
    """
    name = folder_of(stock)
    pipeline = pipeline_of(run, stock)
    if pipeline is not None:
        pipeline.save_pretrained(folder, safe_serialization=True)
        return name
    stock.save_pretrained(folder / name, safe_serialization=True)
    save_others(run, folder)
    return name


def save_others(run: Run, folder: Path) -> None:
    """Write what a model is sampled with: schedule, VAE, text encoder."""
    run.parts.process.shipped(None).save_pretrained(folder / 'scheduler')
    if run.parts.vae is not None:
        run.parts.vae.save_pretrained(folder / 'vae', safe_serialization=True)
    if isinstance(run.parts.condition, Text):
        run.parts.condition.encoder.save_pretrained(folder / 'text_encoder')
        run.parts.condition.tokenizer.save_pretrained(folder / 'tokenizer')


def check_loads(stock: Any, folder: Path) -> None:
    """Read the model back, as diffusers does, and compare every weight."""
    again = type(stock).from_pretrained(folder, local_files_only=True).state_dict()
    own = stock.state_dict()
    if own.keys() != again.keys() or not all(torch.equal(own[key], again[key]) for key in own):
        raise AsrError(f'{folder}: what was written does not read back as it was; check the disk')
