"""Where the constant gates of an attention block fold: found by trying, layer by layer, in float64.

A trial runs a part of the model around the block on what that part was given in a real forward. Random gates take the
place of the block; the same gates in the weights of a layer, and nothing in the place of the block, have to give the
same outputs. That is all that is asked, so whatever lies between the two (an activation, a pooling, a branch that reads
the map as well) is allowed exactly if the gates go through it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asr_downstream.console.progress import bar
from asr_downstream.errors import AsrError, FoldError
from asr_downstream.folding.native.blocks import Constant, registered_once
from asr_downstream.folding.native.trials import is_affine, sampled, stream, trial
from asr_downstream.folding.passes import Step
from asr_downstream.modules.affine import Constants, input_channels, output_channels
from asr_downstream.modules.check import check_own, check_weights
from asr_downstream.modules.copies import batch_of, copy_of
from asr_downstream.modules.native import Native

__all__ = ['Place', 'find_places']

CANDIDATES = 4  # nearest layers that are tried on each side
SCOPES = 3  # parts of the model that are tried around a block, the smallest first
CALLS = 4  # of a part in one forward, such as a head on the levels of a pyramid, that are compared


class Place(NamedTuple):
    """A layer that takes the gates of a block.

    Attributes:
        layer: its path.
        side: ``'outputs'``, the rows of its weight and its bias, or ``'inputs'``, the columns of its weight.
        repeat: how many channels of the layer, one after another, take each gate: more than 1 where a map is flattened
            or its pixels are shuffled between the two.
        error: largest relative difference in the trial.
    """

    layer: str
    side: str
    repeat: int
    error: float

    def constants(self, gates: Tensor) -> Constants:
        """What ``gates`` are for the layer."""
        return constants_of(self.side, self.repeat, gates)


def constants_of(side: str, repeat: int, gates: Tensor) -> Constants:
    """Return ``gates`` as constants of the outputs or of the inputs of a layer."""
    gates = gates.repeat_interleave(repeat)
    return Constants(gate=gates) if side == 'outputs' else Constants(inputs=gates)


@torch.no_grad()
def find_places(
    model: nn.Module, blocks: Mapping[str, Native], means: Mapping[str, Tensor], batch: Any, step: Step
) -> tuple[dict[str, Place], dict[str, str]]:
    """Find a layer for the gates of each block.

    Args:
        model: in eval mode; it is not changed.
        blocks: the blocks, by path.
        means: their mean gates ``(C,)``: random ones have the same signs.
        batch: real data to try on.
        step: how to run it.

    Returns:
        Path of the block -> place, and path -> why there is none.
    """
    model = copy_of(model, FoldError)
    once = registered_once(model)
    places: dict[str, Place] = {}
    reasons = {path: 'is registered in several places' for path in blocks if id(model.get_submodule(path)) not in once}
    waiting = {path: around(model, path) for path in blocks if path not in reasons}
    while waiting:
        scopes = {path: ancestors.pop(0) for path, ancestors in waiting.items()}
        seen = watch(model, set(scopes.values()), batch, step)
        for path, scope in bar(list(scopes.items()), 'trying'):
            constant = Constant(signed_like(means[path]), blocks[path].axis)
            usable = {p for p, m in model.named_modules() if id(m) in once and (scope, p) not in seen.outside}
            usable = {p for p in usable if not any(p.startswith(f'{block}.') for block in blocks)}
            found = try_part(model, scope, path, constant, seen.calls[scope], usable)
            if isinstance(found, Place):
                places[path] = found
            elif found or path not in reasons:
                reasons[path] = found or 'was not reached by the calibration data'
        waiting = {path: rest for path, rest in waiting.items() if path not in places and rest}
    return places, {path: reason for path, reason in reasons.items() if path not in places}


def around(model: nn.Module, path: str) -> list[str]:
    """Parts of the model around a block that have a forward, the smallest first."""
    parts = path.split('.')
    found = ['.'.join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
    return [p for p in found if not isinstance(model.get_submodule(p), nn.ModuleList | nn.ModuleDict)][:SCOPES]


class Seen:
    """What a forward of the model shows of some of its parts.

    Attributes:
        calls: arguments of the first calls of each part, copied.
        outside: parts and layers in them that also run while the part does not, as they are used elsewhere.
    """

    def __init__(self, scopes: Iterable[str]) -> None:
        self.calls: dict[str, list[Any]] = {scope: [] for scope in scopes}
        self.outside: set[tuple[str, str]] = set()
        self.running: set[str] = set()

    def begin(self, scope: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a part runs."""
        self.running.add(scope)
        if len(self.calls[scope]) < CALLS:
            self.calls[scope].append(batch_of((args, kwargs)))

    def end(self, scope: str, *_: Any) -> None:
        """Note that it has run."""
        self.running.discard(scope)

    def layer(self, path: str, *_: Any) -> None:
        """Note that a layer runs."""
        inside = (scope for scope in self.calls if not scope or path.startswith(f'{scope}.'))
        self.outside.update((scope, path) for scope in inside if scope not in self.running)


def watch(model: nn.Module, scopes: Iterable[str], batch: Any, step: Step) -> Seen:
    """Run the model once, and watch these parts."""
    seen = Seen(scopes)
    handles = []
    for scope in seen.calls:
        part = model.get_submodule(scope)
        handles.append(part.register_forward_pre_hook(partial(seen.begin, scope), with_kwargs=True, prepend=True))
        handles.append(part.register_forward_hook(partial(seen.end, scope)))
    for path, module in model.named_modules():
        if is_affine(module):
            handles.append(module.register_forward_pre_hook(partial(seen.layer, path)))
    try:
        step(model, batch_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def signed_like(mean: Tensor) -> Tensor:
    """Random gates with the signs of ``mean``: what lies between may let positive ones through alone."""
    return torch.where(mean < 0, -1.0, 1.0) * (0.5 + torch.rand(len(mean), generator=stream())).to(mean)


def try_part(
    model: nn.Module, scope: str, path: str, constant: Constant, calls: list[Any], usable: Collection[str]
) -> Place | str:
    """Try the layers of one part of the model for the gates of one block.

    Args:
        model: the model.
        scope: path of the part.
        path: of the block.
        constant: random gates to try with.
        calls: what the part was given.
        usable: paths of layers that belong to no block and run in the part alone.

    Returns:
        The first place that is right; or why there is none, '' if the part was not run.
    """
    if not calls:
        return ''
    prefix = f'{scope}.' if scope else ''
    part: nn.Module = copy_of(model.get_submodule(scope), FoldError).double()
    try:
        before, after, samples = sampled(part, path.removeprefix(prefix), constant, calls)
    except Exception as error:  # anything may go wrong where a part is run by itself, in another precision
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        return f'{scope or type(model).__name__} cannot be run by itself in float64 ({first})'
    if isinstance(samples, str):
        return samples
    gates = constant.gates
    tried: list[tuple[str, str]] = []
    for name, side in ordered(before, after):
        layer, whole = part.get_submodule(name), prefix + name
        repeat, rest = divmod(channels(layer, side), len(gates))
        if rest or not repeat or whole not in usable or sum(s == side for _, s in tried) == CANDIDATES:
            continue
        tried.append((whole, side))
        if can_take(model, whole):
            differs = trial(part, layer, constants_of(side, repeat, gates), samples)
            if differs is not None:
                return Place(whole, side, repeat, differs)
    if not tried:
        return f'there is no norm, convolution or linear layer beside it that fits its {len(gates)} channels'
    names = ', '.join(f'{side} of {name}' for name, side in tried)
    return f'its gates do not go through what lies between it and {names}'


def ordered(before: list[str], after: list[str]) -> Iterator[tuple[str, str]]:
    """Layers to try: those before, the last first, then those after, the first first; each once a side."""
    yield from ((name, 'outputs') for name in dict.fromkeys(reversed(before)))
    yield from ((name, 'inputs') for name in dict.fromkeys(after))


def channels(layer: nn.Module, side: str) -> int:
    """Channels of one side of a layer; 0: that side cannot be scaled."""
    try:
        return output_channels(layer) if side == 'outputs' else input_channels(layer)
    except ValueError:
        return 0


def can_take(model: nn.Module, path: str) -> bool:
    """Whether the weights of a layer are its own, and plain."""
    layer = model.get_submodule(path)
    try:
        check_weights(path, layer, FoldError)
        check_own(model, {path: layer}, FoldError)
    except AsrError:
        return False
    return True
