"""Registries. mmengine's, so that attentions and plugs are named in configs like everything else.

``MODELS`` is the node that mmengine finds for ``type='asr_downstream.ResNet'`` in an MMDetection config: mmengine
imports ``asr_downstream.registry`` by itself on the first such type, and the adapter behind it on the first look-up.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS as ENGINE_HOOKS
from mmengine.registry import LOOPS as ENGINE_LOOPS
from mmengine.registry import MODELS as ENGINE_MODELS
from mmengine.registry import Registry

from asr_downstream.errors import AsrError, PlugError, did_you_mean

__all__ = ['ATTENTIONS', 'HOOKS', 'LOOPS', 'MODELS', 'PLUGS', 'build', 'find']

ATTENTIONS = Registry('attention', scope='asr_downstream', locations=['asr_downstream.attention'])
HOOKS = Registry('hook', parent=ENGINE_HOOKS, scope='asr_downstream', locations=['asr_downstream.detection.saving'])
LOOPS = Registry('loop', parent=ENGINE_LOOPS, scope='asr_downstream', locations=['asr_downstream.detection.loops'])
PLUGS = Registry('plug', scope='asr_downstream', locations=['asr_downstream.plugs'])
MODELS = Registry('model', parent=ENGINE_MODELS, scope='asr_downstream', locations=['asr_downstream.detection.plugged'])


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
    try:
        return factory(**kwargs)
    except AsrError:
        raise
    except Exception as error:
        raise PlugError(f'{what} {name!r} does not take these arguments: {error}') from error


def find(registry: Registry, name: Any) -> Any:
    """Return what is registered under ``name``.

    Raises:
        PlugError: nothing is; the message has the nearest name and all others.
    """
    registry.import_from_location()
    if name not in registry.module_dict:
        raise PlugError(f'unknown {registry.name} {name!r}: {did_you_mean(str(name), registry.module_dict)}')
    return registry.module_dict[name]
