"""Registries. mmengine's, so that attentions and plugs are named in configs like everything else.

``MODELS`` is the node that mmengine finds for ``type='asr_downstream.ResNet'`` in an MMDetection config: mmengine
imports ``asr_downstream.registry`` by itself on the first such type, and the adapter behind it on the first look-up.

All modules that this package looks up by name are named here: in ``locations=`` of the registries, which are imported
on the first look-up, and in `FRAMEWORKS`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.registry import HOOKS as ENGINE_HOOKS
from mmengine.registry import LOOPS as ENGINE_LOOPS
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import TRANSFORMS as ENGINE_TRANSFORMS
from mmengine.registry import Registry as EngineRegistry

from asr_downstream.errors import AsrError, PlugError, add_note, did_you_mean

__all__ = [
    'ATTENTIONS',
    'FRAMEWORKS',
    'HOOKS',
    'LOOPS',
    'MODELS',
    'PLUGS',
    'REBUILDERS',
    'RUNS',
    'TASKS',
    'TRANSFORMS',
    'Registry',
    'build',
    'check_arguments',
    'find',
    'framework_data',
    'named',
]

SCOPE = 'asr_downstream'


class Registry(EngineRegistry):
    """A registry of mmengine that says how its errors read.

    Args:
        name: what is registered, such as ``'attention'``: errors begin with ``attention 'SE'``.
        error: class of the errors of `build` and `find`.
        key: key of a config that the specs are given as, such as ``'data'``: errors then begin with ``data: Zip``.
        unknown: what an error says about a name that is not registered.
        typed: whether the annotations of what is registered are checked; those of other libraries may be loose.
        modules: name -> module that registers it, imported when the name is first looked up: each may need a library
            of its own.
        **kwargs: of mmengine's registry.
    """

    def __init__(
        self,
        name: str,
        error: type[AsrError] = PlugError,
        key: str | None = None,
        unknown: str = 'is not known',
        typed: bool = True,
        modules: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, scope=kwargs.pop('scope', SCOPE), **kwargs)
        self.error, self.key, self.unknown, self.typed = error, key, unknown, typed
        self.modules = dict(modules or {})

    def label(self, name: str) -> str:
        """How an error names one of the registered."""
        return f'{self.key}: {name}' if self.key else f'{self.name} {name!r}'


ATTENTIONS = Registry('attention', locations=['asr_downstream.attention'])
HOOKS = EngineRegistry(
    'hook',
    parent=ENGINE_HOOKS,
    scope=SCOPE,
    locations=['asr_downstream.detection.training.save', 'asr_downstream.detection.training.gates'],
)
LOOPS = EngineRegistry('loop', parent=ENGINE_LOOPS, scope=SCOPE, locations=['asr_downstream.detection.training.loops'])
TRANSFORMS = EngineRegistry(
    'transform', parent=ENGINE_TRANSFORMS, scope=SCOPE, locations=['asr_downstream.detection.data.loading']
)
# What a FAR config trains: called with ``config`` and ``model``, which is None for the teacher.
TASKS = Registry(
    'task',
    error=AsrError,
    key='task',
    unknown="is not known; it should be dict(type='Classification') or another task",
    modules={
        'Classification': 'asr_downstream.far.distil.classification',
        'Denoising': 'asr_downstream.diffusion.training.far',
    },
)
PLUGS = Registry('plug', locations=['asr_downstream.plugging.plugs'])
MODELS = EngineRegistry(
    'model', parent=ENGINE_MODELS, scope=SCOPE, locations=['asr_downstream.detection.models.plugged']
)
# ``(model, spec)``, in place: what `asr_downstream.load_plugged` does to a fresh model for each part of a saved spec
REBUILDERS = Registry(
    'rebuilder',
    locations=[
        'asr_downstream.plugging.plug',
        'asr_downstream.far.model.replace',
        'asr_downstream.folding.native.rebuild',
    ],
)
# Kind of run -> how it is opened for an analysis, see `asr_downstream.folding.analysis.runs`.
RUNS = Registry(
    'run',
    error=AsrError,
    typed=False,
    modules={
        'classification': 'asr_downstream.classification.analysis',
        'detection': 'asr_downstream.detection.analysis',
        'diffusion': 'asr_downstream.diffusion.analysis',
    },
)
# Package of a framework -> the module of data about its classes: ``SITES``, where the residual branches of its blocks
# end; and, where there is more to say, ``LAYERS``, which of its layers are layers of torch, ``THEN``, which modules
# these apply to their own output, and ``NOT_LAYERS``, why others are no sites.
FRAMEWORKS: dict[str, str] = {
    'mmdet': 'asr_downstream.detection.sites',
    'mmcv': 'asr_downstream.detection.sites',
    'diffusers': 'asr_downstream.diffusion.sites',
    'transformers': 'asr_downstream.models.frameworks.transformers',
    'torchvision': 'asr_downstream.models.frameworks.torchvision',
    'timm': 'asr_downstream.models.frameworks.timm',
    'asr_downstream': 'asr_downstream.models.sites',
}


@cache
def framework_data(location: str) -> ModuleType:
    """Read a module of `FRAMEWORKS` from its file.

    The package around it is not imported, which may need an extra: a model may have layers of mmcv where there is no
    mmdet.
    """
    path = Path(__file__).parent.joinpath(*location.split('.')[1:]).with_suffix('.py')
    spec: Any = importlib.util.spec_from_file_location(location, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(registry: Registry, spec: Any, given: Mapping[str, Any] | None = None, /, **defaults: Any) -> Any:
    """Build ``spec = dict(type=NAME, **kwargs)`` from ``registry``.

    Args:
        registry: where the name is.
        spec: of a config; its keys win over ``defaults``.
        given: further arguments, which are not for a config to say.
        **defaults: further arguments.

    Raises:
        AsrError: of the registry's class: the spec is no dict with a ``type``, the name is unknown, or the arguments
            are not those that it takes.
        Exception: whatever is raised by what is built, with a note that names the spec.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get('type'), str):
        raise registry.error(f"{registry.key or registry.name}: expected a dict like dict(type='...'), got {spec!r}")
    own = {key: value for key, value in spec.items() if key != 'type'}
    name, given = spec['type'], given or {}
    factory, label = find(registry, name), registry.label(name)
    if hidden := own.keys() & given.keys():
        raise registry.error(f'{label} takes no {min(hidden)!r}: it is not for a config to say; leave it out')
    inside = registry.key or label
    check_arguments(label, factory, own, {*given, *defaults}, registry.error, inside, registry.typed)
    with named(label, own):
        return factory(**{**defaults, **own}, **given)


@contextmanager
def named(label: str, arguments: Mapping[Any, Any]) -> Iterator[None]:
    """Add a note to what is raised inside of the block: what was being built, and from which arguments.

    An `AsrError` without arguments that could be mended, or which names what was built, says enough itself.
    """
    try:
        yield
    except Exception as error:
        says = not arguments or label.split()[-1].strip("'") in str(error)
        if not (isinstance(error, AsrError) and says):
            text = repr(dict(arguments))
            add_note(error, f'in {label}, arguments {text if len(text) <= 200 else text[:200] + "..."}')
        raise


def check_arguments(
    what: str,
    factory: Any,
    arguments: Mapping[Any, Any],
    given: Collection[str] | None = None,
    error: type[AsrError] = PlugError,
    inside: str | None = None,
    typed: bool = True,
) -> None:
    """Refuse arguments that ``factory`` does not take or needs, and values that are not of the kind it says it takes.

    The kinds are those that its signature names: ``bool``, ``int``, ``float`` and ``str``, or None; others are left to
    it, as are the values that it has by default. True is no number, and 'no' is not False.

    Args:
        what: what is built, for messages.
        factory: a class or function.
        arguments: of a config.
        given: names of the arguments that do not come from the config; None: arguments may be missing.
        error: class of the errors.
        inside: what is built, for messages about values; default: ``what``.
        typed: whether to check the kinds.

    Raises:
        AsrError: of this class; see above.
    """
    signature = inspect.signature(factory)
    known, known_to_user = signature.parameters, []
    for key, parameter in known.items():
        if key not in (given or ()) and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            known_to_user.append(key)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key, value in arguments.items():
        if key not in known:
            if takes_any and isinstance(key, str):
                continue
            hint = did_you_mean(str(key), known_to_user) if known_to_user else 'it takes none'
            raise error(f'{what} takes no {key!r}; {hint}')
        default = known[key].default
        if value is default or type(value) is type(default) and bool(value == default):
            continue
        kinds = kinds_of(known[key].annotation) if typed else []
        if kinds and not any(KINDS[kind](value) for kind in kinds):
            names = ' or '.join(NAMES[kind] for kind in kinds)
            raise error(f'{inside or what}: {key}={value!r} should be {names}')
    if given is None:
        return
    for key in known_to_user:
        if key not in arguments and known[key].default is inspect.Parameter.empty:
            raise error(f'{what} needs {key!r}; add {key}=...')
    try:
        signature.bind(**{**dict.fromkeys(given), **arguments})
    except TypeError as cause:
        raise error(f'{what} does not take these arguments: {cause}') from cause


def is_true_or_false(value: Any) -> bool:
    """Whether a value is a truth value, of Python or numpy."""
    return isinstance(value, bool) or type(value).__name__ == 'bool' and hasattr(value, 'dtype') and value.ndim == 0


KINDS: dict[str, Callable[[Any], bool]] = {
    'bool': is_true_or_false,
    'int': lambda value: isinstance(value, Integral) and not is_true_or_false(value),
    'float': lambda value: isinstance(value, Real) and not is_true_or_false(value) and math.isfinite(value),
    'str': lambda value: isinstance(value, str),
    'None': lambda value: value is None,
}
NAMES = {
    'bool': 'True or False',
    'int': 'a whole number',
    'float': 'a number that is finite',
    'str': 'a text',
    'None': 'None',
}


def kinds_of(annotation: Any) -> list[str]:
    """Names of the kinds that an annotation allows; none if it allows others than those of `KINDS`."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, '__name__', '')
    names = [name.strip() for name in text.split('|')]
    return names if all(name in KINDS for name in names) else []


def find(registry: Registry, name: Any) -> Any:
    """Return what is registered under ``name``.

    Raises:
        AsrError: of the registry's class: nothing is; the message has the nearest name and all others.
    """
    registry.import_from_location()
    if isinstance(name, str) and name not in registry.module_dict and name in registry.modules:
        importlib.import_module(registry.modules[name])
    if not isinstance(name, str) or name not in registry.module_dict:
        hint = did_you_mean(str(name), {*registry.module_dict, *registry.modules})
        if registry.key:
            raise registry.error(f'{registry.key}: type={name!r} {registry.unknown}; {hint}')
        raise registry.error(f'unknown {registry.name} {name!r}: {hint}')
    return registry.module_dict[name]
