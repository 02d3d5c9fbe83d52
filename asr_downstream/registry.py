"""Registries. mmengine's, so that attentions and plugs are named in configs like everything else.

``MODELS`` is the node that mmengine finds for ``type='asr_downstream.ResNet'`` in an MMDetection config: mmengine
imports ``asr_downstream.registry`` by itself on the first such type, and the adapter behind it on the first look-up.

All modules that this package looks up by name are named here: in ``locations=`` of the registries, which are imported
on the first look-up, and in `FRAMEWORKS`.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.registry import HOOKS as ENGINE_HOOKS
from mmengine.registry import LOOPS as ENGINE_LOOPS
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import TRANSFORMS as ENGINE_TRANSFORMS
from mmengine.registry import Registry

from asr_downstream.errors import AsrError, PlugError, did_you_mean

__all__ = [
    'ATTENTIONS',
    'FRAMEWORKS',
    'HOOKS',
    'LOOPS',
    'MODELS',
    'PLUGS',
    'REBUILDERS',
    'TRANSFORMS',
    'build',
    'find',
    'framework_data',
]

SCOPE = 'asr_downstream'
ATTENTIONS = Registry('attention', scope=SCOPE, locations=['asr_downstream.attention'])
HOOKS = Registry('hook', parent=ENGINE_HOOKS, scope=SCOPE, locations=['asr_downstream.detection.training.save'])
LOOPS = Registry('loop', parent=ENGINE_LOOPS, scope=SCOPE, locations=['asr_downstream.detection.training.loops'])
TRANSFORMS = Registry(
    'transform', parent=ENGINE_TRANSFORMS, scope=SCOPE, locations=['asr_downstream.detection.data.loading']
)
PLUGS = Registry('plug', scope=SCOPE, locations=['asr_downstream.plugging.plugs'])
MODELS = Registry('model', parent=ENGINE_MODELS, scope=SCOPE, locations=['asr_downstream.detection.models.plugged'])
# ``(model, spec)``, in place: what `asr_downstream.load_plugged` does to a fresh model for each part of a saved spec
REBUILDERS = Registry(
    'rebuilder', scope=SCOPE, locations=['asr_downstream.plugging.plug', 'asr_downstream.far.model.replace']
)
# Package of a framework -> the adapter's module of data about its classes: ``SITES``, where the residual branches of
# its blocks end, and ``LAYERS``, which of its layers are layers of torch.
FRAMEWORKS: dict[str, str] = {
    'mmdet': 'asr_downstream.detection.sites',
    'mmcv': 'asr_downstream.detection.sites',
    'diffusers': 'asr_downstream.diffusion.sites',
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


def build(registry: Registry, spec: Any, **defaults: Any) -> Any:
    """Build ``spec = dict(type=NAME, **kwargs)`` from ``registry``; keys of the spec win over ``defaults``.

    Raises:
        PlugError: the spec is no dict with a ``type``, the name is unknown, or an argument is not one it takes.
    """
    what = registry.name
    if not isinstance(spec, dict) or not isinstance(spec.get('type'), str):
        raise PlugError(f"{what}: expected a dict like dict(type='...'), got {spec!r}")
    kwargs = {**defaults, **spec}
    name = kwargs.pop('type')
    factory = find(registry, name)
    check_arguments(f'{what} {name!r}', factory, kwargs)
    try:
        return factory(**kwargs)
    except AsrError:
        raise
    except Exception as error:
        raise PlugError(f'{what} {name!r} does not take these arguments: {error}') from error


def check_arguments(what: str, factory: Any, arguments: Mapping[Any, Any]) -> None:
    """Refuse arguments that ``factory`` does not take, and values that are not of the kind it says it takes.

    The kinds are those that its signature names: ``bool``, ``int``, ``float`` and ``str``, or None; others are left to
    it, as are the values that it has by default. True is no number, and 'no' is not False.

    Raises:
        PlugError: see above.
    """
    known = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key, value in arguments.items():
        if key not in known:
            if takes_any and isinstance(key, str):
                continue
            hint = did_you_mean(key, [k for k in known if k != 'channels']) if isinstance(key, str) else ''
            raise PlugError(f'{what} takes no {key!r}{"; " + hint if hint else ""}')
        default = known[key].default
        if value is default or type(value) is type(default) and bool(value == default):
            continue
        kinds = kinds_of(known[key].annotation)
        if kinds and not any(KINDS[kind](value) for kind in kinds):
            names = ' or '.join(NAMES[kind] for kind in kinds)
            raise PlugError(f'{what}: {key}={value!r} should be {names}')


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
        PlugError: nothing is; the message has the nearest name and all others.
    """
    registry.import_from_location()
    if name not in registry.module_dict:
        raise PlugError(f'unknown {registry.name} {name!r}: {did_you_mean(str(name), registry.module_dict)}')
    return registry.module_dict[name]
