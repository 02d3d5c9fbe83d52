"""The card of a shipped model: a text, and metadata as model hubs read it, with results under ``model-index``.

What nobody has given is left out, not guessed. Nothing here asks a hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files.atomic import write_atomically

__all__ = ['add_results', 'card_of', 'card_text', 'measured']

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


def card_text(
    text: str,
    name: str,
    library: str,
    card: Mapping[str, Any],
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    **more: str,
) -> str:
    """Content of a ``README.md``: metadata between two lines of dashes, and a text.

    Args:
        text: what people read.
        name: of the model.
        library: what loads the model.
        card: see `card_of`.
        tags: words to find it by.
        results: of evaluations, see `measured`.
        more: other keys, such as ``pipeline_tag``.
    """
    found = ModelCard('---\n{}\n---\n')
    given: dict[str, Any] = {**more, **card, 'tags': [*tags, *card.get('tags', ())] or None}
    if results:
        given |= {'model_name': name, 'eval_results': list(results)}
    found.data = ModelCardData(library_name=library, **given)
    found.text = text
    return str(found)


def measured(
    task: str,
    data: str,
    metrics: Mapping[str, tuple[str, float]],
    split: str | None = None,
    how: Mapping[str, Any] | None = None,
) -> list[EvalResult]:
    """Results of one evaluation; numbers that are not finite are left out.

    Args:
        task: as hubs call it, ``'object-detection'``.
        data: name of the data.
        metrics: name -> what kind of metric it is, and its value: ``{'AP50': ('mAP', 0.71)}``.
        split: of the data.
        how: what else the numbers depend on.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args=dict(how) if how else None,
        )
        for name, (kind, value) in metrics.items()
        if math.isfinite(value)
    ]


def add_results(path: Path, name: str, results: Sequence[EvalResult]) -> None:
    """Write results into the metadata of a card; those of the same metrics on the same data are replaced.

    Args:
        path: the card; nothing is done if there is none.
        name: of the model.
        results: see `measured`.

    Raises:
        AsrError: the metadata cannot be read, or the card cannot be written.
    """
    if not path.is_file():
        return
    try:
        card = ModelCard(path.read_bytes().decode('utf-8'))
        data: Any = card.data
        before = list(data.eval_results or ())
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise AsrError(f'{path}: its metadata cannot be read ({error}); mend it, or ship the model again') from error
    kept = [old for old in before if not any(old.is_equal_except_value(new) for new in results)]
    data.model_name = data.model_name or name
    data.eval_results = [*kept, *results] or None
    write_atomically(path, lambda p: p.write_bytes(str(card).encode('utf-8')))
