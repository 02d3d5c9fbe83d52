"""`load_gates`: an adapter file in a plugged model, to train on; and `unload`: the base without its gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError, FoldError
from asr_downstream.folding.adapters.apply import check_base
from asr_downstream.folding.adapters.base import base_state, digests
from asr_downstream.folding.adapters.file import Adapter, read_adapter
from asr_downstream.folding.adapters.save import BaseLike, stock_weights
from asr_downstream.folding.exact import make_stock_, specs
from asr_downstream.modules.check import check_bare, check_module
from asr_downstream.modules.slots import BASE, HasGates, inside_gate
from asr_downstream.plugging.attach import detach
from asr_downstream.plugging.bank.hooks import uninstall
from asr_downstream.plugging.gating.shared_unit import unregister
from asr_downstream.plugging.gating.sides import INPUT, OUTPUT
from asr_downstream.plugging.save import for_json

__all__ = ['load_gates', 'unload']

Store = Callable[[], Any]


@torch.no_grad()
def load_gates(model: nn.Module, path: str | Path | Adapter, force: bool = False) -> Adapter:
    """Put what an adapter file holds into the gates and heads of a plugged model, in place, so that training goes on.

    A file that was saved with ``learnt=True`` gives back the parameters of the gates themselves, in a model that is
    plugged with its spec. Any other holds what the gates came to: a model that is plugged with ``preserve=True`` at the
    same layers, with any attention, starts from there, up to rounding.

    Args:
        model: plugged, with the base of the adapter in it.
        path: the file.
        force: take another base, too.

    Returns:
        What was read.

    Raises:
        CheckpointError: the file cannot be read, is for another base or other layers, or its constants cannot be put
            into these gates. The model has not been touched.
    """
    check_module(model, 'load_gates', CheckpointError)
    adapter = path if isinstance(path, Adapter) else read_adapter(path)
    layers: dict[str, Any] = {at: m for at, m in model.named_modules() if isinstance(m, HasGates)}
    if layers.keys() != adapter.sites.keys():
        here, there = sorted(layers.keys() - adapter.sites.keys()), sorted(adapter.sites.keys() - layers.keys())
        raise CheckpointError(
            f'{adapter.name}: is for other layers: only {type(model).__name__} has gates at {some(here, 3)}, only the '
            f'file at {some(there, 3)}; plug the model with the spec of the file, {json.dumps(adapter.spec)}'
        )
    state = base_state(model)
    check_base(adapter, state, type(model).__name__, force)
    stores = [store(state, name, value, 'head') for name, value in adapter.heads.items()]
    gates = {k: v for k, v in model.state_dict().items() if inside_gate(model, k)}
    if adapter.learnt and adapter.learnt.keys() == gates.keys() and adapter.spec == for_json(specs(model), 'spec', {}):
        stores += [store(gates, name, value, 'parameter of gates') for name, value in adapter.learnt.items()]
    else:
        for at, layer in layers.items():
            stores += resolved(at, layer, adapter)
    for each in stores:
        each()
    return adapter


def store(state: dict[str, Tensor], name: str, value: Tensor, what: str) -> Store:
    """What puts a value into a tensor of a model.

    Raises:
        CheckpointError: there is no such tensor, or it has another shape.
    """
    if name not in state or state[name].shape != value.shape:
        there = f'of shape {tuple(state[name].shape)}' if name in state else 'not there'
        raise CheckpointError(f'{name}: is {there}; the file has a {what} of shape {tuple(value.shape)}')
    return lambda: state[name].copy_(value)


def resolved(path: str, layer: Any, adapter: Adapter) -> list[Store]:
    """What makes the gates of a layer come to the constants of a file.

    The gates divide by what they were at the start (``preserve=True``); another start makes them another multiple.

    Raises:
        CheckpointError: they do not divide, a constant is 0, or there is a shift and nothing that learns one.
    """
    gate, _, inputs = adapter.sites[path].constants
    stores: list[Store] = []
    for side, wanted in ((OUTPUT, gate), (INPUT, inputs)):
        gates = gates_of(layer, side)
        if wanted is None or not gates:
            if (wanted is None) != (not gates):
                raise CheckpointError(f'{path}: the gates of the file and of the model are on other sides of the layer')
            continue
        first = next((g for g in gates if g.reference is not None), None)
        if first is None:
            raise CheckpointError(
                f'{path}: the constants of {adapter.name} cannot be put into its attention, which does not divide by '
                f'its start; plug with preserve=True, or save the file with learnt=True'
            )
        found = torch.stack([g().double() for g in gates]).prod(0)
        if not bool((wanted != 0).all()) or wanted.shape != found.shape:
            raise CheckpointError(
                f'{path}: constants of {adapter.name} are 0, or not {found.numel()}: no start gives them'
            )
        reference = first.reference.double() * found / wanted.to(found.device)
        stores.append(partial(first.reference.copy_, reference))
    return stores + shifted(path, gates_of(layer, OUTPUT), adapter)


def gates_of(layer: Any, side: str) -> list[Any]:
    """Constant gates of one side of a layer."""
    return [g for g in layer.gate or () if g.side == side]


def shifted(path: str, gates: list[Any], adapter: Adapter) -> list[Store]:
    """What makes the shifts of a layer come to that of a file: the last one, and those before it to 0."""
    shift = adapter.sites[path].constants.shift
    learnt = [g for g in gates if g.bias is not None]
    if shift is None or not learnt:
        if shift is not None:
            raise CheckpointError(f'{path}: {adapter.name} has a shift, and its gates learn none; plug with shift=True')
        return [g.bias.zero_ for g in learnt]
    last = learnt[-1]
    after = gates[gates.index(last) + 1 :]

    def put() -> None:  # the gates after it have their new values by now
        value = shift.to(last.bias.device)
        for g in after:
            value = value / g().double()
        last.bias.copy_(value)

    return [*(g.bias.zero_ for g in learnt[:-1]), put]


def unload(model: nn.Module, base: BaseLike = None) -> None:
    """Take the gates off a plugged model, in place: its base, with the stock classes and the stock keys, bit for bit.

    Args:
        model: plugged.
        base: where heads were trained, the weights that they had: a state dict, a file or a model.

    Raises:
        CheckpointError: weights beside the gates are known to have changed, and ``base`` does not say what they were,
            or is another model's. The model has not been touched.
    """
    check_module(model, 'unload', CheckpointError)
    check_bare(model, FoldError)
    state = base_state(model)
    remembered = getattr(model, BASE, None)
    before = None if base is None else stock_weights(base, list(state))
    if before is not None:
        wrong = [name for name, value in state.items() if name not in before or before[name].shape != value.shape]
        if wrong:
            raise CheckpointError(f'unload: the base has no {some(wrong, 3)} of the same shape; is it another model?')
        before = {name: before[name] for name in state}
    changed = [] if remembered is None else remembered.changed(digests(state if before is None else before))
    if changed:
        what = 'are not what they were when training began' if before is None else 'are others in this base'
        raise CheckpointError(f'unload: {some(changed)} {what}; give the weights that it began with, base=...')
    for layer in [m for m in model.modules() if isinstance(m, HasGates)]:
        detach(layer)
    for module in list(model.modules()):
        uninstall(module)
    unregister(model, set())
    make_stock_(model)
    if before is not None:
        model.load_state_dict(before, strict=True)
