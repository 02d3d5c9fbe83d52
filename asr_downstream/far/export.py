"""Folders with a model whose attention was replaced: the library's own config, weights, and what was replaced."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.far.card import card
from asr_downstream.far.model.describe import check_replaced, mixers
from asr_downstream.far.model.replace import replace
from asr_downstream.files.atomic import first_line, sha256, whole_folder, write_json
from asr_downstream.files.configs import plain
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.measure.versions import versions
from asr_downstream.modules.check import check_module
from asr_downstream.plugging import describe as gates
from asr_downstream.plugging import save as saving
from asr_downstream.plugging.load import folder_path
from asr_downstream.plugging.weights import check_weights_finite, load_state

__all__ = ['FAR_FILE', 'load_far', 'read_facts', 'save_far']

FAR_FILE = 'far.json'
WEIGHTS = {'transformers': 'model.safetensors', 'diffusers': 'diffusion_pytorch_model.safetensors'}


def save_far(
    model: Any,
    folder: Path | str,
    about: dict[str, Any] | None = None,
    others: Callable[[Path], Any] | None = None,
    check: Any = None,
) -> Path:
    """Write a model of transformers or diffusers, replaced or stock, gates folded, to a folder, whole or not at all.

    The folder has the library's config, weights, ``far.json`` and a model card, and `load_far` reads it. The weights of
    a replaced model have a name that the library does not look for: it would load them without the LSTMs.

    Args:
        model: the model; a stock one is written as its library does, and can be read by that alone.
        folder: is replaced if it is such a folder already.
        about: further facts for ``far.json``.
        others: writes what else belongs into the folder that it is given, such as another card.
        check: inputs to compare a model with gates and its folded self on, see `asr_downstream.fold`.

    Raises:
        AsrError: the model is of another library, or the folder is something else or cannot be written.
        FoldError: gates depend on the input.
    """
    check_module(model, 'save_far')
    folder = Path(folder)
    library = saving.library_of(model)
    if library is None:
        raise AsrError(
            f'{type(model).__name__}: is neither of transformers nor of diffusers; save its state_dict() and '
            f'model.replace_spec, and call replace(model, spec) before loading them'
        )
    if any(True for _ in mixers(model)):
        check_replaced(model)
    if folder.exists() and not (folder / FAR_FILE).is_file():
        raise AsrError(f'{folder}: exists and has no {FAR_FILE}; choose another folder')
    if gates.describe(model).sites:
        model = fold_exactly(model, check=check)[0]
    content = {
        'library': library,
        'class': type(model).__name__,
        'dtype': str(next(model.parameters()).dtype).removeprefix('torch.'),
        'replace': plain(getattr(model, 'replace_spec', None)),
        **(about or {}),
        'versions': versions(),
    }
    with whole_folder(folder, sum(value.nbytes for value in model.state_dict().values())) as aside:
        saving.save_config(model, library, aside)
        weights = WEIGHTS[library] if content['replace'] is None else saving.WEIGHTS
        save_file(saving.safe_state(model.state_dict()), aside / weights, {'format': 'pt'})
        hashes = {name: sha256(aside / name) for name in ('config.json', weights)}
        write_json(aside / FAR_FILE, {**content, 'files': hashes})
        (aside / 'README.md').write_text(card(content, model), encoding='utf-8')
        if others is not None:
            others(aside)
    return folder


def load_far(folder: Path | str) -> Any:
    """Read what `save_far` wrote.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        CheckpointError: it is no such folder, a file in it is damaged, or its weights do not fit or are not finite.
    """
    folder = folder_path(folder, 'load_far')
    content = read_facts(folder)
    library, dtype = content['library'], getattr(torch, content['dtype'])
    cls = getattr(importlib.import_module(library), content['class'], None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise CheckpointError(f'{folder / FAR_FILE}: {library} has no model {content["class"]!r}')
    check_unchanged(folder, content)
    weights = folder / WEIGHTS[library]  # where those of replaced models were as well, once
    if content['replace'] is not None and not weights.is_file():
        weights = folder / saving.WEIGHTS
    state = state_dict_of(read_checkpoint(weights), weights)
    settings: Any = cls
    try:
        if library == 'transformers':
            model = settings(settings.config_class.from_pretrained(folder, local_files_only=True))
        else:
            model = settings.from_config(settings.load_config(folder, local_files_only=True))
        nn.Module.to(model, dtype)
    except Exception as error:  # classes raise anything for settings that make no sense
        raise CheckpointError(
            f'{folder / "config.json"}: no {content["class"]} can be made from it ({first_line(error)[:200]}); is it '
            f'damaged? Ship the model again'
        ) from error
    if content['replace'] is not None:
        try:
            replace(model, content['replace'])
        except (PlugError, TypeError, AttributeError, ValueError, KeyError) as error:
            raise CheckpointError(f'{folder / FAR_FILE}: its "replace" does not fit ({first_line(error)})') from error
    check_weights_finite(state, weights, model)
    load_state(model, state, weights)
    return model.eval()


def check_unchanged(folder: Path, content: dict[str, Any]) -> None:
    """Refuse files that are not what `save_far` wrote; folders of older versions know no hashes.

    Raises:
        CheckpointError: see above.
    """
    hashes = content.get('files', {})
    if not isinstance(hashes, dict) or not hashes.keys() <= {'config.json', saving.WEIGHTS, *WEIGHTS.values()}:
        raise CheckpointError(f'{folder / FAR_FILE}: files={hashes!r} is not known; is it damaged?')
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f'{path}: is missing; copy the whole folder again')
        if sha256(path) != expected:
            raise CheckpointError(
                f'{path}: is damaged, or was changed since it was written; copy it again, or take it out of "files" in '
                f'{FAR_FILE} if the change was meant'
            )


def read_facts(folder: Path) -> dict[str, Any]:
    """Read ``far.json``: ``library``, ``class``, ``dtype`` and ``replace`` are what they should be.

    Raises:
        CheckpointError: they are not.
    """
    path = folder / FAR_FILE
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{folder}: has no {FAR_FILE} that can be read ({first_line(error)[:120]}); give a folder of save_far'
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path}: holds a {type(content).__name__}; give a folder of save_far')
    found = {'dtype': 'float32', **content}
    dtype = getattr(torch, found['dtype'], None) if isinstance(found['dtype'], str) else None
    fits = {
        'library': isinstance(found.get('library'), str) and found['library'] in WEIGHTS,
        'class': isinstance(found.get('class'), str) and found['class'].isidentifier(),
        'dtype': isinstance(dtype, torch.dtype) and dtype.is_floating_point,
        'replace': 'replace' in found and (found['replace'] is None or isinstance(found['replace'], dict)),
    }
    if wrong := [key for key, fit in fits.items() if not fit]:
        raise CheckpointError(f'{path}: {wrong[0]}={found.get(wrong[0])!r} is not known; is it damaged?')
    return found
