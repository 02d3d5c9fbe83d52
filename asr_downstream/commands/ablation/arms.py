"""Arms of an ablation, as data: a name, and the plug that it puts into the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files.configs import plain, read_config
from asr_downstream.registry import PLUGS, build

__all__ = ['ARMS', 'STOCK', 'Arm', 'arm_of', 'chosen', 'folding_of', 'preserving']

STOCK = 'stock'
SE = {'type': 'SE', 'reduction': 16}
LSTM = {'type': 'DIALSTM', 'reduction': 4}


class Arm(NamedTuple):
    """One arm.

    Attributes:
        label: how tables and sentences name it.
        plug: spec; None: the stock model.
        line: what it is.
    """

    label: str
    plug: Any
    line: str


# The last five have no attention. They are the controls: what an arm with constant gates gains over them, its
# attention gains; what they gain as well, it does not.
ARMS = {
    STOCK: Arm('stock', None, 'the model of the config'),
    'se': Arm('SE', {'type': 'Attention', 'attention': SE}, 'an SE of its own at every site'),
    'asr-se': Arm('ASR(SE)', {'type': 'ASR', 'attention': SE}, 'SE on learned inputs'),
    'dia': Arm('DIA', {'type': 'DIA', 'attention': LSTM}, 'one LSTM along each stage'),
    'asr-dia': Arm('ASR(DIA)', {'type': 'ASR', 'attention': LSTM}, 'one LSTM along each stage, on learned inputs'),
    'norm-affine': Arm(
        'norm affine',
        {'type': 'Attention', 'attention': {'type': 'LayerScale', 'init_value': 1.0}, 'shift': True},
        'what the affine of a norm has, a scale and a shift a channel from 1 and 0, once more at every site',
    ),
    'layerscale': Arm(
        'LayerScale',
        {'type': 'Attention', 'attention': {'type': 'LayerScale', 'init_value': 0.1}},
        'a free scale a channel from 0.1',
    ),
    'sigmoidvector': Arm(
        'SigmoidVector',
        {'type': 'Attention', 'attention': {'type': 'SigmoidVector'}},
        'a scale a channel between 0 and 1, from 0.5: every gate that ASR(SE) reaches',
    ),
    'start': Arm('start 1/2', {'type': 'Start', 'value': 0.5}, 'stock, its residual branches started at one half'),
}


def preserving(arm: Arm) -> Arm:
    """The arm with gates that start at one, so that a pretrained model starts as it is; what its plug says stays."""
    if arm.plug is None:
        return arm
    specs = [
        {**spec, 'preserve': spec.get('preserve', True)} if 'attention' in spec else spec for spec in specs_of(arm.plug)
    ]
    return arm._replace(plug=specs[0] if isinstance(arm.plug, Mapping) else specs)


def chosen(text: str) -> dict[str, Arm]:
    """Read a list of arms: names of `ARMS`, and others as ``NAME=FILE``, a config that has a ``plug``.

        chosen('stock,asr-se,quarter=plugs/quarter.py')

    Raises:
        AsrError: an unknown name, one that stands twice, or a file without a plug.
    """
    found: dict[str, Arm] = {}
    for part in filter(None, (part.strip() for part in text.split(','))):
        name, equals, file = part.partition('=')
        if equals:
            arm = from_file(name, Path(file))
        elif name in ARMS:
            arm = ARMS[name]
        else:
            raise AsrError(f'--arms: {name!r} is no arm; {did_you_mean(name, ARMS)}; or NAME=FILE with a plug')
        if name in found:
            raise AsrError(f'--arms: {name!r} stands twice')
        if arm.plug is not None:
            for spec in specs_of(arm.plug):
                build(PLUGS, spec)  # its errors say what is wrong, before any training
        found[name] = arm
    return found


def from_file(name: str, file: Path) -> Arm:
    """Arm of a file like those of ``det_configs/_base_/plugs``.

    Raises:
        AsrError: it has no plug, or the name cannot be that of a folder.
    """
    if not name or not all(char.isalnum() or char in '-_.' for char in name) or name.startswith('.'):
        raise AsrError(f'--arms: {name!r} cannot be the name of an arm; use letters, digits, - and _')
    spec = plain(read_config(file, 'det_configs/_base_/plugs').get('plug'))
    if not spec:
        raise AsrError(f"{file}: has no plug; expected plug = dict(type='ASR', attention=dict(type='SE'))")
    return Arm(name, spec, f'the plug of {file.name}')


def specs_of(plug: Any) -> Sequence[Mapping[str, Any]]:
    """Specs of a plug, which may be one."""
    return [plug] if isinstance(plug, Mapping) else list(plug)


def folding_of(plug: Any) -> str | None:
    """How a plug is folded: ``'exact'``, ``'calibrated'``, or None where there is nothing to fold."""
    gated = [build(PLUGS, dict(spec)) for spec in specs_of(plug or []) if 'attention' in spec]
    if not gated:
        return None
    return 'exact' if all(plug.constant for plug in gated) else 'calibrated'


def arm_of(plug: Any) -> str:
    """Name of the arm that has this plug; of one that no arm of `ARMS` has, a text such as ``ASR(SE, repeat=2)``."""
    given = plain(plug) or None
    known = next((name for name, arm in ARMS.items() if arm.plug == given), None)
    return known or ' + '.join(map(text_of, specs_of(given)))


def text_of(spec: Mapping[str, Any]) -> str:
    """A spec in short."""
    attention = spec.get('attention') or {}
    of_attention = [f'{key}={value}' for key, value in attention.items() if key != 'type']
    own = [f'{key}={value}' for key, value in spec.items() if key not in ('type', 'attention')]
    name, inside = spec.get('type'), attention.get('type')
    if name == 'Attention':
        name, inside = inside, None
    return f'{name}({", ".join(filter(None, [inside, *of_attention, *own]))})'
