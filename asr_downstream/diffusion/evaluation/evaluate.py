"""Evaluating runs: generate, compare with the real images, unfolded beside folded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.diffusion.evaluation.encoder import FILE as ENCODER_FILE
from asr_downstream.diffusion.evaluation.encoder import train_encoder
from asr_downstream.diffusion.evaluation.fold import fold_run
from asr_downstream.diffusion.evaluation.metrics import (
    KID_SUBSETS,
    Distances,
    build_extractor,
    check_metrics,
    features_of,
    subset_size,
)
from asr_downstream.diffusion.evaluation.pictures import save_grid
from asr_downstream.diffusion.evaluation.results import Result, save_results, set_aside_damaged
from asr_downstream.diffusion.evaluation.sampling import build_sampler, check_can_sample, generate, sampler_name
from asr_downstream.diffusion.models.components import Parts
from asr_downstream.diffusion.runs import Run, load_run
from asr_downstream.engine.data.images import Images
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import check_writable
from asr_downstream.files.configs import plain
from asr_downstream.measure import cost
from asr_downstream.measure.timing import paired_times, ratio
from asr_downstream.measure.versions import versions
from asr_downstream.modules.seeds import generator
from asr_downstream.plugging.describe import describe

__all__ = ['Plan', 'evaluate_runs']

PICTURES = 64
TIMED_IMAGES, TIMED_STEPS, ROUNDS = 8, 5, 9


@dataclass(frozen=True)
class Plan:
    """How to evaluate; all of it is written beside the numbers.

    Attributes:
        metrics: names in `asr_downstream.diffusion.evaluation.metrics.METRICS`.
        num_samples: number of generated images.
        sampler, steps, guidance_scale, seed: of the sampling; of sampler None is the first that fits a run.
        sampler_kwargs: further arguments of the scheduler of diffusers.
        extractor: ``'encoder'`` (trained on the data, kept with the first run), a file or run with one, or
            ``'inception[:PATH]'``.
        ema: whether to use averaged weights; None: if a run has them.
        fold: None, ``'exact'`` or ``'calibrated'``.
        calibrate: images to average gates over.
        batch_size: of the sampling.
        workers: of the loader of the real images.
    """

    metrics: tuple[str, ...] = ('fid', 'kid')
    num_samples: int = 1000
    sampler: str | None = None
    sampler_kwargs: dict[str, Any] = field(default_factory=dict)
    steps: int = 50
    guidance_scale: float = 1.0
    seed: int = 0
    extractor: str = 'encoder'
    ema: bool | None = None
    fold: str | None = None
    calibrate: int = 64
    batch_size: int = 64
    workers: int = 1

    def sampler_of(self, run: Run) -> Any:
        """Make the sampler of a run."""
        return build_sampler(self.sampler, run.parts.scheduler, self.sampler_kwargs, run.parts.vae is not None)

    def name_of_sampler(self, run: Run) -> str:
        """Name of the sampler of a run, with its arguments."""
        options = ', '.join(f'{key}={value!r}' for key, value in sorted(self.sampler_kwargs.items()))
        return sampler_name(self.sampler, run.parts.scheduler) + (f'({options})' if options else '')


def evaluate_runs(
    paths: Sequence[Path], plan: Plan, data: Path | None = None, processes: Processes = ALONE
) -> list[Result]:
    """Evaluate runs, or single checkpoints of runs, against the same real images with the same extractor.

    Results are kept in ``evaluation.json`` of each run, and a grid of each arm in ``evaluation/``.

    Args:
        paths: folders of runs or checkpoints.
        plan: how.
        data: the images, instead of those in the config.
        processes: share the sampling; the first one does the rest. All of them call this, and have the results.

    Raises:
        AsrError: a run, its data or the extractor cannot be read, or the plan does not fit; said before any work.
        DataError: a real image cannot be decoded: a set that is silently shorter gives a wrong FID.
    """

    def check() -> None:
        for path in paths:
            check_evaluable(load_run(path, False, plan.ema), plan)

    processes.first(check)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    real = Real(plan, device)
    results = []
    for path in paths:
        run = load_run(path, data or True, plan.ema)
        processes.first(partial(real.prepare, run))
        models = models_of(run, plan)
        generated = sample_models(run, plan, models, device, processes)
        results += processes.first(partial(measure_run, run, plan, models, generated, real))
    return results


class Real:
    """Extractor and real images of an evaluation; runs of the same data share them.

    Args:
        plan: of the evaluation.
        device: of the extractor.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.extractor: Any = None
        self.measured: dict[str, tuple[Distances, str]] = {}

    def prepare(self, run: Run) -> None:
        """Measure the images of a run, if they have not been."""
        images = run.parts.images
        assert images is not None
        if self.extractor is None:
            self.extractor = extractor_for(run, self.plan).to(self.device)
        if self.which(run) not in self.measured:
            self.measured[self.which(run)] = measure_real(images, self.extractor, self.plan)
        if self.plan.num_samples <= self.extractor.num_features:
            print(
                f'{self.plan.num_samples} images for {self.extractor.num_features} features: the covariance has not '
                f'full rank, and FID depends much on the number; use more --num-samples'
            )

    def of(self, run: Run) -> tuple[Distances, str]:
        """Distances to the real images of a run, and their name."""
        return self.measured[self.which(run)]

    def which(self, run: Run) -> str:
        """Text that tells the images of a run from others."""
        assert run.parts.images is not None
        return json.dumps([plain(run.config.data), run.parts.images.mode], sort_keys=True)


def check_evaluable(run: Run, plan: Plan) -> None:
    """Refuse what would only fail after the work: a plan that does not fit a run, or a folder that cannot be written.

    Damaged earlier results are set aside.

    Raises:
        AsrError: see above.
    """
    check_metrics(plan.metrics)
    if plan.num_samples < 2:
        raise AsrError(f'{plan.num_samples} generated images are too few to compare; use --num-samples')
    check_can_sample(run.parts, plan.sampler_of(run), plan.steps, plan.guidance_scale)
    check_writable(run.folder / 'evaluation')
    set_aside_damaged(run.folder)


def extractor_for(run: Run, plan: Plan) -> Any:
    """Extractor of a plan; the encoder of a run is trained if it is not there."""
    if plan.extractor != 'encoder':
        given = Path(plan.extractor)
        return build_extractor(str(given / ENCODER_FILE) if given.is_dir() else plan.extractor)
    path = run.folder / ENCODER_FILE
    if not path.is_file():
        assert run.parts.images is not None
        train_encoder(run.parts.images, path, workers=plan.workers)
    return build_extractor('encoder', path)


def measure_real(images: Images, extractor: Any, plan: Plan) -> tuple[Distances, str]:
    """Distances to a set of real images, and its name with a hash of all pixels: other images are another set."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[Tensor]:
        for batch in real_batches(images, plan.workers):
            digest.update((batch * 255).round().byte().numpy().tobytes())
            yield batch

    name = f'{type(images.source).__name__}, {len(images)} images, {images.mode}, {images.resolution} px'
    found = features_of(extractor, hashed(), f'real images: {name}')
    return Distances(found, plan.metrics, plan.seed), f'{name}, sha256:{digest.hexdigest()[:16]}'


def real_batches(images: Images, workers: int) -> Iterator[Tensor]:
    """All real images in [0, 1]."""
    for batch in DataLoader(images, batch_size=256, num_workers=workers):
        yield batch / 2 + 0.5


def models_of(run: Run, plan: Plan) -> dict[str, nn.Module]:
    """Model of a run, and its folded self if the plan says so."""
    models: dict[str, nn.Module] = {'unfolded': run.parts.model}
    if plan.fold is not None and describe(run.parts.model).sites:  # a stock run is evaluated as it is
        arm = 'folded' if plan.fold == 'exact' else f'calibrated on {plan.calibrate}'
        models[arm] = fold_run(run, plan.calibrate if plan.fold == 'calibrated' else None)[0]
    return models


def sample_models(
    run: Run, plan: Plan, models: dict[str, nn.Module], device: torch.device, processes: Processes
) -> dict[str, Tensor]:
    """Images of each model, on the first process."""
    run.parts.to(device)
    order = order_of(run, plan)
    return {
        arm: generate(
            model.to(device), run.parts, plan.sampler_of(run), range(plan.num_samples),
            plan.steps, plan.seed, plan.batch_size, plan.guidance_scale,
            f'{run.folder.name}, {arm}: {plan.num_samples} images',
            partial(run.parts.condition.like_data, order=order), processes,
        )
        for arm, model in models.items()
    }  # fmt: skip


def order_of(run: Run, plan: Plan) -> list[int]:
    """Images of the data, in an order of the seed: generated image n has the condition of number n."""
    return torch.randperm(len(run.parts.samples()), generator=generator(plan.seed, 'conditions')).tolist()


def measure_run(
    run: Run, plan: Plan, models: dict[str, nn.Module], generated: dict[str, Tensor], real: Real
) -> list[Result]:
    """Measure what was generated, and the models; keep the results with the run."""
    (distances, source), extractor = real.of(run), real.extractor
    provenance = {
        'images': plan.num_samples,
        'real': source,
        'sampler': plan.name_of_sampler(run),
        'steps': plan.steps,
        'guidance': plan.guidance_scale,
        'conditions': 'as in the data' if run.config.condition else 'none',
        'seed': plan.seed,
        'ema': run.ema,
        'extractor': extractor.identity + describe_extractor(extractor),
        'kid_subsets': f'{KID_SUBSETS} of {subset_size(plan.num_samples, len(distances.real))}',
        'versions': versions(),
    }
    order, shown = order_of(run, plan), range(min(PICTURES, plan.num_samples))
    captions = [run.parts.condition.caption_of(order[number % len(order)]) for number in shown]
    numbers: dict[str, dict[str, float]] = {}
    for arm, model in models.items():
        # through 8 bits, as the real images have come
        features = features_of(extractor, ((b * 255).round() / 255 for b in generated[arm].split(256)))
        numbers[arm] = distances.to(features)
        numbers[arm] |= {'parameters': cost.parameters(model), 'gmacs': forward_gmacs(run.parts, model)}
        save_grid(run.folder / 'evaluation' / f'{arm}-{run.step}.png', generated[arm][:PICTURES], captions=captions)
    times = measure_speed(run, models, plan.sampler_of(run), plan.guidance_scale)
    for arm in models:
        numbers[arm]['images_per_second'] = TIMED_IMAGES * TIMED_STEPS / plan.steps / (median(times[arm]) / 1e3)
        if arm != 'unfolded':
            numbers[arm]['speed'] = ratio(times[arm], times['unfolded']).median
            numbers[arm]['pixels'] = float((generated[arm] - generated['unfolded']).abs().max()) * 255
    found = [Result(run.folder.name, arm, run.step, run.sha256, provenance, numbers[arm]) for arm in models]
    save_results(run.folder, found)
    return found


def describe_extractor(extractor: Any) -> str:
    """How an encoder was trained."""
    about = getattr(extractor, 'about', None)
    if not about:
        return ''
    return f' (ResNet-20, {about["task"]}, {about["steps"]} steps, accuracy {about["accuracy_held_out"]:.3f})'


def forward_gmacs(parts: Parts, model: nn.Module) -> float:
    """GMACs of one forward for one image."""
    inputs = parts.inputs(1, next(model.parameters()).device)
    return cost.gmacs(lambda: model(**inputs))


def measure_speed(run: Run, models: dict[str, nn.Module], sampler: Any, guidance: float) -> dict[str, list[float]]:
    """Milliseconds of short samplings without a VAE, paired."""
    parts = replace(run.parts, vae=None)
    calls = {
        arm: partial(generate, model, parts, sampler, range(TIMED_IMAGES), TIMED_STEPS, guidance_scale=guidance)
        for arm, model in models.items()
    }
    return paired_times(calls, ROUNDS, 'timing', warmup=1)
