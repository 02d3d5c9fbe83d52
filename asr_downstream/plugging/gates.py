"""Gates of one site: constant ones from a learned input (ASR), input-dependent ones from the feature map.

Both divide by ``reference`` if they have one (``preserve=True``): the gates that they started with. A fresh plugged
model then multiplies by exactly 1, whichever stock weights are loaded into it, before or after plugging, and the
stock weights keep their scale and so their learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import gates_of_mean
from asr_downstream.errors import PlugError
from asr_downstream.plugging.shared_unit import Member

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ['ConstantGate', 'DynamicGate', 'Gate', 'saturation']

# Below this, dividing by the first gate would blow up its rounding error and its gradients.
SMALLEST_REFERENCE = 1e-4
CLOSED, OPEN = 1e-3, 0.999  # gates that are all beyond one of these are named when they are folded


class Gate(nn.Module):
    """An attention at a site, and optionally the gates it started with.

    Args:
        attention: maps ``(B, C, *)`` to gates ``(B, C)``.
        channels: C of the site.
    """

    reference: Tensor | None

    def __init__(self, attention: nn.Module, channels: int) -> None:
        super().__init__()
        self.attention = attention
        self.channels = channels
        self.register_buffer('reference', None)

    def probe(self) -> Tensor:
        """Return the gates of a fresh module on a zero or learned input, shape ``(1, C)``."""
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
        attention = self.attention.unit.attention if isinstance(self.attention, Member) else self.attention
        return getattr(attention, 'confined', True)

    def example(self) -> Tensor:
        """Return a tensor with the dtype and device of the gates."""
        attention = self.attention.unit if isinstance(self.attention, Member) else self.attention
        return next(attention.parameters(), torch.zeros(()))

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


class ConstantGate(Gate):
    """Gates of an attention on a learned input psi (ASR; ECCV 2024): ``v = attention(psi)``, the same for every image.

    psi has the shape ``(1, C)``, one descriptor; the official code keeps it as ``(1, C, 1, 1)``. An attention without
    an input (LayerScale) gets no psi.

    Args:
        attention: maps ``(1, C)`` to ``(1, C)``.
        channels: C of the site.
        init: start of every element of psi.
    """

    def __init__(self, attention: nn.Module, channels: int, init: float = 0.1) -> None:
        super().__init__(attention, channels)
        if getattr(attention, 'uses_input', True):
            self.psi = nn.Parameter(torch.full((1, channels), init))
        else:
            self.register_parameter('psi', None)

    def probe(self) -> Tensor:
        psi = self.input()
        # Half precision would cost accuracy and save nothing: these are a few vectors.
        if torch.is_autocast_enabled(psi.device.type):
            with torch.autocast(psi.device.type, enabled=False):
                return self.attend(psi)
        return self.attend(psi)

    def attend(self, psi: Tensor) -> Tensor:
        """Gates of ``psi``; a recurrent unit starts at the first site of its run."""
        if not isinstance(self.attention, Member) or not self.attention.recurrent:
            return self.attention(psi)
        return self.attention.alone([*self.attention.inputs_before(), psi])

    def forward(self, anchor: Tensor | None = None) -> Tensor:
        """Return the gates v, shape ``(C,)``.

        Args:
            anchor: the input of the layer, inside of a forward. A recurrent unit then continues from the site before;
                without it, from its own start.
        """
        if anchor is None or not isinstance(self.attention, Member) or not self.attention.recurrent:
            return self.relative(self.probe())[0]
        return self.relative(self.attention(self.input(), anchor)).to(self.example().dtype)[0]

    def input(self) -> Tensor:
        """Return psi, or zeros for an attention without input: ``(1, C)``."""
        return self.example().new_zeros(1, self.channels) if self.psi is None else self.psi


class DynamicGate(Gate):
    """Gates of an attention on the feature map itself, the classic form (SE-ResNet).

    Args:
        attention: maps ``(B, C, *)`` to ``(B, C)``.
        channels: C of the site.
        positions: size of the axes ``*`` that the attention is tried on.
    """

    def __init__(self, attention: nn.Module, channels: int, positions: tuple[int, ...] = (2, 2)) -> None:
        super().__init__(attention, channels)
        self.positions = positions

    def probe(self) -> Tensor:
        # Batch norms inside an attention must not learn from this: eval mode, flags restored below.
        flags = {m: m.training for m in self.attention.modules()}
        self.attention.eval()
        zeros = self.example().new_zeros(2, self.channels, *self.positions)
        try:
            if isinstance(self.attention, Member):
                gate = self.attention.alone([zeros] * (self.attention.position + 1))
            else:
                gate = self.attention(zeros)
        finally:
            for module, training in flags.items():
                module.training = training
        return gate.flatten(2).mean(-1)[:1] if gate.dim() > 2 else gate[:1]

    @property
    def of_mean(self) -> bool:
        """Whether the gates of a map are those of its mean over the positions."""
        return self.attention.of_mean if isinstance(self.attention, Member) else gates_of_mean(self.attention)

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


def saturation(gates: list[ConstantGate], v: Tensor) -> str:
    """Say what is odd about constant gates that are all at one end; '' if they are not.

    A gate in (0, 1), such as a sigmoid, is closed for all channels where its branch is gone, and open for all where it
    does nothing and its gradient has vanished. What is held against the bounds is the attention's own gate for "open",
    and what is folded, divided by the first gates under ``preserve=True``, for "closed": there it says how much is
    left of what the branch was. Free scales (`LayerScale`, ``confined = False``) start near 0 by design and may be 1,
    so of them only exact zeros are odd, and with ``preserve=True`` what is left.

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
