"""Gates of one site: constant ones from a learned input (ASR), input-dependent ones from the feature map.

Both divide by ``reference`` if they have one (``preserve=True``): the gates that they started with. A fresh plugged
model then multiplies by exactly 1, whichever stock weights are loaded into it, before or after plugging, and the
stock weights keep their scale and so their learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import gates_of_mean
from asr_downstream.errors import PlugError
from asr_downstream.modules.affine import Constants
from asr_downstream.plugging.gating.sides import INPUT, OUTPUT
from asr_downstream.plugging.gating.site_attention import LearnedInput, SiteAttention, site_attention

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ['ConstantGate', 'DynamicGate', 'Gate', 'saturation', 'side_of', 'together']

# Below this, dividing by the first gate would blow up its rounding error and its gradients.
SMALLEST_REFERENCE = 1e-4
CLOSED, OPEN = 1e-3, 0.999  # gates that are all beyond one of these are named when they are folded


class Gate(nn.Module):
    """An attention at a site, and optionally the gates it started with.

    Args:
        attention: maps ``(B, C, *)`` to gates ``(B, C)``; the site's own, or a
            `asr_downstream.plugging.gating.site_attention.Member` of a shared one.
        channels: C of the site.

    Attributes:
        side: which channels of the layer the gates scale, ``'output'`` or ``'input'``.
    """

    side: str = OUTPUT
    reference: Tensor | None

    def __init__(self, attention: nn.Module, channels: int) -> None:
        super().__init__()
        self.attention = attention
        self.channels = channels
        self.register_buffer('reference', None)

    @property
    def site_attention(self) -> SiteAttention:
        """The attention, the site's own or a shared one."""
        return site_attention(self.attention)

    def probe(self) -> Tensor:
        """Return the gates on a zero or learned input, shape ``(1, C)``; no forward is touched."""
        raise PlugError(f'{type(self).__name__} cannot be probed')

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Leave gates out of ``model.apply(init)``: a model's initialisation is about its own layers.

        Frameworks initialise by class name or by block (mmdet zeroes all that is in a block's last norm), and a gate
        would lose the start that its attention has chosen, and ``preserve=True`` with it.
        """
        return self

    @property
    def confined(self) -> bool:
        """Whether the attention's gates lie in (0, 1), see `asr_downstream.attention.base.ChannelAttention`."""
        return getattr(self.site_attention.original, 'confined', True)

    def example(self) -> Tensor:
        """Return a tensor with the dtype and device of the gates."""
        return next(self.site_attention.original.parameters(), torch.zeros(()))

    @torch.no_grad()
    def take_reference(self, path: str) -> None:
        """Make the gates of this moment the new 1.

        Raises:
            PlugError: a gate is so small that dividing by it is not sound.
        """
        self.reference = None
        gate = self.probe().detach().clone()
        if gate.abs().min() < SMALLEST_REFERENCE:
            raise PlugError(
                f'{path}: preserve=True divides by the first gates, and one of them is {gate.abs().min().item():.1e}; '
                f'start the attention at {SMALLEST_REFERENCE:g} or more, or drop preserve=True'
            )
        self.reference = gate

    def relative(self, gate: Tensor) -> Tensor:
        """Divide by the reference, if there is one."""
        return gate if self.reference is None else gate / self.reference


class ConstantGate(Gate, LearnedInput):
    """Gates of an attention on a learned input psi (ASR; ECCV 2024): ``v = attention(psi)``, the same for every image.

    psi has the shape ``(1, C)``, one descriptor; the official code keeps it as ``(1, C, 1, 1)``. An attention without
    an input (LayerScale) gets no psi.

    Args:
        attention: maps ``(1, C)`` to ``(1, C)``.
        channels: C of the site.
        init: start of every element of psi.
        side: see `Gate`.

    Attributes:
        bias: what is added after the gates, a learned shift ``(C,)``, see `learn_shift`; None: nothing. It is named so
            that it is treated like biases, as by ``bias_decay_mult`` of MMEngine.
    """

    bias: Tensor | None

    def __init__(self, attention: nn.Module, channels: int, init: float = 0.1, side: str = OUTPUT) -> None:
        super().__init__(attention, channels)
        self.side = side
        self.register_parameter('bias', None)
        if getattr(attention, 'uses_input', True):
            self.psi = nn.Parameter(torch.full((1, channels), init))
        else:
            self.register_parameter('psi', None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parameters.setdefault('bias', None)  # gates that were pickled before there were shifts

    def learn_shift(self, like: Tensor) -> None:
        """Add a shift of zeros, with dtype and device of ``like`` (SSF, NeurIPS 2022, arXiv 2210.08823)."""
        self.bias = nn.Parameter(torch.zeros(self.channels, dtype=like.dtype, device=like.device))

    def probe(self) -> Tensor:
        return self.attend()

    def attend(self, anchor: Tensor | None = None) -> Tensor:
        """Return the gates of psi, ``(1, C)``, before they are divided by the reference."""
        psi = self.input()
        # Half precision would cost accuracy and save nothing: these are a few vectors.
        if torch.is_autocast_enabled(psi.device.type):
            with torch.autocast(psi.device.type, enabled=False):
                return self.site_attention.learned(psi, anchor)
        return self.site_attention.learned(psi, anchor)

    def forward(self, anchor: Tensor | None = None) -> Tensor:
        """Return the gates v, shape ``(C,)``.

        Args:
            anchor: the input of the layer, in a forward; see `SiteAttention.learned`.
        """
        v = self.relative(self.attend(anchor)).squeeze(0)  # the backward of [0] would copy
        if anchor is None or not self.site_attention.recurrent:
            return v
        return v.to(self.example().dtype)  # the state is float32 where weights are in half precision

    def input(self) -> Tensor:
        """Return psi, or zeros for an attention without input: ``(1, C)``."""
        return self.example().new_zeros(1, self.channels) if self.psi is None else self.psi


class DynamicGate(Gate):
    """Gates of an attention on the feature map itself, the classic form (SE-ResNet).

    Args:
        attention: maps ``(B, C, *)`` to ``(B, C)``.
        channels: C of the site.
        positions: size of the axes ``*`` that the attention is tried on.
        memory: ``'plain'``, ``'low'`` or None, see `asr_downstream.plugging.kernels.memory`.
    """

    memory: str | None = None  # gates that were pickled before there was a choice

    def __init__(
        self, attention: nn.Module, channels: int, positions: tuple[int, ...] = (2, 2), memory: str | None = None
    ) -> None:
        super().__init__(attention, channels)
        self.positions = positions
        self.memory = memory

    def probe(self) -> Tensor:
        # Batch norms inside an attention must not learn from this: eval mode, flags restored below.
        parts = self.site_attention.parts()
        flags = {m: m.training for part in parts for m in part.modules()}
        for part in parts:
            part.eval()
        zeros = self.example().new_zeros(2, self.channels, *self.positions)
        try:
            gate = self.site_attention.fresh(zeros)
        finally:
            for module, training in flags.items():
                module.training = training
        return gate.flatten(2).mean(-1)[:1] if gate.dim() > 2 else gate[:1]

    @property
    def of_mean(self) -> bool:
        """Whether the gates of a map are those of its mean over the positions."""
        return gates_of_mean(self.site_attention.original)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates of a map ``(B, C, *)`` or descriptor: ``(B, C)``, or ``(B, C, *)`` if they are spatial."""
        gate = self.attention(x)
        if self.reference is not None:
            gate = gate / self.reference.view(1, -1, *(1,) * (gate.dim() - 2))
        return gate

    def forward(self, x: Tensor) -> Tensor:
        """Scale a map ``x`` ``(B, C, *)`` by its gates."""
        gate = self.gates(x)
        # Under autocast some attentions answer in float32: the feature map keeps its own precision.
        return x * gate.view(*gate.shape, *(1,) * (x.dim() - gate.dim())).to(x.dtype)


def together(gates: Iterable[ConstantGate], anchor: Tensor | None = None) -> Constants:
    """What the constant gates of a layer come to; with shifts, ``(y v1 + s1) v2 + s2``.

    Args:
        gates: from the layer outwards.
        anchor: see `ConstantGate.forward`.
    """
    v: Tensor | None = None
    shift: Tensor | None = None
    inputs: Tensor | None = None
    for gate in gates:
        found = gate(anchor)
        if gate.side == INPUT:
            inputs = found if inputs is None else inputs * found
            continue
        v = found if v is None else v * found
        shift = None if shift is None else shift * found
        if gate.bias is not None:
            shift = gate.bias if shift is None else shift + gate.bias
    return Constants(v, shift, inputs)


def side_of(gates: Iterable[Gate]) -> str:
    """What the gates of a layer scale: ``'output'``, ``'input'`` or ``'both'``."""
    sides = {gate.side for gate in gates}
    return 'both' if len(sides) > 1 else next(iter(sides), OUTPUT)


def saturation(gates: list[ConstantGate], v: Tensor) -> str:
    """Say what is odd about constant gates that are all at one end; '' if they are not.

    Gates in (0, 1), such as those of a sigmoid, are odd if all channels are below `CLOSED` (the branch is gone) or all
    are above `OPEN` (the gates do nothing, and their gradient has vanished). Compared with `OPEN` are the gates of the
    attention itself. Compared with `CLOSED` are the gates that are folded: under ``preserve=True`` they are divided by
    the first ones, and say how small the branch has become. Free scales (`LayerScale`, ``confined = False``) start near
    0 by design and may be 1, so of them only exact zeros are odd, or with ``preserve=True`` values below `CLOSED`.

    Args:
        gates: of one site.
        v: their product as it is folded, ``(C,)``.
    """
    if not v.any():
        return 'are all 0'
    confined = [gate.confined for gate in gates]
    relative = any(gate.reference is not None for gate in gates)
    if bool((v.abs() < CLOSED).all()) and (all(confined) or relative):
        return f'are below {CLOSED:g}' + (' of what they were at the start' if relative else '')
    for gate, bounded in zip(gates, confined, strict=True):
        own = gate.probe()
        if bounded and bool(((own > OPEN) & (own <= 1)).all()):
            return f'are above {OPEN:g}'
    return ''
