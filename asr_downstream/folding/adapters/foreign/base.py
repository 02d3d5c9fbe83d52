"""What the readers of other formats share: the layers of the base by their weights, and what is refused by its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from asr_downstream.errors import CheckpointError
from asr_downstream.folding.adapters.file import Site
from asr_downstream.folding.adapters.layers import kind_of, member
from asr_downstream.modules.affine import Constants

__all__ = ['Converted', 'Layers', 'by_module', 'refuse_others', 'site_of']

# Part of a name behind the layer -> the method that it belongs to, of which none is a scale a channel. With ``_`` at
# its end it is the beginning of such a part.
OTHERS = {
    'lora_': 'LoRA',
    'hada_': 'LoHa',
    'lokr_': 'LoKr',
    'oft_': 'OFT',
    'boft_': 'BOFT',
    'vera_': 'VeRA',
    'lambda_layer': 'T-LoRA',
    'dora_scale': 'DoRA',
    'diff': 'full weights',
    'diff_b': 'full weights',
    **dict.fromkeys(('a1', 'a2', 'b1', 'b2'), 'GLoRA'),
}
# Number of axes of a weight -> class of the layer, where the base is weights without a model.
BY_AXES = {1: 'LayerNorm', 2: 'Linear', 3: 'Conv1d', 4: 'Conv2d', 5: 'Conv3d'}


@dataclass
class Converted:
    """What was read from a file of another library.

    Attributes:
        method: what it calls itself.
        sites: see `asr_downstream.folding.adapters.file.Adapter`.
        heads: likewise.
    """

    method: str
    sites: dict[str, Site] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layers:
    """The base: its weights, and its model if that is given, which knows what the layers are.

    Attributes:
        state: weights.
        model: stock, or None.
    """

    state: Mapping[str, Tensor]
    model: nn.Module | None = None

    @property
    def paths(self) -> list[str]:
        """Paths of everything that has a weight."""
        return [name.removesuffix('.weight') for name in self.state if name.endswith('.weight')]

    def weight(self, path: str) -> Tensor:
        """Weight of a layer.

        Raises:
            CheckpointError: there is none.
        """
        found = self.state.get(member(path, 'weight'))
        if found is None:
            raise CheckpointError(
                f'{path}: is in the adapter, and the base has no such layer; is it for another model?'
            )
        return found

    def bias(self, path: str) -> Tensor | None:
        """Bias of a layer, or None."""
        return self.state.get(member(path, 'bias'))

    def kind(self, path: str) -> str:
        """Class of a layer.

        Raises:
            CheckpointError: it is none that constants go into.
        """
        weight = self.weight(path)
        if self.model is None:
            found = BY_AXES.get(weight.dim())
            what = f'has a weight of {weight.dim()} axes'
        else:
            layer = self.model.get_submodule(path)
            found, what = kind_of(layer), f'is a {type(layer).__name__}'
        if found is None:
            raise CheckpointError(f'{path}: {what}, into which no scales of channels can be folded')
        return found


def site_of(layers: Layers, path: str, constants: Constants) -> Site:
    """Site of a layer with these constants.

    Raises:
        CheckpointError: they do not fit the layer.
    """
    kind, weight = layers.kind(path), layers.weight(path)
    inputs, outputs = constants.inputs, constants.gate
    groups = 1
    if inputs is not None and weight.dim() < 2:
        raise CheckpointError(f'{path}: has scales of inputs in the adapter, and normalises its inputs')
    if inputs is not None:
        groups, rest = divmod(inputs.numel(), weight.shape[1])
        if rest or not groups or weight.shape[0] % groups or (groups > 1 and kind == 'Linear'):
            raise wrong_size(path, inputs, f'weight of shape {tuple(weight.shape)}')
    if outputs is not None and outputs.numel() != weight.shape[0]:
        raise wrong_size(path, outputs, f'{weight.shape[0]} outputs')
    if any(v is not None and not v.isfinite().all() for v in constants):
        raise CheckpointError(f'{path}: its scales are not finite: the training that wrote them had diverged')
    return Site(kind, groups, constants)


def wrong_size(path: str, scales: Tensor, has: str) -> CheckpointError:
    """Error for scales of another number of channels."""
    return CheckpointError(f'{path}: has {scales.numel()} scales in the adapter, and the layer a {has}')


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part of their names before the first dot, then by the rest."""
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        name, _, rest = key.partition('.')
        found[name][rest] = value
    return found


def refuse_others(name: str, rests: Iterable[str], known: Mapping[str, Any]) -> None:
    """Refuse what is no scale of channels, by the name of its method.

    Args:
        name: of the layer in the file.
        rests: what follows the name of the layer in the names of tensors.
        known: those that can be converted.

    Raises:
        CheckpointError: there is something else.
    """
    strange = [rest for rest in rests if rest not in known]
    named = {rest: method for rest in strange for part in rest.split('.') if (method := method_of(part))}
    for rest in (*named, *strange):
        what = f'is {named[rest]}' if rest in named else 'is not known'
        raise CheckpointError(
            f'{name[:80]!r}: {rest[:40]!r} {what}, and no scale of channels: it has no gates to convert; only IA3 of '
            f'peft, and IA3 and norms of LyCORIS have'
        )


def method_of(part: str) -> str | None:
    """Method that a part of a name belongs to."""
    return next((m for key, m in OTHERS.items() if part == key or (key.endswith('_') and part.startswith(key))), None)
