"""`load_plugged`: a plugged or replaced model from the folder that its `save_pretrained` has written."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.modules.check import check_module
from asr_downstream.plugging.save import (
    AS_TEXT,
    FORMAT,
    LIBRARIES,
    PLUGS,
    REPLACED,
    SPEC,
    STEPS,
    WEIGHTS,
    records,
    unwritable,
)
from asr_downstream.plugging.weights import check_weights_finite, load_state
from asr_downstream.registry import REBUILDERS, find

__all__ = ['build_stock', 'folder_path', 'load_plugged', 'take_dtypes']


def load_plugged(folder: str | Path, model: nn.Module | None = None) -> Any:
    """Build and fill the model that ``save_pretrained`` of a plugged or replaced model has written.

        model = load_plugged('out/unet')
        pipeline = DDPMPipeline.from_pretrained('out', unet=model)
        folded, report = fold(model)

    Nothing in the folder is run: the class is one of diffusers or transformers, weights are safetensors.

    Args:
        folder: where it was saved.
        model: a fresh stock model to plug and fill, in place; needed where its class is none of diffusers or
            transformers. Where the spec has values that JSON cannot hold, it is plugged already.

    Returns:
        The model: stock class, plugged, in eval mode, on the CPU.

    Raises:
        CheckpointError: it is no such folder, or something in it is damaged or missing.
        PlugError: what was plugged does not fit the model.
    """
    folder = folder_path(folder, 'load_plugged')
    content = read_spec(folder)
    if model is None:
        model = build_stock(folder, content['library'], content['class'])
    check_module(model, 'load_plugged', CheckpointError)
    if as_text := content.get(AS_TEXT):
        if not any(True for name in (PLUGS, REPLACED) for _ in records(model, name)):
            raise CheckpointError(
                f'{folder / SPEC}: {unwritable(as_text)}; plug the model with them yourself, and give it, model=...'
            )
    else:
        attach_again(model, content, folder)
    state = read_checkpoint(folder / WEIGHTS)['state_dict']
    check_weights_finite(state, folder / WEIGHTS, model)
    take_dtypes(model, state)
    load_state(model, state, folder / WEIGHTS)
    return model.eval()


def attach_again(model: nn.Module, content: dict[str, Any], folder: Path) -> None:
    """Plug and replace in a fresh model what the spec says, in its order.

    Raises:
        CheckpointError: the model has no such part.
    """
    for step in dict.fromkeys([*content['order'], *STEPS]):
        for path, spec in content[step].items():
            try:
                part = model.get_submodule(path)
            except AttributeError as error:
                raise CheckpointError(f'{folder / SPEC}: {step}: {type(model).__name__} has no {path!r}') from error
            find(REBUILDERS, step)(part, spec)


def folder_path(folder: Any, function: str) -> Path:
    """Path of a folder that is there.

    Raises:
        CheckpointError: it is not, or this is no path.
    """
    if not isinstance(folder, str | Path):
        raise CheckpointError(f'{function}: {folder!r} should be a folder, a text or a Path')
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f'{path}: no such folder')
    return path


def read_spec(folder: Path) -> dict[str, Any]:
    """Read and check the description of the model in a folder.

    Raises:
        CheckpointError: it is not there, or not as `asr_downstream.plugging.save` writes it.
    """
    path = folder / SPEC
    if not path.is_file():
        inside = sorted(found.parent for found in folder.glob(f'*/{SPEC}'))
        hint = ', '.join(f"load_plugged('{found}')" for found in inside)
        if inside:
            raise CheckpointError(f'{folder}: is that of a pipeline; of its parts, {hint}')
        raise CheckpointError(
            f'{folder}: has no {SPEC}; give a folder that save_pretrained of a plugged model has written (one of '
            f'far.save_far is read by far.load_far, a stock one by its library)'
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read ({error}); copy the folder again') from error
    if not isinstance(content, dict) or not isinstance(content.get('format'), int):
        raise CheckpointError(f'{path}: is no description of a plugged model; copy the folder again')
    if content['format'] > FORMAT:
        raise CheckpointError(f'{path}: was written by a newer asr_downstream ({content["format"]}); update it')
    if not isinstance(content.get(AS_TEXT, {}), dict):
        raise CheckpointError(f'{path}: {AS_TEXT!r} is {content[AS_TEXT]!r}, which save_pretrained does not write')
    content.setdefault('remove', {})  # older files have none
    kinds = {'library': str | None, 'class': str, **dict.fromkeys(STEPS, dict), 'order': list}
    for key, kind in kinds.items():
        if key not in content or not isinstance(content[key], kind):
            raise CheckpointError(f'{path}: {key!r} is {content.get(key)!r}, which save_pretrained does not write')
    if unknown := [name for name in content['order'] if name not in STEPS]:
        raise CheckpointError(f"{path}: 'order' has {unknown[0]!r}, which save_pretrained does not write")
    return content


def build_stock(folder: Path, library: str | None, name: str) -> Any:
    """Build a stock model of diffusers or transformers, with random weights, from the config in a folder.

    Raises:
        CheckpointError: the class is not known, or the config cannot be read.
    """
    if library not in LIBRARIES:
        raise CheckpointError(f'{folder}: library {library!r} is not known; build the {name} and give it, model=...')
    try:
        cls = getattr(importlib.import_module(library), name, None)
    except ImportError as error:
        raise CheckpointError(f'{folder}: needs {library} ({error})') from error
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise CheckpointError(
            f'{folder}: {library} has no model {name!r}; if it is yours, build it and give it, model=...'
        )
    settings: Any = cls
    try:
        if library == 'transformers':
            model = settings(settings.config_class.from_pretrained(folder, local_files_only=True))
            if model.can_generate() and (folder / 'generation_config.json').is_file():
                model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
            return model
        return settings.from_config(settings.load_config(folder, local_files_only=True))
    except AsrError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f'{folder}: {name} cannot be built from its config ({first})') from error


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the tensors of a model the precision of those that will be loaded, in place."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and tensor.is_floating_point():
            tensor.data = tensor.data.to(state[name].dtype)
