"""Types in MMEngine's configs: names, with or without a scope, or the classes themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ['PRETRAINED', 'kind_of', 'pretrained']

SCOPES = ('mmengine.', 'mmdet.', 'mmcv.')
PRETRAINED = ('Pretrained', 'PretrainedInit')  # names of an ``init_cfg`` that loads a checkpoint


def kind_of(kind: Any) -> Any:
    """Name of a type that a config gives as a name, within the scope of a library, or as a class of that library.

    Args:
        kind: ``type`` of a config.

    Returns:
        ``'CocoDataset'`` for that, for ``'mmdet.CocoDataset'`` and for mmdet's class; a class of somebody else, who may
        have written another `CocoDataset`, keeps its module: ``'their.module.CocoDataset'``.
    """
    if isinstance(kind, str):
        return kind.rpartition('.')[2] if kind.startswith(SCOPES) else kind  # a scope, or as MMEngine dumps a class
    if isinstance(kind, type):
        ours = f'{kind.__module__}.'.startswith(SCOPES)
        return kind.__name__ if ours else f'{kind.__module__}.{kind.__name__}'
    return kind


def pretrained(node: Any) -> Iterator[str]:
    """Checkpoints that the ``init_cfg`` entries of a model's config name, and that of its teacher."""
    if isinstance(node, dict):
        if kind_of(node.get('type')) in PRETRAINED and 'checkpoint' in node:
            yield node['checkpoint']
        if (node.get('distil') or {}).get('teacher'):
            yield node['distil']['teacher'].get('checkpoint')
        for value in node.values():
            yield from pretrained(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from pretrained(value)
