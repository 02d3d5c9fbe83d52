"""Kinds and ranges of the values of a config, as annotations that pydantic checks.

    adam_beta1: Share = 0.9                               # 0 <= adam_beta1 < 1
    sampler: Literal['DDPM', 'DDIM'] = 'DDIM'

A value is checked as it is: 1 is no truth value, True and '3' are no numbers. A whole number is a float as well.
Infinity is a value of `Limit`, where it means that there is none, and of nothing else; NaN is none of anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, create_model

from asr_downstream.errors import AsrError, did_you_mean

__all__ = [
    'Above', 'AtLeast', 'Count', 'Finite', 'Limit', 'MaxShare', 'Number', 'Part', 'Seed', 'Share', 'check_values',
]  # fmt: skip

Finite = Annotated[float, Field(allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeast = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, Field(gt=0)]  # inf: no limit
Share = Annotated[float, Field(ge=0, lt=1)]
MaxShare = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Number = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch.manual_seed takes

STRICT = ConfigDict(strict=True, extra='forbid', protected_namespaces=())
BOUNDS = {'gt': 'greater than', 'ge': 'at least', 'lt': 'less than', 'le': 'at most'}


def check_values(kinds: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Refuse values that are not of their kind or out of their range.

    Args:
        kinds: key -> annotation.
        values: key -> value, of plain dicts and lists, for the same keys.
        where: what the error begins with, such as the path of the config.

    Raises:
        AsrError: in one line, about the first such key.
    """
    fields: dict[str, Any] = {key: (kind, ...) for key, kind in kinds.items()}
    model = create_model('Config', __config__=STRICT, **fields)
    try:
        model(**values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = [one for one in found if one['loc'][0] == found[0]['loc'][0]]
        # Of a union every member complains: what is said about the range or the choice is about the right one.
        one = min(first, key=lambda e: str(e['type']).endswith('_type'))
        raise AsrError(f'{where}: {complaint(one, kinds)}') from None


def complaint(error: Any, kinds: Mapping[str, Any]) -> str:
    """What is wrong with a value: ``learning_rate=-1 should be greater than 0``."""
    key, *inside = error['loc']
    kind, value = kinds[key], error['input']
    name = key
    for step in inside:
        several = len([member for member in members(kind) if member is not NoneType]) > 1
        if several and isinstance(step, str):  # pydantic says which member of the union it speaks of
            continue
        inner = item_of(kind)
        if inner is not None:
            kind, name = inner, f'{name}[{step!r}]'
    if error['type'] == 'literal_error':
        allowed = [choice for choice in choices(kind) if choice is not None]
        if inside:
            return f'{key}={value!r} is not known; use {", ".join(map(repr, allowed))}'
        return f'{name}={value!r} is not known; {did_you_mean(str(value), allowed)}'
    if error['type'].endswith('_type'):
        return f'{name}={value!r} should be {" or ".join(names_of(kind))}'
    return f'{name}={value!r} should be {"finite" if error["type"] == "finite_number" else range_of(kind)}'


def members(kind: Any) -> Iterator[Any]:
    """Members of a union, or the kind itself."""
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from members(member)
    else:
        yield kind


def bare(kind: Any) -> Any:
    """A kind without its range."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def item_of(kind: Any) -> Any:
    """Kind of the items of a list or the values of a dict; None: it is neither, or they may be anything."""
    for member in map(bare, members(kind)):
        if get_origin(member) in (list, dict):
            return get_args(member)[-1]
    return None


def choices(kind: Any) -> list[Any]:
    """Values of a ``Literal``."""
    literals = [member for member in map(bare, members(kind)) if get_origin(member) is Literal]
    return [choice for literal in literals for choice in get_args(literal)]


def names_of(kind: Any) -> list[str]:
    """Names of the kinds that a value may have."""
    plain = [get_origin(bare(member)) or bare(member) for member in members(kind)]
    return ['None' if member is NoneType else getattr(member, '__name__', str(member)) for member in plain]


def range_of(kind: Any) -> str:
    """Words for a range: ``at least 0 and less than 1``."""
    fields = [field for member in members(kind) if get_origin(member) is Annotated for field in get_args(member)[1:]]
    limits = [limit for field in fields for limit in field.metadata]
    bounds = {name: getattr(limit, name) for limit in limits for name in BOUNDS if hasattr(limit, name)}
    if bounds == {'gt': 0, 'lt': 1}:
        return 'a share between 0 and 1'
    return ' and '.join(f'{BOUNDS[name]} {value:,}' for name, value in bounds.items())
