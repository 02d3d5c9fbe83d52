"""Building a model again whose attention blocks were removed: the library's class, with fewer weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError, FoldError
from asr_downstream.folding.native.blocks import put
from asr_downstream.modules.check import check_module
from asr_downstream.modules.copies import copy_of
from asr_downstream.modules.native import native_of
from asr_downstream.plugging.save import REMOVED, watch
from asr_downstream.registry import REBUILDERS

__all__ = ['note_removed', 'remove_native', 'transfer_weights']

Model = TypeVar('Model', bound=nn.Module)


def remove_native(model: Model, removed: Iterable[str]) -> Model:
    """Put ``nn.Identity`` in the place of attention blocks, in place, as `asr_downstream.fold_native` did.

        model = remove_native(RegNetForImageClassification(config), report.removed)
        model.load_state_dict(weights)  # strictly

    Without this package: ``setattr(model.get_submodule(parent), name, torch.nn.Identity())`` for each path. What
    ``save_pretrained`` of such a model of transformers or diffusers writes is read by `asr_downstream.load_plugged`.

    Args:
        model: a fresh model.
        removed: paths of the blocks, ``report.removed``.

    Returns:
        The model.

    Raises:
        CheckpointError: there is no such block; the model has not been touched.
    """
    check_module(model, 'remove_native', CheckpointError)
    paths = [removed] if isinstance(removed, str) else list(removed)
    for path in paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = model
        if module is model or not (isinstance(module, nn.Identity) or native_of(module) is not None):
            raise CheckpointError(
                f'remove_native: {type(model).__name__} has no attention block {path!r}; build the model as it was '
                f'built for fold_native'
            )
    for path in paths:
        put(model, path, nn.Identity())
    note_removed(model, paths)
    return model


REBUILDERS.register_module('remove', module=remove_native)


def note_removed(model: nn.Module, removed: Iterable[str]) -> None:
    """Note on a model which of its blocks are gone, for its ``save_pretrained``."""
    paths = list(dict.fromkeys([*getattr(model, REMOVED, ()), *removed]))
    if paths:
        model.__dict__[REMOVED] = paths
        watch(model)


@torch.no_grad()
def transfer_weights(folded: nn.Module, stock: Model) -> Model:
    """Copy the weights of a model to one that is built without attention, and so may name them differently.

        config = RegNetConfig.from_dict({**folded.config.to_dict(), 'layer_type': 'x'})
        stock = transfer_weights(folded, RegNetForImageClassification(config))  # a plain RegNet-X

    Weights and buffers correspond in their order; last names, shapes and number have to be the same.

    Args:
        folded: from `asr_downstream.fold_native`, with all its attention removed.
        stock: a fresh model of the same layers.

    Returns:
        A copy of ``stock`` with the weights, in eval mode.

    Raises:
        FoldError: the two do not have the same weights.
    """
    for model in (folded, stock):
        check_module(model, 'transfer_weights', FoldError)
    ours, theirs = folded.state_dict(), stock.state_dict()
    lists = [[(name.rpartition('.')[2], tuple(t.shape)) for name, t in state.items()] for state in (ours, theirs)]
    if lists[0] != lists[1]:
        left = [path for path, module in folded.named_modules() if native_of(module) is not None]
        differs = next((f'{a} {tuple(ours[a].shape)}' for a, x, y in zip(ours, *lists, strict=False) if x != y), '')
        why = f'{some(left, 3)} is still there' if left else f'the first that differs is {differs or "at the end"}'
        raise FoldError(
            f'transfer_weights: {len(ours)} weights of {type(folded).__name__} and {len(theirs)} of '
            f'{type(stock).__name__} are not the same in order and shape ({why})'
        )
    found: Any = copy_of(stock, FoldError)
    found.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    found.eval()
    return found
