"""Metadata of a shipped model's card, as model hubs read it; what nobody has given is left out, not guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from asr_downstream.errors import AsrError, did_you_mean

__all__ = ['card_of', 'front_matter']

# Key -> whether it holds several.
FIELDS = {'license': False, 'base_model': False, 'datasets': True, 'tags': True}


def card_of(config: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gather what a config says under ``card = dict(license=..., base_model=..., datasets=[...], tags=[...])``.

    Args:
        config: of the model.
        given: the same from a command line, which counts more; None values are not given.

    Raises:
        AsrError: an unknown key, or no text.
    """
    said = config.get('card') or {}
    if not isinstance(said, Mapping):
        raise AsrError(f'card: should be dict(license=..., datasets=[...], base_model=...), not {said!r}')
    found = dict(said) | {key: value for key, value in (given or {}).items() if value is not None}
    for key, value in found.items():
        if key not in FIELDS:
            raise AsrError(f'card: unknown key {key!r}; {did_you_mean(key, FIELDS)}')
        values = value if FIELDS[key] and isinstance(value, list | tuple) else [value]
        if not values or not all(isinstance(v, str) and v.strip() for v in values):
            raise AsrError(f'card: {key} should be {"texts" if FIELDS[key] else "a text"}, not {value!r}')
        found[key] = list(values) if FIELDS[key] else value
    return {key: found[key] for key in FIELDS if key in found}


def front_matter(library: str, card: Mapping[str, Any], tags: Sequence[str] = (), **more: str) -> str:
    """Head of a ``README.md`` between its two lines of dashes.

    Args:
        library: what loads the model.
        card: see `card_of`.
        tags: words to find it by.
        more: other keys, such as ``pipeline_tag``.
    """
    tags = [*tags, *card.get('tags', ())]
    content = {'library_name': library, **more, **card, **({'tags': tags} if tags else {})}
    return f'---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n'
