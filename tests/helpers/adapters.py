"""Models whose gates alone were trained, and their adapter files."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
from pathlib import Path
from typing import Any

import torch
from conftest import randomise
from torch import nn

from asr_downstream import plug
from asr_downstream.commands import gates
from asr_downstream.console import cli
from asr_downstream.folding.adapters.base import remember
from asr_downstream.modules.slots import inside_gate
from helpers.plugged import tiny

SE = dict(type='ASR', attention=dict(type='SE', reduction=4), preserve=True)
FREE = dict(type='ASR', attention=dict(type='LayerScale'))  # gates of any sign
# Spec -> gates as sites have them: of their own, several, shared, shared with a state, with shifts.
SPECS: dict[str, Any] = {
    'SE': SE,
    'LayerScale': FREE,
    'twice': [dict(SE, repeat=2), FREE],
    'width': dict(type='ASR', attention=dict(type='SRM'), share='width'),
    'DIA': dict(type='ASR', attention=dict(type='DIALSTM')),
    'shifts': [dict(SE, shift=True), dict(FREE, shift=True)],
}


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A stock model, drawn at random."""
    return randomise(tiny()).to(dtype).eval()


@torch.no_grad()
def train(model: nn.Module, heads: tuple[str, ...] = ()) -> nn.Module:
    """What a training of gates and heads does to a model: other values for them alone."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if inside_gate(model, name) and not name.endswith('reference'):
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.3)
        elif name in heads:
            p.add_(torch.randn_like(p))
    return model


def adapted(stock: nn.Module, spec: Any = SE, heads: tuple[str, ...] = ()) -> nn.Module:
    """A copy of a stock model with trained gates, and heads if they are named."""
    model = copy.deepcopy(stock)
    plug(model, spec)
    remember(model, heads)
    return train(model, heads).eval()


def saved(folder: Path, stock: nn.Module, spec: Any = SE, name: str = 'a', heads: tuple[str, ...] = ()) -> Path:
    """The adapter file of such a model."""
    from asr_downstream.folding.adapters.save import save_gates

    path = folder / f'{name}.safetensors'
    save_gates(adapted(stock, spec, heads), path)
    return path


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of the tensors that two models have not in common, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    assert list(ours) == list(theirs)
    return [n for n in ours if not same(ours[n], theirs[n])]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, bit for bit."""
    a, b = a.detach(), b.detach()
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def call(*words: object, main: Any = gates.main) -> subprocess.CompletedProcess[str]:
    """A command, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(lambda argv: main([*map(str, words)]))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())
