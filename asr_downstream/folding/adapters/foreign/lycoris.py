"""IA3 and norms of LyCORIS: ``PREFIX_PATH.weight`` with ``.on_input``, and ``PREFIX_PATH.w_norm`` with ``.b_norm``.

In PATH, underscores stand for dots, so the layers of the base say where it is. IA3 keeps what is added to 1, of the
weight alone: the bias stays as it is. Norms keep what is added to weight and bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from asr_downstream.errors import CheckpointError
from asr_downstream.folding.adapters.foreign.base import Converted, Layers, by_module, refuse_others, site_of
from asr_downstream.modules.affine import Constants

__all__ = ['MARKS', 'read_lycoris']

MARKS = ('on_input', 'w_norm')  # each is in every module of its kind, and in none of another
PREFIXES = ('lycoris', 'lora_unet', 'lora_transformer', 'lora_te', 'lora_te1', 'lora_te2')
IA3 = dict.fromkeys(('weight', 'on_input'))
NORM = dict.fromkeys(('w_norm', 'b_norm'))


def read_lycoris(path: Path, tensors: Mapping[str, Tensor], layers: Layers) -> Converted:
    """Read a file of LyCORIS with IA3 and norms.

    Raises:
        CheckpointError: it has other modules, or does not fit the base.
    """
    paths = by_name(layers)
    found = Converted('LyCORIS')
    for name, own in by_module(tensors).items():
        refuse_others(name, own, IA3 if 'on_input' in own else NORM)
        at = paths.get(name)
        if at is None:
            raise CheckpointError(
                f'{path}: {name[:80]!r} is none of the layers of this base; is it for another model, or for another '
                f'part of the pipeline?'
            )
        constants = of_ia3(at, own, layers) if 'on_input' in own else of_norm(at, own, layers)
        found.sites[at] = site_of(layers, at, constants)
    return found


def by_name(layers: Layers) -> dict[str, str]:
    """Name of LyCORIS -> path of the layer.

    Raises:
        CheckpointError: two layers have one name.
    """
    found: dict[str, str] = {}
    for prefix in PREFIXES:
        for path in layers.paths:
            name = f'{prefix}_{path}'.replace('.', '_')
            if found.setdefault(name, path) != path:
                raise CheckpointError(f'{path} and {found[name]}: LyCORIS has one name for both, {name}')
    return found


def of_ia3(path: str, own: Mapping[str, Tensor], layers: Layers) -> Constants:
    """Constants of an IA3 module: the weight is scaled, the bias is not.

    Raises:
        CheckpointError: something is missing, or the layer has groups, where LyCORIS itself scales no inputs.
    """
    if 'weight' not in own or own['on_input'].numel() != 1:
        raise CheckpointError(f'{path}: its IA3 has no weight, or on_input is no number; copy the file again')
    scales = 1 + own['weight'].detach().double().flatten()
    if own['on_input'].item():
        weight = layers.weight(path)
        if weight.dim() > 1 and scales.numel() != weight.shape[1]:
            raise CheckpointError(
                f'{path}: has {scales.numel()} scales of inputs, and a weight of {tuple(weight.shape)}'
            )
        return Constants(inputs=scales)
    return Constants(scales, kept_bias(layers.bias(path), scales))


def of_norm(path: str, own: Mapping[str, Tensor], layers: Layers) -> Constants:
    """Constants of a norm: what is added to its weight is a multiple of it, and the rest a shift.

    Raises:
        CheckpointError: something is added to a weight of 0, to which nothing is a multiple, or to a bias that is not.
    """
    weight, bias = layers.weight(path).detach().double(), layers.bias(path)
    more = own['w_norm'].detach().double()
    if more.shape != weight.shape:
        raise CheckpointError(
            f'{path}: has {more.numel()} numbers in the adapter, and a weight of {tuple(weight.shape)}'
        )
    if bool(((weight == 0) & (more != 0)).any()):
        raise CheckpointError(f'{path}: weights of the base are 0, and no scale of 0 is what the adapter adds to them')
    scales = torch.where(weight == 0, 1.0, (weight + more) / torch.where(weight == 0, 1.0, weight))
    added = own.get('b_norm')
    if added is not None and (bias is None or bias.shape != added.shape):
        raise CheckpointError(f'{path}: has a bias in the adapter, and another or none in the base')
    kept = kept_bias(bias, scales)
    return Constants(scales, kept if added is None or kept is None else kept + added.detach().double())


def kept_bias(bias: Tensor | None, scales: Tensor) -> Tensor | None:
    """Shift that makes up for the scale of a bias, so that it stays what it is."""
    if bias is None or bias.shape != scales.shape:
        return None
    return bias.detach().double() * (1 - scales)
