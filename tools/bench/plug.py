"""What plugging costs in training and what folding leaves of it: time and saved activations, against the stock model.

All arms have the same stock weights. ``feature maps`` and ``plain`` are the forms that other code uses: the output of
the layer times its gates. ASR as this package plugs it scales parameters; input-dependent gates (SE, DIA) take the form
that is faster, or with ``memory='low'`` the one that keeps no second map; and a folded model is stock.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import render
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.folding.verify import verify
from asr_downstream.measure.cost import saved_bytes
from asr_downstream.measure.timing import Ratio, paired_times, ratio
from asr_downstream.registry import MODELS
from bench.forms import (
    CASES,
    FOLDED,
    LOW,
    MAPS,
    PLAIN,
    SCALED,
    SE,
    SPEC,
    STOCK,
    Case,
    dia,
    feature_map_form,
    low_form,
    plain_form,
    plugged_copy,
)  # fmt: skip
from bench.launches import cell, count_arms

__all__ = ['CASES', 'SCALED', 'depth_table', 'fold_seconds', 'measure', 'ratios', 'table', 'with_fastest']


def total(outputs: Any) -> Tensor:
    """A scalar that depends on every output."""
    return sum((o.square().mean() for o in outputs), torch.zeros(())) if isinstance(outputs, tuple) else outputs.mean()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss of a forward."""
    return total(model(x))


def training_step(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Callable[[], None]:
    """Forward, backward and an SGD step; ``forward``: of the model, if it is not called itself."""
    forward = forward or model
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        total(forward(x)).backward()
        optimiser.step()

    return step


def inference(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Callable[[], Any]:
    """One forward without gradients; ``forward``: of the model, if it is not called itself."""
    forward = forward or model

    def infer() -> Any:
        with torch.inference_mode():
            return forward(x)

    return infer


def measure(
    case: Case, rounds: int, seed: int = 0, threads: int = 1, plugs: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure one case, on so many threads; of the plugs all, or those whose names contain one of these texts.

    Returns:
        Ratios to stock by arm: ``training`` and ``inference`` (median and quartiles over paired rounds), ``saved``
        (bytes); ``launches``, see `bench.launches.count_arms`; and ``agreement``, the largest relative difference
        between two forms of each plug.
    """
    torch.manual_seed(seed)
    stock = case.build()
    stock.eval()  # mmdet's ResNet.eval() returns None
    x = torch.randn(case.batch, 3, case.side, case.side)
    result: dict[str, Any] = {
        'case': case.name,
        'input': [case.batch, 3, case.side, case.side],
        'rounds': rounds,
        'threads': threads,
        'agreement': {},
        **{kind: {} for kind in ('training', 'inference', 'saved', 'launches')},
    }
    for name, spec in {SCALED: SPEC, **case.dynamic}.items():  # apart: all arms at once would not fit caches and memory
        if plugs and not any(text.lower() in name.lower() for text in plugs):
            continue
        plugged = plugged_copy(stock, spec)
        if name == SCALED:
            arms = {STOCK: stock, name: plugged, MAPS: feature_map_form(plugged), FOLDED: fold_exactly(plugged)[0]}
        else:
            low, plain = low_form(plugged), plain_form(plugged)
            arms = {STOCK: stock, name + LOW: low, name + PLAIN: plain, name: plugged}
        _, ours, theirs, *_ = arms.values()
        result['agreement'][name] = verify(ours, theirs, x).relative
        for kind, found in compare(arms, x, rounds, f'{case.name}, {name}', threads).items():
            result[kind].update({**found, **result[kind]})
    return result


def compare(arms: dict[str, nn.Module], x: Tensor, rounds: int, text: str, threads: int) -> dict[str, dict[str, Any]]:
    """Ratios to stock of paired rounds and of saved bytes, and launches."""
    still = {name: inference(copy.deepcopy(model), x) for name, model in arms.items()}
    inference_times = paired_times(still, rounds, f'{text}: inference', threads=threads)
    trained = {name: copy.deepcopy(model) for name, model in arms.items() if name != FOLDED}
    for model in trained.values():
        model.train()  # mmdet's ResNet.train() returns None
    saved = {name: saved_bytes(model, partial(loss_of, model, x)) for name, model in trained.items()}
    steps = {name: training_step(model, x) for name, model in trained.items()}
    training_times = paired_times(steps, rounds, f'{text}: training steps', threads=threads)
    return {
        'training': ratios(training_times),
        'inference': ratios(inference_times),
        'saved': {name: count / saved[STOCK] for name, count in saved.items()},
        'launches': count_arms(arms, x),
    }


def ratios(times: dict[str, list[float]]) -> dict[str, Ratio]:
    """Ratios of all arms to stock."""
    return {name: ratio(series, times[STOCK]) for name, series in times.items()}


def fold_seconds(repeats: int = 5) -> float:
    """Median time to fold a Faster R-CNN R50 with ASR(SE) at all 16 sites, in seconds."""
    from mmengine.hub import get_config
    from mmengine.registry import init_default_scope

    from asr_downstream.detection.models.detectors import build_detector

    init_default_scope('mmdet')
    config = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    config.model.backbone.update(type='asr_downstream.ResNet', plug=SPEC, frozen_stages=-1)
    model = build_detector(config)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fold_exactly(model)
        times.append(time.perf_counter() - start)
    return median(times)


def depth_table() -> tuple[str, dict[str, dict[str, int]]]:
    """Parameters that SE and DIA add to mmdet's ResNets: SE grows with the depth, a shared unit does not."""
    import asr_downstream.detection.models.plugged  # noqa: F401

    counts: dict[str, dict[str, int]] = {}
    for depth in (50, 101, 152):
        stock = sum(p.numel() for p in MODELS.get('ResNet').stock_class(depth).parameters())
        counts[f'ResNet-{depth}'] = {'stock': stock}
        for name, spec in {'SE r=16': SE, 'DIA r=4': dia(4), 'DIA r=20': dia(20)}.items():
            model = MODELS.build(dict(type='asr_downstream.ResNet', depth=depth, frozen_stages=-1, plug=spec))
            counts[f'ResNet-{depth}'][name] = sum(p.numel() for p in model.parameters()) - stock
    out = Table('backbone', 'stock', 'SE r=16', 'DIA r=4', 'DIA r=20', title='parameters, and what plugs add')
    for name, row_counts in counts.items():
        out.add_row(name, *(f'{"" if k == "stock" else "+"}{v:,}' for k, v in row_counts.items()))
    return render(out), counts


def with_fastest(found: Ratio) -> str:
    """A ratio, and that of the fastest rounds."""
    return f'{found}; {found.fastest:.3f}'


def table(results: list[dict[str, Any]]) -> str:
    """Print the measurements as one table."""
    several = len({result['threads'] for result in results}) > 1
    out = Table(
        'model',
        'arm',
        'training step',
        'saved activations',
        'inference',
        'launches, training / inference, over stock',
        title='ratios to stock, paired rounds: median (quartiles); of the fastest rounds',
    )
    for result in results:
        for arm in result['inference']:
            training = result['training'].get(arm)
            saved = result['saved'].get(arm)
            out.add_row(
                result['case'] + (f', {result["threads"]} threads' if several else ''),
                arm,
                with_fastest(training) if training else '',
                f'{saved:.4f}' if saved else '',
                with_fastest(result['inference'][arm]),
                cell(result['launches'][arm]),
            )
        out.add_section()
    return render(out)
