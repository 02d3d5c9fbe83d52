"""`apply_gates`: adapters in the weights of a stock model. Needs torch and safetensors only.

The arithmetic is that of `asr_downstream.fold`: constants in float64, each weight rounded once. So an adapter at
strength 1 gives the fold of the model that it was saved from, bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.folding.adapters.file import Adapter, Site, read_adapter
from asr_downstream.folding.adapters.layers import kind_of, member, stand_in
from asr_downstream.folding.adapters.strength import after, at_strength
from asr_downstream.modules.affine import Constants, scaled
from asr_downstream.modules.check import check_module, check_own, check_weights
from asr_downstream.modules.slots import GATES, HasGates

__all__ = ['Given', 'apply_gates', 'apply_to_state', 'check_base', 'given']

Source: TypeAlias = str | Path | Adapter
LayerOf: TypeAlias = Callable[[str, Site], nn.Module]


@dataclass(frozen=True)
class Given:
    """An adapter, and how it is to be applied.

    Attributes:
        adapter: what was read.
        strength: at 0 it is left out, heads and all.
        heads: whether its heads are taken.
    """

    adapter: Adapter
    strength: float = 1.0
    heads: bool = True


@torch.no_grad()
def apply_gates(
    model: nn.Module,
    path: Source | Sequence[Source],
    strength: float | Sequence[float] = 1.0,
    heads: bool | Sequence[bool] = True,
    force: bool = False,
) -> nn.Module:
    """Return a copy of a stock model with an adapter in its weights, or with several.

        night = apply_gates(detector, 'night.safetensors')
        half = apply_gates(detector, 'night.safetensors', strength=0.5)
        both = apply_gates(detector, ['night.safetensors', 'rain.safetensors'], strength=[1.0, 0.5])

    Several work one after another, in the order given: on what a layer computes, ``(y v1 + s1) v2 + s2``. Gates are
    multiplied, in any order; a shift is scaled by the gates of those that come after it. Each was made for the same
    base, the weights of ``model``. It stays the stock class with the stock keys, rounded once, as by `fold`.

    Args:
        model: stock; it is not changed.
        path: of an adapter file, or a list of such.
        strength: how much of it is taken, one number or one a file. Gates go with its power, ``v ** strength`` (a gate
            that is not positive linearly, ``1 + strength (v - 1)``), shifts linearly. 1 is the adapter to the bit; 0
            leaves the adapter out, heads and all: the base to the bit.
        heads: whether the heads of an adapter are taken, which are whole tensors; one answer, or one a file.
        force: apply an adapter that was made for other weights, as long as its layers are there.

    Returns:
        The copy.

    Raises:
        CheckpointError: a file cannot be read, was made for another base, or does not fit; two bring the same head; or
            the model is plugged.
    """
    check_module(model, 'apply_gates', CheckpointError)
    plugged = [at for at, m in model.named_modules() if isinstance(m, HasGates)]
    if plugged:
        raise CheckpointError(
            f'apply_gates: {type(model).__name__} is plugged ({some(plugged, 3)}); give a stock model, or unload this '
            f'one first'
        )
    adapters = given(path, strength, heads)
    state = model.state_dict()
    for one in adapters:
        check_base(one.adapter, state, type(model).__name__, force)
    adapters = [one for one in adapters if one.strength != 0]
    layers = {at: layer_at(model, at, one.adapter) for one in adapters for at in one.adapter.sites}
    first: dict[int, str] = {}
    for at, layer in layers.items():
        if (other := first.setdefault(id(layer), at)) != at:
            raise CheckpointError(f'{at}: is the same layer as {other}; the adapter is for a model that has two')
        check_weights(at, layer, CheckpointError)
    check_own(model, layers, CheckpointError)
    copied = copied_model(model)
    own = copied.state_dict()
    for name, value in merged_heads(adapters).items():
        if name not in own or own[name].shape != value.shape:
            there = f'is of shape {tuple(own[name].shape)} in' if name in own else 'is not in'
            raise CheckpointError(
                f'{name}: {there} {type(model).__name__}, and a head of shape {tuple(value.shape)} is to go there; '
                f'build the model with that head, or apply with heads=False'
            )
        own[name].copy_(value)
    for name, value in new_weights(adapters, lambda at, site: copied.get_submodule(at)).items():
        at, _, kind = name.rpartition('.')
        getattr(copied.get_submodule(at), kind).copy_(value)
    return copied


@torch.no_grad()
def apply_to_state(state: Mapping[str, Tensor], adapters: Sequence[Given]) -> dict[str, Tensor]:
    """Apply adapters to the weights of a model, where there is no model; see `apply_gates`.

    Args:
        state: stock weights; they are not changed. The result has their tensors where nothing was to be done.
        adapters: see `given`; their base is not checked here.

    Raises:
        CheckpointError: a layer is not there, or another.
    """
    adapters = [one for one in adapters if one.strength != 0]
    found = {**state}
    for name, value in merged_heads(adapters).items():
        if name not in found:
            raise CheckpointError(f'{name}: is a head of an adapter, and not in these weights; leave the heads out')
        found[name] = value.to(found[name].dtype)
    return found | new_weights(adapters, lambda at, site: stand_in(at, site.layer, site.groups, found))


def given(
    path: Source | Sequence[Source], strength: float | Sequence[float] = 1.0, heads: bool | Sequence[bool] = True
) -> list[Given]:
    """Read adapters, each with its strength and whether its heads are taken.

    Raises:
        CheckpointError: a file cannot be read, or there are not as many strengths or answers as files.
    """
    paths = [path] if isinstance(path, str | Path | Adapter) else list(path)
    if not paths:
        raise CheckpointError('apply_gates: no adapter is given')
    strengths = spread(strength, len(paths), 'strength')
    answers = spread(heads, len(paths), 'heads')
    for value in strengths:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f'apply_gates: strength={value!r} should be a finite number, such as 0.7')
    read = [one if isinstance(one, Adapter) else read_adapter(one) for one in paths]
    return [Given(*each) for each in zip(read, map(float, strengths), map(bool, answers), strict=True)]


def spread(value: object, count: int, name: str) -> list:
    """One value for each of ``count`` adapters.

    Raises:
        CheckpointError: there are more or fewer.
    """
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise CheckpointError(f'apply_gates: {count} adapters, and {name} for {len(value)}; give one a file')
    return list(value)


def check_base(adapter: Adapter, state: Mapping[str, Tensor], what: str, force: bool = False) -> None:
    """Refuse weights that are not those that an adapter was made for.

    Raises:
        CheckpointError: they are others; with the names of those that differ.
    """
    if force:
        return
    differing = adapter.base.differing(state, adapter.heads)
    advice = 'give the base that it was made for, or apply it to any (force=True, --any-base)'
    if differing is None:
        count = len(adapter.base.tensors)
        missing = [at for at in adapter.sites if member(at, 'weight') not in state]
        detail = f'; there is no {some(missing, 3)}' if missing else ''
        if any(GATES.search(name) for name in state):
            detail = '; these are of a training and have gates, fold it first'
        raise CheckpointError(
            f'{adapter.name}: was made for a {adapter.model or "model"} with {count} other tensors than {what} '
            f'has{detail}; {advice}'
        )
    if differing:
        raise CheckpointError(
            f'{adapter.name}: was made for another base: of {what}, {len(differing)} of {len(adapter.base.tensors)} '
            f'tensors differ ({some(differing)}); {advice}'
        )


def merged_heads(adapters: Sequence[Given]) -> dict[str, Tensor]:
    """Heads of all adapters that bring any.

    Raises:
        CheckpointError: two bring the same, and not with the same values.
    """
    found: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for one in adapters:
        for name, value in one.adapter.heads.items() if one.heads else ():
            if name in found and not (found[name].dtype == value.dtype and torch.equal(found[name], value)):
                raise CheckpointError(
                    f'{name}: is a head of {owner[name]} and of {one.adapter.name}, and only one can be taken; say '
                    f'whose, heads=[True, False]'
                )
            found[name], owner[name] = value, one.adapter.name
    return found


def new_weights(adapters: Sequence[Given], layer_of: LayerOf) -> dict[str, Tensor]:
    """Weights and biases of all sites with the constants of all adapters in them; rounded once.

    Raises:
        CheckpointError: constants do not fit their layer, or a new weight is not finite.
    """
    sites: dict[str, Site] = {}
    for one in adapters:
        for at, site in one.adapter.sites.items():
            constants = at_strength(site.constants, one.strength)
            if at in sites:
                if (sites[at].layer, sites[at].groups) != (site.layer, site.groups):
                    raise CheckpointError(f'{at}: is a {sites[at].layer} of one adapter and a {site.layer} of another')
                constants = after(sites[at].constants, constants)
            sites[at] = replace(site, constants=constants)
    found: dict[str, Tensor] = {}
    for at, site in sites.items():
        layer = layer_of(at, site)
        device = next(layer.parameters()).device
        try:
            new = scaled(layer, Constants(*(v if v is None else v.to(device) for v in site.constants)))
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f'{at}: the adapter does not fit it ({error}); is it for another model?') from error
        for name, value in zip(('weight', 'bias'), new, strict=True):
            if value is not None:
                rounded = value.to(getattr(layer, name).dtype)
                if not rounded.isfinite().all():
                    raise CheckpointError(
                        f'{member(at, name)}: would not be finite in {rounded.dtype}; take less strength, or weights '
                        f'of more precision'
                    )
                found[member(at, name)] = rounded
    return found


def layer_at(model: nn.Module, path: str, adapter: Adapter) -> nn.Module:
    """Layer of a model at the path of a site.

    Raises:
        CheckpointError: there is none, or one that constants do not go into.
    """
    try:
        layer = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f'{adapter.name}: has constants for {path}, and {type(model).__name__} has no such layer; is it for '
            f'another model, or for the whole of which this is a part?'
        ) from error
    if kind_of(layer) is None or not isinstance(getattr(layer, 'weight', None), Tensor):
        raise CheckpointError(
            f'{path}: is a {type(layer).__name__}, and constants are for a {adapter.sites[path].layer}'
        )
    return layer


def copied_model(model: nn.Module) -> nn.Module:
    """Copy a model; what a plain copy refuses is copied by `asr_downstream.modules.copies`, which needs NumPy."""
    try:
        return copy.deepcopy(model)
    except Exception:
        from asr_downstream.modules.copies import copy_of

        return copy_of(model, CheckpointError)
