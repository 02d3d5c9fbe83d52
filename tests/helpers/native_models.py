"""Models with attention of their own: ready to fold, with the gates of a block seen from outside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from conftest import randomise
from torch import Tensor, nn

from asr_downstream.folding.native.blocks import Constant
from asr_downstream.modules.native import native_of
from helpers.natives import (
    SqueezeExciteCl,
    batches,
)

DATA = batches()


def ready(model: nn.Module) -> Any:
    return randomise(model).double().eval()


def gates_of(model: nn.Module, path: str, data: list[Tensor] = DATA) -> Tensor:
    """Gates of a block, seen from outside: what it makes of its input."""
    found: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        ones = torch.ones_like(args[0])
        axis = 3 if isinstance(module, SqueezeExciteCl) else 1
        share = (output / torch.where(args[0] == 0, ones, args[0])).movedim(axis, 1).flatten(2)
        found.append(share.gather(2, share.abs().argmax(2, keepdim=True)).squeeze(2))

    handle = model.get_submodule(path).register_forward_hook(watch)
    for x in data:
        model(x)
    handle.remove()
    return torch.cat(found)


def constant(model: nn.Module, path: str, gates: Tensor) -> nn.Module:
    """A copy with constant gates in the place of a block."""
    found = copy.deepcopy(model)
    native = native_of(found.get_submodule(path))
    parent, _, name = path.rpartition('.')
    setattr(found.get_submodule(parent), name, Constant(gates.detach(), native.axis))
    return found


def only(report: Any) -> Any:
    (block,) = report.blocks
    return block
