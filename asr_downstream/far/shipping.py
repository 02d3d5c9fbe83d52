"""Folders with a model whose attention was replaced: the library's own config, weights, and what was replaced."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from asr_downstream import description as gates
from asr_downstream.checkpoint import load_state
from asr_downstream.configs import plain
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.far.description import check_replaced, mixers
from asr_downstream.far.replacing import replace
from asr_downstream.files import writable_folder, write_json
from asr_downstream.folding import fold
from asr_downstream.versions import versions

__all__ = ['FAR_FILE', 'load_far', 'save_far']

FAR_FILE = 'far.json'
WEIGHTS = {'transformers': 'model.safetensors', 'diffusers': 'diffusion_pytorch_model.safetensors'}


def save_far(model: Any, folder: Path, about: dict[str, Any] | None = None) -> Path:
    """Write a model of transformers or diffusers, replaced or stock, gates folded, to a folder, whole or not at all.

    Args:
        model: the model; a stock one is written as its library does, and can be read by that alone.
        folder: is replaced if it is such a folder already.
        about: further facts for ``far.json``.

    Raises:
        AsrError: the model is of another library, or the folder is something else or cannot be written.
        FoldError: gates depend on the input.
    """
    library = type(model).__module__.partition('.')[0]
    if library not in WEIGHTS:
        raise AsrError(
            f'{type(model).__name__}: is neither of transformers nor of diffusers; save its state_dict() and '
            f'model.replace_spec, and call replace(model, spec) before loading them'
        )
    if any(True for _ in mixers(model)):
        check_replaced(model)
    if folder.exists() and not (folder / FAR_FILE).is_file():
        raise AsrError(f'{folder}: exists and has no {FAR_FILE}; choose another folder')
    if gates.describe(model).sites:
        model = fold(model)[0]
    aside = writable_folder(folder.with_name(f'.{folder.name}.tmp'))
    model.config.save_pretrained(aside) if library == 'transformers' else model.save_config(aside)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, aside / WEIGHTS[library], {'format': 'pt'})
    content = {
        'library': library,
        'class': type(model).__name__,
        'dtype': str(next(model.parameters()).dtype).removeprefix('torch.'),
        'replace': plain(getattr(model, 'replace_spec', None)),
        **(about or {}),
        'versions': versions(),
    }
    write_json(aside / FAR_FILE, content)
    old = folder.with_name(f'.{folder.name}.old')
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load_far(folder: Path) -> Any:
    """Read what `save_far` wrote.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        CheckpointError: it is no such folder, or its weights do not fit.
    """
    try:
        content = json.loads((folder / FAR_FILE).read_text())
        library, name, spec = content['library'], content['class'], content['replace']
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f'{folder}: has no {FAR_FILE} that can be read; give a folder of save_far') from error
    if library not in WEIGHTS:
        raise CheckpointError(f'{folder}: library {library!r} is not known')
    cls = getattr(importlib.import_module(library), name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise CheckpointError(f'{folder}: {library} has no model {name!r}')
    settings: Any = cls
    if library == 'transformers':
        model = settings(settings.config_class.from_pretrained(folder))
    else:
        model = settings.from_config(settings.load_config(folder))
    if spec is not None:
        replace(model, spec)
    weights = folder / WEIGHTS[library]
    if not weights.is_file():
        raise CheckpointError(f'{folder}: has no {weights.name}')
    dtype = getattr(torch, content.get('dtype', 'float32'), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f'{folder}: dtype {content["dtype"]!r} is not known')
    nn.Module.to(model, dtype)
    load_state(model, load_file(weights), weights)
    return model.eval()
