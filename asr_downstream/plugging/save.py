"""`save_pretrained` of plugged and replaced models: nothing is lost, and nothing wrong loads.

diffusers and transformers load weights with gates or LSTMs, or without attention that was removed, with no more than a
warning, and compute something else. So the weights go to a file of another name, with a spec of what was plugged and
replaced beside the library's config: the plain library finds no weights there and says so, and
`asr_downstream.load_plugged` builds the model again.

While a model has gates or LSTMs, `SavePretrained` hides the library's method, as an attribute of the model and not of a
class: ``type(model)`` stays the library's. A library's model of which only a part was given to `plug` does not know of
it: plug the whole model, and name the sites.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import write_atomically, write_json, writing
from asr_downstream.files.configs import plain
from asr_downstream.measure.versions import versions
from asr_downstream.modules.check import names_of
from asr_downstream.modules.slots import BASE

__all__ = [
    'AS_TEXT',
    'FORMAT',
    'LIBRARIES',
    'PLUGS',
    'REMOVED',
    'REPLACED',
    'SPEC',
    'STEPS',
    'WEIGHTS',
    'Attached',
    'attached',
    'forget',
    'keep_dynamic',
    'library_of',
    'records',
    'safe_state',
    'save_config',
    'starts',
    'unwritable',
    'watch',
]

SPEC = 'asr_downstream.json'
AS_TEXT = 'as_text'  # key of the spec: values that JSON cannot hold
WEIGHTS = 'asr_downstream.safetensors'
FORMAT = 1
PLUGS, REPLACED, REMOVED = 'plug_sites', 'replace_spec', 'removed_blocks'  # attributes of models
# What was done to a model, as files name it -> the attribute that says how.
STEPS = {'plug': PLUGS, 'replace': REPLACED, 'remove': REMOVED}
# Base class of the models of a library, and its files with weights, by the beginning of the name and the ending.
LIBRARIES: dict[str, tuple[str, dict[str, str]]] = {
    'diffusers': (
        'diffusers.ModelMixin',
        {'safetensors': 'diffusion_pytorch_model', 'bin': 'diffusion_pytorch_model'},
    ),
    'transformers': ('transformers.PreTrainedModel', {'safetensors': 'model', 'bin': 'pytorch_model'}),
}


@dataclass(frozen=True)
class Attached:
    """One plug of a model, as a spec that plugs a fresh model in the same way.

    Attributes:
        spec: with the paths of the sites in the place of patterns, which may mean others in a fresh model.
        constant: all its gates are constant.
        start: by what it has multiplied the layers, once; None: it has not.
    """

    spec: dict[str, Any]
    constant: bool
    start: float | None = None


def attached(spec: dict[str, Any], paths: list[str], constant: bool, start: float | None = None) -> Attached:
    """Make the record of a plug at the sites of these paths."""
    kept = {key: value for key, value in plain(spec).items() if key != 'skip'}
    return Attached(copy.deepcopy({**kept, 'sites': paths}), constant, start)


def starts(model: nn.Module, inside: bool = True) -> dict[str, float]:
    """Sites that were multiplied by a number when they were plugged, see `asr_downstream.plugging.plugs.start`.

    Args:
        model: plugged or not.
        inside: whether to look at parts that were plugged by themselves.

    Returns:
        Path -> number.
    """
    found = {}
    for path, plugs in records(model, PLUGS) if inside else [('', vars(model).get(PLUGS, []))]:
        prefix = f'{path}.' if path else ''
        for plug in plugs:
            if plug.start is not None:
                found.update({prefix + site: plug.start for site in plug.spec['sites']})
    return found


def keep_dynamic(model: nn.Module, left: set[str]) -> None:
    """Reduce the records of plugs, in place, to input-dependent gates at these paths; the constant ones are folded."""
    for path, module in model.named_modules():
        if PLUGS in vars(module):
            prefix = f'{path}.' if path else ''
            found = []
            for plug in getattr(module, PLUGS):
                sites = [site for site in plug.spec['sites'] if prefix + site in left]
                if sites and not plug.constant:
                    found.append(replace(plug, spec={**plug.spec, 'sites': sites, **narrowed(plug.spec, sites)}))
            setattr(module, PLUGS, found)


def narrowed(spec: dict[str, Any], sites: list[str]) -> dict[str, Any]:
    """The groups of a ``share`` that have sites left, by the names that they had."""
    share = spec.get('share')
    if not isinstance(share, list | tuple | dict):
        return {}
    groups = share if isinstance(share, dict) else {f'group{number}': group for number, group in enumerate(share)}
    left = {name: [p for p in group if fnmatch.filter(sites, p)] for name, group in groups.items()}
    return {'share': {name: group for name, group in left.items() if group}}


class SavePretrained:
    """Stands in the place of ``model.save_pretrained`` while gates or LSTMs are in the model.

    It belongs to the model: that of a copy, or of a pickle, belongs to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the library: pipelines of diffusers look which arguments there are."""
        return inspect.signature(stock_method(self.model))

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the model to a folder that `asr_downstream.load_plugged` reads, and say so.

        Takes the arguments of the library. ``is_main_process`` and ``state_dict`` mean what they mean there; the
        weights are one safetensors file, whatever is said about files, and nothing is pushed.
        """
        model = self.model
        given = inspect.signature(stock_method(model)).bind(save_directory, *args, **kwargs).arguments
        given = {**given, **given.pop('kwargs', {})}
        if given.get('is_main_process', True):
            folder = Path(save_directory)
            as_text = save_plugged(model, folder, given.get('state_dict'))
            warnings.warn(advice(model, folder, bool(given.get('push_to_hub')), as_text), stacklevel=2)


def stock_method(model: nn.Module) -> Any:
    """The library's ``save_pretrained``."""
    return type(model).save_pretrained.__get__(model)  # type: ignore[attr-defined]


def watch(model: nn.Module) -> None:
    """Let a model of a library that has ``save_pretrained`` save itself as what it is now."""
    if hasattr(type(model), 'save_pretrained'):
        model.__dict__['save_pretrained'] = SavePretrained(model)


def forget(module: nn.Module) -> None:
    """Remove the attributes that a stock model has not; where it is one, also the `SavePretrained` of this module."""
    for name in ('plug_spec', PLUGS, BASE):
        module.__dict__.pop(name, None)
    other = any(getattr(module, name, None) is not None for name in (REPLACED, REMOVED))
    if not other and isinstance(module.__dict__.get('save_pretrained'), SavePretrained):
        del module.__dict__['save_pretrained']


def library_of(model: nn.Module) -> str | None:
    """Name of the library whose model this is; None: another one."""
    bases = names_of(type(model))
    return next((name for name, (base, _) in LIBRARIES.items() if base in bases), None)


def save_plugged(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """Write weights, spec and the library's config; then take away weights that the library would load from there.

    Returns:
        The values of the spec that JSON cannot hold, as texts, by their keys.

    Raises:
        AsrError: the folder cannot be written.
    """
    if folder.is_file():
        raise AsrError(f'{folder}: is a file; give a folder')
    library = library_of(model)
    plugs = {path: [plug.spec for plug in found] for path, found in records(model, PLUGS)}
    as_text: dict[str, str] = {}
    content = {
        'format': FORMAT,
        'library': library,
        'class': type(model).__name__,
        'plug': for_json(plugs, 'plug', as_text),
        'replace': for_json({path: plain(found) for path, found in records(model, REPLACED)}, 'replace', as_text),
        'remove': {path: list(found) for path, found in records(model, REMOVED)},
        # what came first: attributes stand in the order in which they were set
        'order': [name for key, name in order(model)],
        'versions': versions(),
    }
    if as_text:
        content[AS_TEXT] = as_text
    weights = safe_state(model.state_dict() if state is None else state)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path, {'format': 'pt'}), needed)
    write_json(folder / SPEC, content)
    with writing(folder):
        save_config(model, library, folder)
        remove_stock_weights(folder, library)
    return as_text


def for_json(value: Any, place: str, as_text: dict[str, str]) -> Any:
    """Copy a plain spec for JSON; what JSON cannot hold becomes its ``repr``, and is noted with its place."""
    if isinstance(value, dict):
        return {str(key): for_json(item, f'{place}.{key}', as_text) for key, item in value.items()}
    if isinstance(value, list):
        return [for_json(item, f'{place}[{number}]', as_text) for number, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    as_text[place] = repr(value)
    return as_text[place]


def records(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Values of an attribute of `STEPS` of a model and its parts: path -> value."""
    for path, module in model.named_modules():
        if found := vars(module).get(name):
            yield path, found


def order(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Whether a model was plugged, replaced or both, in the order in which that was done."""
    names = {attribute: step for step, attribute in STEPS.items()}
    yield from ((key, names[key]) for key, value in vars(model).items() if key in names and value)


def safe_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, and no two in one storage."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def save_config(model: Any, library: str | None, folder: Path) -> None:
    """Write the config of a library's model, as its ``save_pretrained`` does."""
    if library == 'diffusers':
        model.save_config(folder)
    elif library == 'transformers':
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def remove_stock_weights(folder: Path, library: str | None) -> None:
    """Take away what the library's ``from_pretrained`` would load with the new config: whole, sharded, and the index.

    Files of other names are the user's, and stay.
    """
    if library is None:
        return
    names = (
        rf'{stem}(-\d{{5}}-of-\d{{5}})?\.{ending}|{stem}\.{ending}\.index\.json'
        for ending, stem in LIBRARIES[library][1].items()
    )
    stock = re.compile('|'.join(names))
    for path in folder.iterdir():
        if path.is_file() and stock.fullmatch(path.name):
            path.unlink()


def advice(model: nn.Module, folder: Path, push: bool, as_text: Mapping[str, str]) -> str:
    """Text of the warning when a model was saved."""
    library = library_of(model) or 'its library'
    kinds = (('gates', PLUGS), ('replaced attention', REPLACED), ('attention that was removed', REMOVED))
    has = [what for what, name in kinds if any(True for _ in records(model, name))]
    ways = f'to load it as it is: asr_downstream.load_plugged({str(folder)!r})'
    if has == ['gates']:
        ways += f'; for plain {library}, fold first: folded, report = asr_downstream.fold(model), and save that'
    if as_text:
        ways += f'; {unwritable(as_text)}, so give load_plugged a model that is plugged with them already, model=...'
    wrong = 'fill at random' if has == ['attention that was removed'] else 'drop'
    pushed = '; it was not pushed to the hub' if push else ''
    return (
        f'{type(model).__name__} has {" and ".join(has)}, which plain {library} would {wrong} and compute something '
        f'else: its weights are in {folder / WEIGHTS}, where {library} does not look; {ways}{pushed}'
    )


def unwritable(as_text: Mapping[str, str]) -> str:
    """Text about the values that are in the spec as texts only."""
    return f'its spec has values that JSON cannot hold ({", ".join(f"{k}: {v}" for k, v in as_text.items())})'
