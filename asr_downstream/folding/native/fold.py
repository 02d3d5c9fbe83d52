"""`fold_native`: attention that a stock model has by itself is replaced by its mean over data, and folded away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, FoldError, warn
from asr_downstream.folding.calibrated import Metric, check_arguments, check_repeatable, within_budget
from asr_downstream.folding.constancy import Constancy
from asr_downstream.folding.native.blocks import find_blocks, measure_blocks, put, with_constants
from asr_downstream.folding.native.places import Place, find_places
from asr_downstream.folding.native.rebuild import note_removed
from asr_downstream.folding.native.report import IN_BUDGET, NativeBlock, NativeReport
from asr_downstream.folding.native.trials import BAR, double
from asr_downstream.folding.passes import Step, default_step
from asr_downstream.folding.verify import Verification, beyond_rounding, compare, tensors
from asr_downstream.measure.cost import parameters
from asr_downstream.measure.timing import Ratio, paired_times, ratio
from asr_downstream.modules.affine import Constants, scaled
from asr_downstream.modules.check import check_bare, check_module
from asr_downstream.modules.copies import batch_of, copy_of
from asr_downstream.modules.native import known_natives
from asr_downstream.plugging.layers import Plugged

__all__ = ['fold_native']


def fold_native(
    model: nn.Module,
    calibrate: Iterable[Any],
    *,
    step: Step | None = None,
    metric: Metric | None = None,
    max_drop: float | None = None,
    rounds: int = 20,
) -> tuple[nn.Module, NativeReport]:
    """Remove channel attention that the model has by itself, such as the squeeze-and-excitation of EfficientNet.

    The gates of each block are replaced by their mean over data and folded into a layer before or after it; the block
    becomes ``nn.Identity``. Into which layer is found by trying: random gates have to give the same outputs in float64,
    to 1e-10. What the means cost is measured.

        folded, report = fold_native(model, loader, metric=accuracy, max_drop=0.005)
        print(report)

    Args:
        model: in eval mode, without plugs; it is not changed. Its classes of attention are those of
            `asr_downstream.register_native` and of the adapters (MMDetection, transformers, torchvision, timm).
        calibrate: batches to average the gates over: a list or a loader, read more than once, on the model's device.
        step: how to run a batch, ``step(model, batch)``; its outputs are compared. The default calls the model with a
            tensor, a tuple of arguments or a dict of keyword arguments.
        metric: of a model, larger is better; measured before and after.
        max_drop: how much may be lost at most: of ``metric``, or without one the relative change of the outputs (root
            mean square). The least constant blocks stay until it holds.
        rounds: of timing both models on the first batch, in turns; 0: they are not timed.

    Returns:
        The folded copy, and a report: the blocks with their constancy, where their gates went or why they are still
        there, and outputs, metric, parameters and time before and after.

    Raises:
        FoldError: training mode, plugs, no attention that is known, batches that do not fit the model, gates or folded
            weights that are not finite, or a metric that is not.
    """
    check_module(model, 'fold_native', FoldError)
    check_bare(model, FoldError)
    check_arguments(calibrate, step, False, metric, max_drop)
    check_repeatable(calibrate)
    if not isinstance(rounds, int) or rounds < 0:
        raise FoldError(f'fold_native: rounds={rounds!r} should be a whole number, 0 or more')
    if model.training:
        raise FoldError('the model is in training mode: call model.eval() first (folded weights are for inference)')
    if plugged := [path for path, m in model.named_modules() if isinstance(m, Plugged)]:
        raise FoldError(f'{some(plugged, 2)}: is plugged; fold the model first, then remove its own attention')
    natives = find_blocks(model)
    if not natives:
        known = ', '.join(sorted({name.rpartition('.')[2] for name in known_natives()}))
        raise FoldError(
            f'{type(model).__name__} has no attention that is known (known: {known}); name the class of yours with '
            f"register_native(Block, 'path of the module that returns the gates')"
        )
    step = step or default_step
    sites, reasons = measure_blocks(model, natives, calibrate, step)
    batch = next(iter(calibrate))
    means = {site.path: site.mean for site in sites}
    measured = {path: native for path, native in natives.items() if path in means}
    places, others = find_places(model, measured, means, batch, step)
    reasons = {**reasons, **others}
    if not places:
        warn(f'none of the {len(natives)} attention blocks of {type(model).__name__} can be folded; print the report')

    foldable = [site for site in sites if site.path in places]
    make = partial(make_folded, model, places)
    runs = copy_of(model, FoldError) if any(m.training for m in model.modules()) else model  # a norm would change
    folded, _, calibration = within_budget(runs, calibrate, foldable, make, step, False, metric, max_drop)
    reasons.update(dict.fromkeys(calibration.kept, IN_BUDGET))
    removed = [site for site in foldable if site.path not in reasons]
    note_removed(folded, [site.path for site in removed])
    checked = check_folded(model, removed, places, folded, batch, step) if removed else None
    ratios = {site.path: site.ratio for site in sites}
    blocks = [
        NativeBlock(path, type(model.get_submodule(path)).__name__, kept=reasons.get(path, '')) for path in natives
    ]
    return folded, NativeReport(
        blocks=tuple(filled(block, ratios, means, places) for block in blocks),
        calibration=calibration,
        checked=checked,
        parameters=(parameters(model), parameters(folded)),
        latency=timed(runs, folded, batch, step, rounds) if rounds and removed else None,
        batch=', '.join(str(tuple(t.shape)) for _, t in islice(tensors(batch), 1)),
    )


def filled(
    block: NativeBlock, ratios: Mapping[str, float], means: Mapping[str, Tensor], places: Mapping[str, Place]
) -> NativeBlock:
    """Add what was measured and tried to the line of a block."""
    if block.path in means:
        block = replace(block, channels=len(means[block.path]), ratio=ratios[block.path])
    if place := places.get(block.path):
        block = replace(block, layer=place.layer, side=place.side, error=place.error)
    return block


@torch.no_grad()
def make_folded(model: nn.Module, places: Mapping[str, Place], sites: Iterable[Constancy]) -> tuple[nn.Module, None]:
    """Copy ``model`` without these blocks, their mean gates in the weights of their places.

    Several blocks may fold into one layer, from both of its sides; it is rounded once.

    Raises:
        FoldError: folded weights are not finite.
    """
    folded: nn.Module = copy_of(model, FoldError)
    found: dict[str, Constants] = {}
    for site in sites:
        place = places[site.path]
        old = found.get(place.layer, Constants())
        found[place.layer] = Constants(*map(product, old, place.constants(site.mean)))
        put(folded, site.path, nn.Identity())
    for path, constants in found.items():
        layer = folded.get_submodule(path)
        for name, value in zip(('weight', 'bias'), scaled(layer, constants), strict=True):
            if value is not None:
                parameter: Any = layer._parameters[name]
                if not value.to(parameter.dtype).isfinite().all():
                    raise FoldError(f'{path}: the folded {name} is not finite in {parameter.dtype}; fold in float32')
                parameter.copy_(value)
    return folded, None


def product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Product of constants that may be left out."""
    if one is None or other is None:
        return other if one is None else one
    return one * other


def check_folded(
    model: nn.Module, sites: list[Constancy], places: Mapping[str, Place], folded: nn.Module, batch: Any, step: Step
) -> Verification:
    """Compare the folded model with the mean gates in the place of the blocks: in float64, where that can be run.

    Raises:
        FoldError: they differ, as where a layer is also used elsewhere.
    """
    wide = copy_of(model, FoldError).double()
    call = double(batch_of(batch))
    try:
        found = compare(make_folded(wide, places, sites)[0], with_constants(wide, sites), [call], step)
        wrong = not found.relative <= BAR
    except AsrError:  # a step that prepares data makes float32 of them
        found = compare(folded, with_constants(model, sites), [batch_of(batch)], step)
        wrong = beyond_rounding(found, model) is not None
    if wrong:
        layers = sorted({places[site.path].layer for site in sites})
        raise FoldError(
            f'the folded model computes something else than its mean gates (relative difference {found.relative:.1e}): '
            f'a layer that gates went into is used elsewhere ({some(layers)}), or the outputs are not continuous in '
            f'the weights; return others, such as feature maps, in step=...'
        )
    return found


def timed(model: nn.Module, folded: nn.Module, batch: Any, step: Step, rounds: int) -> Ratio:
    """Time of the folded model over that of the model, on one batch, in turns."""
    call = batch_of(batch)
    with torch.no_grad():
        times = paired_times(
            {'model': lambda: step(model, call), 'folded': lambda: step(folded, call)},
            rounds,
            threads=torch.get_num_threads(),
        )
    return ratio(times['folded'], times['model'])
