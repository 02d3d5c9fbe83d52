"""What the constants of a plug meet in a layer: its output or its input (``side``), with or without a shift.

    side='output'               y v        gates of what a layer gives; any layer that folds
    side='output', shift=True   y v + s    and a learned shift of it, zeros at the start (SSF, NeurIPS 2022, arXiv
                                           2210.08823); layers with a bias, into which it folds
    side='input'                layer(x u) gates of what a layer reads; convolutions and linear layers, into whose
                                           columns they fold, whatever comes before: SiLU, GELU, GEGLU

Only constant gates fold, so only plugs with constant gates have a choice.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.modules.affine import normalises

__all__ = ['INPUT', 'OUTPUT', 'SIDES', 'check_biases', 'check_sides', 'readers']

SIDES = OUTPUT, INPUT = 'output', 'input'


def check_sides(plug: str, shift: bool, side: str, varying: str | None) -> None:
    """Refuse a side that there is not, and what has no fold.

    Args:
        plug: name of the plug, for messages.
        shift: a shift comes with the gates.
        side: of the layer.
        varying: name of the attention if its gates depend on the input.

    Raises:
        PlugError: see above.
    """
    if side not in SIDES:
        raise PlugError(f"{plug}: side={side!r} is not known: use 'output' or 'input'")
    wanted = ['shift=True'] * shift + ["side='input'"] * (side == INPUT)
    if wanted and varying:
        raise PlugError(
            f'{plug}: {wanted[0]} folds with constant gates only, and those of {varying} depend on the input here; '
            f"use dict(type='ASR', ...)"
        )
    if len(wanted) > 1:
        raise PlugError(
            f"{plug}: side='input' with shift=True: a shift of what a layer reads has no fold where zeros are padded; "
            f"give two plugs, [dict(..., shift=True), dict(..., side='input')]"
        )


def check_biases(layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers without a bias.

    Args:
        layers: by path.

    Raises:
        PlugError: there are some.
    """
    without = [path for path, layer in layers.items() if getattr(layer, 'bias', None) is None]
    if without:
        raise PlugError(
            f'{some(without, 3)}: no bias, which shift=True folds into: the folded model would have a key that the '
            f'stock model has not; leave such layers out with skip=[...], or name others with sites=[...]'
        )


def readers(layers: Mapping[str, nn.Module], named: bool) -> list[str]:
    """Paths of the layers whose inputs can be scaled: norms cannot.

    Args:
        layers: by path.
        named: someone chose these layers, so norms among them are refused; otherwise they are left out.

    Raises:
        PlugError: norms were chosen, or there is nothing else.
    """
    norms = [path for path, layer in layers.items() if normalises(layer)]
    if norms and (named or len(norms) == len(layers)):
        raise PlugError(
            f"{some(norms, 3)}: side='input' has no effect on a norm, which normalises gates of its inputs away; name "
            f'convolutions and linear layers with sites=[...]'
        )
    return [path for path in layers if path not in norms]
