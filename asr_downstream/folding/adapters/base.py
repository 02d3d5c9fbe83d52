"""The base of an adapter: the weights that stay as they are while gates are trained, known by their digests.

A training that restricts what learns calls `remember` before its first step; `asr_downstream.save_gates` then refuses
a base that has changed since, and a file names the base that it was made for.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import read_json, write_json
from asr_downstream.modules.slots import BASE, inside_gate

__all__ = [
    'BASE_FILE',
    'COUNTER',
    'Base',
    'Frozen',
    'base_state',
    'digest',
    'digests',
    'learning',
    'matching',
    'read_base',
    'remember',
    'write_base',
]

BASE_FILE = 'adapter_base.json'  # in the folder of a training
FORMAT = 1
COUNTER = 'num_batches_tracked'  # of batch norms: no weight, and many checkpoints lack it
SIZE = 8  # bytes of a digest: of one tensor under one name, to tell it from others, not to withstand a forger


@dataclass(frozen=True)
class Base:
    """Weights of a model at the moment when its gates begin to learn.

    Attributes:
        tensors: name -> `digest`; of all weights but those of gates, heads among them.
        heads: names of the tensors that may be trained beside the gates.
    """

    tensors: dict[str, str]
    heads: tuple[str, ...] = ()

    def without(self, heads: Iterable[str]) -> Frozen:
        """Return what is left without the tensors of these names."""
        left = {*heads}
        return Frozen.of({name: found for name, found in self.tensors.items() if name not in left})

    def changed(self, now: Mapping[str, str]) -> list[str]:
        """Names of the tensors that are others ``now``, that are new, or that are gone."""
        return [name for name in {**self.tensors, **now} if self.tensors.get(name) != now.get(name)]


@dataclass(frozen=True)
class Frozen:
    """The tensors that an adapter left as they were, as its file knows them: without their names.

    Attributes:
        names: digest of all names.
        tensors: `digest` of each, in the order of the names.
    """

    names: str
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, str]) -> Frozen:
        """Make it from name -> digest."""
        names = sorted(tensors)
        return cls(hashed('\n'.join(names).encode()), tuple(tensors[name] for name in names))

    @property
    def digest(self) -> str:
        """One for all of it."""
        return hashed('\n'.join((self.names, *self.tensors)).encode())

    def differing(self, state: Mapping[str, Tensor], heads: Iterable[str]) -> list[str] | None:
        """Names of the tensors of a state dict, heads left out, that are others; None: it has other names."""
        left = {*heads}
        found = digests({name: value for name, value in state.items() if name not in left})
        if Frozen.of(found).names != self.names:
            return None
        return [name for name, known in zip(sorted(found), self.tensors, strict=True) if found[name] != known]


def hashed(text: bytes) -> str:
    """Digest of bytes, hexadecimal."""
    return hashlib.blake2b(text, digest_size=SIZE).hexdigest()


def remember(model: nn.Module, heads: Sequence[str] = (), folder: Path | None = None) -> Base:
    """Keep the digests of the weights of ``model``, outside of its gates, as its attribute ``adapter_base``.

    Call it when the weights of the base are loaded and nothing has been trained yet; of a training that goes on, the
    weights that were frozen are still those of the base.

    Args:
        model: plugged or about to be plugged.
        heads: fnmatch patterns of the names of weights that are trained beside gates, ``['bbox_head.*']``.
        folder: of the training, where the digests are written as well, for `asr-downstream gates save`; a record of the
            same base and heads stays, which has the digests of the heads from before they were trained.

    Raises:
        CheckpointError: a pattern names no weight.
    """
    state = base_state(model)
    base = Base(digests(state), tuple(matching(state, heads)))
    setattr(model, BASE, base)
    if folder is not None and not recorded(base, folder / BASE_FILE):
        write_base(base, folder / BASE_FILE)
    return base


def recorded(base: Base, path: Path) -> bool:
    """Whether a file is the record of this base, whatever its heads were."""
    try:
        before = read_base(path)
    except CheckpointError:
        return False
    return before.heads == base.heads and before.without(base.heads) == base.without(base.heads)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a model without those of gates and shared attentions: those of the stock model."""
    return {name: value for name, value in model.state_dict().items() if not inside_gate(model, name)}


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match a pattern, or lie in a module that does: ``'head'`` is ``'head.*'`` as well.

    Raises:
        CheckpointError: a pattern matches nothing, or is no pattern.
    """
    names = list(names)
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise CheckpointError(f"heads={patterns!r} should be a list of patterns, ['bbox_head.*']")
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f'{pattern}.*')]
        if not matches:
            raise CheckpointError(f'heads: nothing is named {pattern!r}; weights are {some(names)}')
        found.update(dict.fromkeys(matches))
    return [name for name in names if name in found]


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of the tensors of a state dict, by name; counters of batches are left out."""
    return {name: digest(value) for name, value in state.items() if name.rpartition('.')[2] != COUNTER}


def digest(tensor: Tensor) -> str:
    """Digest of the dtype, shape and bytes of a tensor, hexadecimal."""
    own = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    found = hashlib.blake2b(f'{own.dtype}{tuple(own.shape)}'.encode(), digest_size=SIZE)
    if size := own.numel() * own.element_size():
        found.update(memoryview((ctypes.c_char * size).from_address(own.data_ptr())))
    return found.hexdigest()


def write_base(base: Base, path: Path) -> None:
    """Write the digests of a base."""
    write_json(path, {'format': FORMAT, 'heads': list(base.heads), 'tensors': base.tensors})


def read_base(path: Path) -> Base:
    """Read what `write_base` has written.

    Raises:
        CheckpointError: it is not there, or something else.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read ({error}); give the weights of the base instead') from error
    given: dict[str, Any] = content if isinstance(content, dict) else {}
    tensors: Any = given.get('tensors')
    heads: Any = given.get('heads')
    whole = isinstance(tensors, dict) and isinstance(heads, list)
    if not whole or not all(isinstance(item, str) for item in (*tensors.values(), *heads)):
        raise CheckpointError(f'{path}: does not hold the digests of a base; give the weights of the base instead')
    if given.get('format') != FORMAT:
        raise CheckpointError(f'{path}: format {given.get("format")!r} is not known; update asr_downstream')
    return Base(tensors, tuple(heads))


def learning(model: nn.Module, heads: Iterable[str]) -> list[str]:
    """Names of the parameters outside of gates and heads that are trained."""
    left = {*heads}
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and name not in left and not inside_gate(model, name)
    ]
