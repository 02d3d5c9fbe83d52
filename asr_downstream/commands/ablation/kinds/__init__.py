"""Kinds of trainings that an ablation can be made of, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asr_downstream.commands.ablation.kinds.base import Kind
from asr_downstream.commands.ablation.kinds.classification import Classification
from asr_downstream.commands.ablation.kinds.detection import Detection
from asr_downstream.commands.ablation.kinds.diffusion import Diffusion
from asr_downstream.errors import AsrError

__all__ = ['KINDS', 'kind_of_config', 'kind_of_folder']

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Detection(), Diffusion(), Classification())}


def kind_of_config(config: Mapping[str, Any], path: Path) -> Kind:
    """Find the kind of a config.

    Raises:
        AsrError: it is of none.
    """
    for kind in KINDS.values():
        if kind.recognises(config):
            return kind
    raise AsrError(f'{path}: is a config of no kind that can be compared: {", ".join(KINDS)}')


def kind_of_folder(folder: Path) -> Kind | None:
    """Find the kind of a run; None: it is none."""
    return next((kind for kind in KINDS.values() if kind.is_run(folder)), None)
