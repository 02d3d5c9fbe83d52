"""Detectors whose attention was replaced by LSTMs (FAR): what a checkpoint of the stock detector means for them.

MMEngine loads what fits and lists the rest in one warning. Here the rest that a stock checkpoint must leave, which is
the weights of the LSTMs and those of queries, keys and values, is counted in one line, and anything else is named.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.mixer import VARIANTS
from asr_downstream.far.model.replace import replace
from asr_downstream.files.configs import plain
from asr_downstream.plugging.gating.gates import Gate

__all__ = ['keep_fresh', 'put_lstms', 'report_load']


def put_lstms(model: nn.Module, spec: Any) -> None:
    """Replace attentions of a model that a config builds.

    Raises:
        PlugError: see `asr_downstream.far.replace`, or the model has gates as well.
    """
    replace(model, plain(spec))
    refuse_both(model)


def refuse_both(model: nn.Module) -> None:
    """Raise where gates and replaced attentions are in one model.

    Raises:
        PlugError: they are.
    """
    if any(isinstance(m, Gate) for m in model.modules()) and any(True for _ in mixers(model)):
        raise PlugError(
            f'{type(model).__name__}: takes plug or replace, not both: gates fold into a stock model, and one whose '
            f'attention is replaced is none'
        )


def fresh_keys(model: nn.Module) -> set[str]:
    """Names of the weights that replacing has added: of what was put in, and of a fresh output projection."""
    found: set[str] = set()
    for path, mixer in mixers(model):
        owner: Any = model.get_submodule(path)
        added = ['mixer']
        if VARIANTS[mixer.variant].projection == 'fresh':
            added.append(owner.kept[0])
        found |= {f'{path}.{name}.{key}' for name in added for key in owner.get_submodule(name).state_dict()}
    return found


def keep_fresh(model: nn.Module, state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Take out of stock weights what would overwrite the fresh output projections of variant M2, in place."""
    if not any(key.startswith(prefix) and '.mixer.' in key for key in state):
        for key in fresh_keys(model):
            state.pop(prefix + key, None)


def report_load(model: nn.Module, state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Say which weights of a checkpoint a model with replacements has not taken, and which it has not found.

    Args:
        model: with replaced attentions.
        state: of the checkpoint; names begin with ``prefix``.
        prefix: of the model in the checkpoint.
    """
    own = {key for key in model.state_dict() if not key.endswith('num_batches_tracked')}
    given = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    given = {key for key in given if not key.endswith('num_batches_tracked')}
    places = tuple(f'{path}.' for path, _ in mixers(model))
    added = fresh_keys(model)
    missing, unused = own - given, given - own
    if not missing and not unused:
        return
    attention = {key for key in unused if key.startswith(places)}
    name = f'{prefix}{type(model).__name__}' if prefix else type(model).__name__
    print_log(
        f'{name}: {len(places)} attentions are replaced; of their new {len(added)} weights {len(missing & added)} are '
        f'not in the checkpoint and keep their start; {len(attention)} of the attentions there are not used',
        logger='current',
    )
    for what, keys in (('are not in the checkpoint', missing - added), ('of the checkpoint are not used', unused)):
        if rest := sorted(keys - attention):
            print_log(
                f'{name}: besides, {len(rest)} weights {what}: {some(rest)}', logger='current', level=logging.WARNING
            )
