"""Checkpoints: read without running code, loaded with a diagnosis, hashed.

Files are read with ``torch.load(weights_only=True)``. MMEngine's training checkpoints also hold log buffers, whose
pickles name ``getattr``; they are let through only for the buffers' own methods.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import first_line
from asr_downstream.plugging.sites import inside_gate

# Names that plugging adds, in the checkpoint of a model that is not at hand.
GATES = re.compile(r'(^|\.)(gate|dynamic|shared_attention)\.')
STATISTICS = ('running_mean', 'running_var')  # buffers of norms
# How torch names what a weights-only load does not let through, in most of its messages.
REFUSED = re.compile(r'unsupported (?:global|class|attribute)(?:: GLOBAL)? \S+', re.IGNORECASE)

__all__ = ['check_weights_finite', 'is_finite', 'load_state', 'not_finite', 'read_checkpoint', 'state_dict_of']


def read_checkpoint(path: Path, trust: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Read ``.pth`` or ``.safetensors``, on the CPU.

    Args:
        path: the file.
        trust: unpickle anything in it, which may run code that its author put there.
        mmap: leave tensors on the disk until they are used.

    Raises:
        CheckpointError: missing, damaged, or in need of ``trust``.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob('*.pth')) if path.parent.is_dir() else []
        raise CheckpointError(f'{path}: no such checkpoint; {"there is " + some(near) if near else "check the path"}')
    try:
        if path.suffix == '.safetensors':
            return {'state_dict': load_file(path)}
        with torch.serialization.safe_globals(mmengine_globals()):
            mmap = mmap and zipfile.is_zipfile(path)  # torch maps no other files
            checkpoint = torch.load(path, map_location='cpu', weights_only=not trust, mmap=mmap)
    except UnpicklingError as error:
        said = REFUSED.search(str(error))
        refused = said[0].strip() if said else ', '.join(named_in(path))
        if not refused:
            raise damaged(path, error) from error
        raise CheckpointError(
            f'{path}: holds more than weights and was not read, because unpickling it can run code '
            f'({refused[:200]}); add --trust only if you trust where it comes from'
        ) from error
    except PermissionError:
        raise
    except MemoryError as error:
        raise too_large(path, error) from error
    except Exception as error:  # damaged bytes lead anywhere: IndexError, AttributeError, struct.error, ...
        if isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error):
            raise too_large(path, error) from error
        raise damaged(path, error) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint with weights')
    return dict(checkpoint)


def named_in(path: Path) -> list[str]:
    """Classes and functions that the pickles in a file name, without running them; none if no pickle is whole."""
    found: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in (name for name in archive.namelist() if name.endswith('.pkl')):
                    with archive.open(member) as file:
                        found += names_of(file)
        else:
            with path.open('rb') as file:
                found += names_of(file)
    except Exception:  # a damaged archive
        return []
    return list(dict.fromkeys(found))


def names_of(file: IO[bytes]) -> Iterator[str]:
    """Names in the whole pickles at the start of a file; torch's old format has several before the weights."""
    try:
        while True:
            names, texts = [], ['', '']
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ('GLOBAL', 'INST'):
                    names.append(str(argument).replace(' ', '.'))
                elif opcode.name == 'STACK_GLOBAL':
                    names.append('.'.join(texts))
                elif isinstance(argument, str):
                    texts = [texts[1], argument]
            yield from names
    except Exception:  # the end, or no pickle
        return


def too_large(path: Path, error: BaseException) -> CheckpointError:
    """Error for a file that memory does not suffice for; the sizes that a damaged file asks for look the same."""
    return CheckpointError(
        f'{path}: memory does not suffice to read it ({path.stat().st_size:,} bytes; {first_line(error)[:120]}); free '
        f'some; if the file is small, copy it again'
    )


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Error for a file that cannot be parsed."""
    text = str(error).strip()
    if 'WeightsUnpickler error:' in text:  # before it stands advice about other ways of loading
        text = text.partition('WeightsUnpickler error:')[2].strip()
    first = text.splitlines()[0][:120] if text else type(error).__name__
    return CheckpointError(
        f'{path}: is damaged or not a checkpoint ({path.stat().st_size:,} bytes; {first}); copy or train it again'
    )


def mmengine_globals() -> list[Any]:
    """What an MMEngine checkpoint holds besides tensors: numpy arrays and its log buffers."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    core = np._core if hasattr(np, '_core') else np.core
    dtypes = [type(np.dtype(t)) for t in (np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64, bool)]
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        core.multiarray._reconstruct,
        core.multiarray.scalar,
        *dtypes,
        (buffer_method, 'builtins.getattr'),
    ]


def buffer_method(obj: Any, name: str) -> Any:
    """Stand in for ``getattr`` while a checkpoint is read: methods of log buffers and nothing else."""
    from mmengine.logging import HistoryBuffer

    if obj is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'Unsupported attribute {name!r} under weights_only')
    return getattr(obj, name)


def state_dict_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Find the weights in a checkpoint; a wrapper's ``module.`` prefix is taken off.

    Raises:
        CheckpointError: there are none.
    """
    state = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f'{path}: holds no weights; expected tensors under "state_dict", '
            f'found keys {some(list(map(str, checkpoint)))}'
        )
    prefix = 'module.'
    wrapped = all(key.startswith(prefix) for key in state)
    return {key.removeprefix(prefix) if wrapped else key: value for key, value in state.items()}


def check_weights_finite(state: Mapping[str, Tensor], path: Path, model: nn.Module | None = None) -> None:
    """Refuse weights with NaN or infinity, which compute without an error and mean nothing.

    Args:
        state: names and tensors, of any type.
        path: file they were read from, for the message.
        model: what they are of, to tell masks from weights; see `not_finite`.

    Raises:
        CheckpointError: some are not finite; with their names.
    """
    if broken := not_finite(state, model):
        raise CheckpointError(
            f'{path}: {some(broken)} {"is" if len(broken) == 1 else "are"} not finite: the training that wrote it had '
            f'diverged; take another checkpoint, from before'
        )


def not_finite(state: Mapping[str, Tensor], model: nn.Module | None = None) -> list[str]:
    """Names of the tensors that have NaN or infinity.

    Args:
        state: names and tensors.
        model: what they are of: infinities in its buffers, such as causal masks, are meant. Statistics of norms and
            what belongs to gates are no masks, and NaN is none.
    """
    broken = [name for name, value in state.items() if not is_finite(value)]
    if not broken or model is None:
        return broken
    masks = {
        name
        for name, _ in model.named_buffers()
        if name.rpartition('.')[2] not in STATISTICS and not inside_gate(model, name)
    }
    return [name for name in broken if name not in masks or bool(state[name].isnan().any())]


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; eight bits are too few for torch to tell."""
    if not value.is_floating_point() and not value.is_complex():
        return True
    return bool((value.float() if value.element_size() == 1 else value).isfinite().all())


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights strictly; the model is not touched unless everything fits.

    Raises:
        CheckpointError: names or shapes do not fit; the message tells folded, plugged and foreign checkpoints apart.
    """
    own = model.state_dict()
    gates = gate_keys(model)
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    reshaped = [k for k in own if k in state and own[k].shape != state[k].shape]
    name = type(model).__name__
    if gates and not reshaped and not unexpected and missing and set(missing) <= gates:
        raise CheckpointError(
            f'{path}: has no gates, but the config plugs {name}: it is a stock checkpoint, or was folded already; '
            f'use it with the stock config, or give the checkpoint that training wrote'
        )
    if unexpected and not reshaped and not missing and all(GATES.search(k) for k in unexpected):
        raise CheckpointError(
            f'{path}: has gates, but the config builds a stock {name}; use the config it was trained with, '
            f'or fold it first with tools/fold.py'
        )
    if missing or unexpected or reshaped:
        parts = [
            f'{len(missing)} missing ({some(missing, 2)})' if missing else '',
            f'{len(unexpected)} unknown ({some(unexpected, 2)})' if unexpected else '',
            (
                f'{len(reshaped)} of another shape ({reshaped[0]}: {tuple(state[reshaped[0]].shape)}, '
                f'expected {tuple(own[reshaped[0]].shape)})'
            )
            if reshaped
            else '',
        ]
        raise CheckpointError(
            f'{path}: was made for another model than the config builds ({name}): '
            f'{"; ".join(filter(None, parts))}; use the config it was trained with'
        )
    model.load_state_dict(state, strict=True)


def gate_keys(model: nn.Module) -> set[str]:
    """Names of the weights that plugging has added."""
    return {key for key in model.state_dict() if inside_gate(model, key)}
