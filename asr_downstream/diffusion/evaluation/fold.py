"""Folding the model of a run, exactly or by calibration, with the measured difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.models.build import build_model
from asr_downstream.diffusion.runs import Run
from asr_downstream.errors import CheckpointError
from asr_downstream.folding.calibrated import fold_calibrated
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.report import FoldReport
from asr_downstream.folding.verify import Verification, check_same, verify
from asr_downstream.modules.copies import copy_of
from asr_downstream.modules.seeds import generator
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.weights import load_state

__all__ = [
    'SAMPLE_STEPS', 'as_trained', 'calibration_batches', 'compare', 'fold_run', 'stock_of', 'verify_forward',
]  # fmt: skip

SAMPLE_STEPS = 10  # of the sample that is compared, by the first sampler of the process


def calibration_batches(run: Run, count: int, batch_size: int = 16) -> list[dict[str, Any]]:
    """Calls of the model as in training: ``count`` images, each with a timestep and noise of its own.

    The run must have been loaded with its data.
    """
    samples = run.parts.samples()
    order = torch.randperm(len(samples), generator=generator(run.config.seed, 'calibration'))[:count].tolist()
    calls = []
    for start in range(0, len(order), batch_size):
        items = [samples[index, -1 - index] for index in order[start : start + batch_size]]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != 'bad'}
        clean = run.parts.encode(batch['image'])
        noisy = run.parts.process.noisy(clean, batch['noise'], batch['timestep'])
        calls.append({'args': (noisy, batch['timestep']), 'kwargs': run.parts.condition.arguments(batch['label'])})
    return calls


def call(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Run a model on one of `calibration_batches`."""
    return model(*batch['args'], **batch['kwargs']).sample


def fold_run(run: Run, calibrate: int | None = None) -> tuple[nn.Module, FoldReport]:
    """Fold the model of a run and put the result into the stock class, strictly.

    Args:
        run: loaded; with its data if ``calibrate`` is given.
        calibrate: number of training images to average input-dependent gates over; None folds exactly or not at all.

    Returns:
        The stock model in eval mode, and the report.

    Raises:
        CheckpointError: there is nothing to fold.
        FoldError: gates depend on the input and ``calibrate`` is not given.
    """
    model = run.parts.model
    if not describe(model).sites:
        raise CheckpointError(f'{run.folder}: nothing to fold, its model has no plug with gates')
    if calibrate is None:
        folded, report = fold_exactly(model)
    else:
        batches = calibration_batches(run, calibrate)
        folded, report = fold_calibrated(model, batches, step=call, check=batches[:1])
    stock = stock_of(run)
    load_state(stock, folded.state_dict(), run.checkpoint)
    return stock, report


def as_trained(run: Run) -> tuple[nn.Module, FoldReport]:
    """Model of a run without a plug, put into a stock one of its own, and a report that says so."""
    stock = stock_of(run)
    load_state(stock, run.parts.model.state_dict(), run.checkpoint)
    return stock, FoldReport(message=f'{run.folder.name}: nothing to fold, it has no gates; shipped as it was trained')


def stock_of(run: Run) -> nn.Module:
    """Stock model of a run, with weights of its own."""
    with torch.random.fork_rng():
        return build_model(run.config, plugged=False).eval()


def compare(run: Run, folded: nn.Module) -> dict[str, dict[str, float]]:
    """Largest relative difference between the model of a run and its folded self.

    Returns:
        ``{'float32': {'model': ..., 'sample': ...}, 'float64': ...}``: of one forward, and of a sample of ten steps
        from the same noise. In float64 both are folded and run in float64.

    Raises:
        FoldError: a forward differs by more than rounding.
    """
    found = {}
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix('torch.')
        with in_precision(run, dtype) as parts_of_run:
            ours = nn.Module.to(copy_of(run.parts.model), dtype)  # diffusers warns in its own to()
            if dtype == torch.float64 and describe(ours).sites:
                theirs = fold_exactly(ours)[0]
            else:
                theirs = nn.Module.to(copy_of(folded), dtype)
            forward = verify_forward(parts_of_run, ours, theirs, dtype)
            check_same(forward, theirs, str(run.checkpoint))
            samples = [sample(parts_of_run, m) for m in (ours, theirs)]
        found[name] = {'model': forward.relative, 'sample': float((samples[0] - samples[1]).abs().max())}
    return found


@contextmanager
def in_precision(run: Run, dtype: torch.dtype) -> Iterator[Run]:
    """Let the frozen parts of a run work in ``dtype`` inside the block."""
    frozen = [m for m in (run.parts.vae, run.parts.condition.encoder) if m is not None]
    try:
        for module in frozen:
            nn.Module.to(module, dtype)
        yield run
    finally:
        for module in frozen:
            nn.Module.to(module, torch.float32)


def verify_forward(run: Run, ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> Verification:
    """Compare one forward on noise, at four timesteps."""
    inputs = run.parts.inputs(4)
    return verify(ours, theirs, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})


def sample(run: Run, model: nn.Module) -> Tensor:
    """Four images, sampled in ten steps."""
    return generate(model, run.parts, build_sampler(None, run.parts.scheduler), range(4), SAMPLE_STEPS)
