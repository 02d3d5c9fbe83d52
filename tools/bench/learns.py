"""What a training step of a detector costs when only a part of it learns: time, and memory in what it consists of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from rich.table import Table
from torch import nn

from asr_downstream.console.text import render
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.measure.cost import saved_bytes
from asr_downstream.measure.timing import paired_times
from asr_downstream.plugging.learning.choose import choose
from asr_downstream.plugging.learning.restrict import restrict
from asr_downstream.plugging.plug import plug
from bench.det import batch, retinanet
from bench.forms import STOCK
from bench.plug import ratios, with_fastest

__all__ = ['measure', 'table']

SITES = ['backbone.*bn*', 'backbone.*.downsample.1', 'neck.*.conv', 'bbox_head.*_convs.*.conv']
GATES = {'type': 'Attention', 'attention': {'type': 'LayerScale', 'init_value': 1.0}, 'sites': SITES}
ALL = STOCK  # ratios are to it
# Arm -> what learns, and the plug.
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    ALL: ('all', None),
    'gates': ('gates', GATES),
    'gates and shifts': ('gates', {**GATES, 'shift': True}),
    'norms': ('norms', None),
    'gates+norms': ('gates+norms', GATES),
    'head': ('bbox_head.*', None),
}


def step(model: Any, inputs: Any, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
    """All losses, backward, and a step of the optimiser."""
    optimiser = make([p for p in model.parameters() if p.requires_grad])

    def run() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss(model, inputs).backward()
        optimiser.step()

    return run


def loss(model: Any, inputs: Any) -> Any:
    """Sum of the losses."""
    x, samples = inputs
    return model.parse_losses(model.loss(x, copy.deepcopy(samples)))[0]


def measure(rounds: int, seed: int = 0) -> dict[str, Any]:
    """Measure the detector of `det_configs/bccd` on two images of 320 px, with AdamW.

    Returns:
        By arm: ``numbers`` that learn, ``saved`` (activations), ``gradients`` and ``state`` (of the optimiser) in
        bytes, and ``time``, the ratio to everything that learns.
    """
    init_default_scope('mmdet')
    MMLogger.get_current_instance().setLevel('WARNING')  # init_weights tells of every tensor
    torch.manual_seed(seed)
    stock: Any = build_detector(retinanet())
    stock.init_weights()
    inputs = batch(2, 320)
    make = partial(torch.optim.AdamW, lr=1e-9)
    found: dict[str, dict[str, Any]] = {}
    steps = {}
    for name, (learns, spec) in ARMS.items():
        model = copy.deepcopy(stock)
        if spec is not None:
            plug(model, spec)
        learning = choose(model, learns).measured(model, make)
        restrict(model, learning)
        model.train()
        found[name] = {
            'numbers': learning.numbers,
            'saved': saved_bytes(model, partial(loss, model, inputs)),
            'gradients': learning.gradients,
            'state': learning.state,
        }
        steps[name] = step(model, inputs, make)
    times = ratios(paired_times(steps, rounds, 'training steps'))
    for name, of_arm in found.items():
        of_arm['time'] = times[name]
    return {'rounds': rounds, 'arms': found}


def table(result: dict[str, Any]) -> str:
    """Print the measurements."""
    title = f'RetinaNet R18-w32, 2 x 320 px, AdamW; times over everything, {result["rounds"]} paired rounds; fastest'
    out = Table('what learns', 'numbers', 'activations', 'gradients', 'optimiser', 'time of a step', title=title)
    for name, arm in result['arms'].items():
        sizes = (f'{arm[key] / 2**20:.2f} MiB' for key in ('saved', 'gradients', 'state'))
        out.add_row('everything' if name == ALL else name, f'{arm["numbers"]:,}', *sizes, with_fastest(arm['time']))
    return render(out)
