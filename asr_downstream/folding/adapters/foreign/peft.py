"""IA3 of peft: ``base_model.model.PATH.ia3_l``, one scale a channel, of the outputs or (feed-forward) of the inputs.

Of a linear layer the shape says which: ``(out, 1)`` or ``(1, in)``. Of a convolution it is ``(1, C, 1, ...)`` either
way, and ``feedforward_modules`` of ``adapter_config.json`` says which. Outputs are scaled with their bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import read_json
from asr_downstream.folding.adapters.foreign.base import Converted, Layers, refuse_others, site_of
from asr_downstream.modules.affine import Constants

__all__ = ['CONFIG', 'SCALES', 'read_peft']

CONFIG = 'adapter_config.json'
SCALES = 'ia3_l'
PREFIX = 'base_model.model.'


def read_peft(path: Path, tensors: Mapping[str, Tensor], layers: Layers) -> Converted:
    """Read an IA3 adapter.

    Args:
        path: of the file.
        tensors: in it.
        layers: of the base.

    Raises:
        CheckpointError: it is another method, its config is missing, or it does not fit the base.
    """
    config = read_config(path.with_name(CONFIG))
    found = Converted('IA3 of peft')
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        at, _, rest = name.rpartition('.')
        if rest == SCALES:
            scales = value.detach().double().flatten()
            if is_input(at, value, config):
                found.sites[at] = site_of(layers, at, Constants(inputs=scales))
            else:
                found.sites[at] = site_of(layers, at, Constants(gate=scales))
        elif name in layers.state:  # modules_to_save
            found.heads[name] = value
        else:
            refuse_others(at or name, ['.'.join(name.split('.')[-2:])], {})
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Read what peft says of the adapter.

    Raises:
        CheckpointError: it is not there, or says something that cannot be converted.
    """
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f'{path}: cannot be read ({error}); an adapter of peft has one beside its weights'
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f'{path}: is no config of peft')
    if config.get('peft_type') != 'IA3':
        kind = str(config.get('peft_type'))[:40]
        raise CheckpointError(f'{path}: is {kind!r} of peft, and only IA3 is made of scales of channels')
    if config.get('fan_in_fan_out'):
        raise CheckpointError(f'{path}: fan_in_fan_out=True: its layers (Conv1D) are none that can be folded')
    feedforward = config.get('feedforward_modules') or []
    texts = isinstance(feedforward, list) and all(isinstance(item, str) for item in feedforward)
    if not texts and not isinstance(feedforward, str):
        raise CheckpointError(f'{path}: feedforward_modules={str(feedforward)[:40]} is no list of names')
    return config


def is_input(path: str, scales: Tensor, config: Mapping[str, Any]) -> bool:
    """Whether scales are those of the inputs of their layer."""
    if scales.dim() == 2 and scales.numel() > 1:
        return scales.shape[0] == 1
    feedforward = config.get('feedforward_modules') or []
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, path) is not None
    return any(path.endswith(name) for name in feedforward)
