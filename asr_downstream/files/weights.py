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
from torch import Tensor

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import first_line

# How torch names what a weights-only load does not let through, in most of its messages.
REFUSED = re.compile(r'unsupported (?:global|class|attribute)(?:: GLOBAL)? \S+', re.IGNORECASE)

__all__ = ['damaged', 'is_finite', 'read_checkpoint', 'state_dict_of']


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


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; eight bits are too few for torch to tell."""
    if not value.is_floating_point() and not value.is_complex():
        return True
    return bool((value.float() if value.element_size() == 1 else value).isfinite().all())
