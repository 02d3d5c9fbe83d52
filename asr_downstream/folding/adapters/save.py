"""`save_gates`: what a plugged model has learnt, as an adapter file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError, FoldError
from asr_downstream.folding.adapters.apply import Given, apply_to_state
from asr_downstream.folding.adapters.base import (
    BASE_FILE,
    COUNTER,
    Base,
    Frozen,
    base_state,
    digests,
    learning,
    matching,
    read_base,
)
from asr_downstream.folding.adapters.file import Adapter, Site, write_adapter
from asr_downstream.folding.adapters.folders import weights_at
from asr_downstream.folding.adapters.layers import kind_of, member
from asr_downstream.folding.exact import constants_of, fold_exactly
from asr_downstream.measure.versions import versions
from asr_downstream.modules.affine import Constants
from asr_downstream.modules.check import check_module
from asr_downstream.modules.copies import copy_of
from asr_downstream.modules.slots import BASE, HasGates, inside_gate
from asr_downstream.plugging.save import for_json

__all__ = ['BaseLike', 'save_gates', 'save_of_training', 'stock_weights']

BaseLike: TypeAlias = Base | nn.Module | Mapping[str, Tensor] | str | Path | None
CHANGED = 'changed'


@torch.no_grad()
def save_gates(
    model: nn.Module,
    path: str | Path,
    heads: Sequence[str] | str | None = None,
    base: BaseLike = None,
    learnt: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Adapter:
    """Write what the gates of a model have learnt: the constants of each site, in float64, and trained heads.

        save_gates(detector, 'night.safetensors')                          # its base was remembered, or is frozen
        save_gates(detector, 'night.safetensors', base='base.pth')         # its base is compared with this one
        save_gates(detector, 'fish.safetensors', heads=['bbox_head.*'], base='base.pth')

    Before anything is written, the file's contents are applied to the base and compared with `asr_downstream.fold` of
    the model, bit for bit.

    Args:
        model: plugged, with constant gates only, in eval mode; it is not changed.
        path: file to write, ``.safetensors``.
        heads: patterns of the names of weights that were trained beside the gates and are kept whole; ``'changed'``:
            all that differ from the base. None: what `asr_downstream.folding.adapters.remember` was told.
        base: what the gates were trained on: its weights, a file of them, a folder of diffusers, a stock model. None:
            as it was remembered; if it was not, the weights that the model has now, which must be frozen.
        learnt: keep the parameters of the gates too, with which `asr_downstream.load_gates` goes on exactly; of most
            attentions they are many times larger.
        about: anything else to keep, as JSON holds it.

    Returns:
        What was written, which prints as a table.

    Raises:
        CheckpointError: the base was trained, outside of the heads; or the model has no gates.
        FoldError: the model does not fold.
        AsrError: the file cannot be written.
    """
    check_module(model, 'save_gates', CheckpointError)
    if not any(isinstance(m, HasGates) for m in model.modules()):
        raise CheckpointError(f'save_gates: {type(model).__name__} has no gates; plug and train it first')
    own = copy_of(model, FoldError).cpu()
    folded, report = fold_exactly(own)
    state = base_state(own)
    named, tensors = trained(model, state, heads, base)
    parameters = {k: v.clone() for k, v in own.state_dict().items() if inside_gate(own, k)} if learnt else {}
    layers: dict[str, Any] = {at: m for at, m in own.named_modules() if isinstance(m, HasGates)}
    adapter = Adapter(
        {at: site(at, layer) for at, layer in layers.items()},
        Frozen.of({name: found for name, found in tensors.items() if name not in named}),
        {name: state[name] for name in named},
        parameters,
        type(folded).__name__,
        for_json(report.spec, 'spec', {}),
        dict(about or {}),
        {key: value for key, value in versions().items() if key not in ('machine', 'accelerator')},
        Path(path),
    )
    again = apply_to_state(state, [Given(adapter)])
    stock = folded.state_dict()
    if different := [name for name in {**stock, **again} if not same(stock.get(name), again.get(name))]:
        raise FoldError(f'save_gates: {some(different)} would not come back as the fold has them; nothing was written')
    write_adapter(adapter, Path(path))
    return adapter


def save_of_training(
    model: nn.Module,
    path: Path,
    folder: Path,
    heads: Sequence[str] | str | None = None,
    base: Path | None = None,
    start: Path | None = None,
    **options: Any,
) -> Adapter:
    """Save the gates of a training; what is not given is as its folder says.

    That is what `asr_downstream.folding.adapters.remember` has written there.

    Args:
        model: as it was trained.
        path: see `save_gates`; likewise ``heads``, ``base`` and ``options``.
        folder: of the training.
        heads: see above.
        base: see above.
        start: the base, if the folder does not say.
        **options: see above.
    """
    record = read_base(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else None
    if heads is None and record is not None:
        heads = record.heads
    return save_gates(model, path, heads, base or record or start, **options)


def site(path: str, layer: Any) -> Site:
    """Constants of a plugged layer, see `constants_of`."""
    constants = constants_of(path, layer)
    kind = kind_of(layer)
    if kind is None:
        raise FoldError(f'{path}: {type(layer).__name__} is a layer that adapters do not know')
    found = Constants(*(v if v is None else v.detach().double().cpu().contiguous() for v in constants))
    return Site(kind, getattr(layer, 'groups', 1) if kind.startswith('Conv') else 1, found)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are there and the same, bit for bit."""
    return a is not None and b is not None and a.dtype == b.dtype and digests({'': a}) == digests({'': b})


def trained(
    model: nn.Module, state: Mapping[str, Tensor], heads: Sequence[str] | str | None, base: BaseLike
) -> tuple[list[str], dict[str, str]]:
    """Find the heads of a model, and check that nothing else was trained.

    Returns:
        Names of the heads, and the digests of all its weights.

    Raises:
        CheckpointError: something else was trained, or a head is not there.
    """
    sites = [member(at, 'weight') for at, m in model.named_modules() if isinstance(m, HasGates)]
    known: Base | None = getattr(model, BASE, None) if base is None else base_of(base, sites)
    tensors = digests(state)
    if heads == CHANGED:
        if known is None:
            raise CheckpointError("save_gates: heads='changed' needs a base to compare with; give base=...")
        named = [name for name in known.changed(tensors) if name in state]
    elif heads is None:
        named = [name for name in (known.heads if known is not None else ()) if name in state]
    else:
        named = matching(state, heads)
    counters = (f'{name.rpartition(".")[0]}.{COUNTER}' for name in named if name.endswith('.running_mean'))
    named = list(dict.fromkeys([*named, *(name for name in counters if name in state)]))
    if known is None:
        moving = learning(model, named)
        what = f'its base is not known, and {len(moving)} of its weights learn beside the gates'
        advice = 'give base=..., the weights that training began with, or freeze them before training'
    else:
        moving = [name for name in known.changed(tensors) if name not in named]
        what = f'its base was trained: {len(moving)} of {len(known.tensors)} weights differ'
        advice = (
            "name them if they are heads (heads=[...] or 'changed', --heads), or ship the fold of the model instead"
        )
    if moving:
        raise CheckpointError(f'save_gates: {type(model).__name__}: {what} ({some(moving)}); {advice}')
    return named, tensors


def base_of(base: Any, names: Sequence[str] = ()) -> Base:
    """Digests of a base that is given as weights, a file, a model, or as they were remembered.

    Raises:
        CheckpointError: it is none of these, or cannot be read.
    """
    if isinstance(base, Base):
        return base
    if isinstance(base, str | Path) and Path(base).suffix == '.json':
        return read_base(Path(base))
    return Base(digests(stock_weights(base, names)))


def stock_weights(base: Any, names: Sequence[str] = ()) -> Mapping[str, Tensor]:
    """Weights of a base that is given as weights, a file, a folder, or a model.

    Args:
        base: see above.
        names: some of its weights, to find it in a folder.

    Raises:
        CheckpointError: it is none of these, or cannot be read.
    """
    if isinstance(base, nn.Module):
        return base_state(base)
    if isinstance(base, str | Path):
        return weights_at(Path(base), names)
    if not isinstance(base, Mapping) or not all(isinstance(v, Tensor) for v in base.values()):
        raise CheckpointError(f'base: expected weights, a file of them or a model, got a {type(base).__name__}')
    return base
