"""Kinds of shipped models that can be exported, as a table."""

from __future__ import annotations

from pathlib import Path

from asr_downstream.commands.exporting.kinds.base import Kind
from asr_downstream.commands.exporting.kinds.classification import Classification
from asr_downstream.commands.exporting.kinds.detection import Detection
from asr_downstream.commands.exporting.kinds.diffusion import Diffusion
from asr_downstream.commands.exporting.kinds.far import Far
from asr_downstream.errors import AsrError
from asr_downstream.plugging.save import SPEC

__all__ = ['KINDS', 'kind_of']

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Far(), Classification(), Diffusion(), Detection())}


def kind_of(path: Path) -> Kind:
    """Find the kind of a shipped model.

    Raises:
        AsrError: it is of none, or was not folded.
    """
    if not path.exists():
        raise AsrError(f'{path}: no such file or folder; give what asr-downstream fold, train-cls or distill-far wrote')
    for kind in KINDS.values():
        if kind.is_shipped(path):
            return kind
    if (path / SPEC).is_file():
        raise AsrError(f'{path}: is a model with gates, as save_pretrained writes it; load_plugged, fold and save it')
    if (path / 'config.py').is_file() or (path / 'last_checkpoint').is_file():
        raise AsrError(f'{path}: is a training; fold it first: asr-downstream fold, which writes what is exported')
    raise AsrError(f'{path}: is no shipped model of a known kind: {"; ".join(k.shipped for k in KINDS.values())}')
