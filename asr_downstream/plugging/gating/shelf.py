"""The shelf between a bank of gates and the layers: what was computed for the sites of a forward, for each thread.

A layer takes what the forward of its model has put there (`asr_downstream.plugging.bank.hooks`). Outside of one it
finds nothing and computes its own gates, as the weights may have changed since. The rule that keeps gradients right is
that both sides must agree on them: values with a graph are taken where gradients are recorded, values without where
they are not. So a block under ``no_grad`` (reentrant checkpointing runs its first pass so) and a block under
``enable_grad`` in a forward without gradients compute their own.

Non-reentrant checkpointing runs a block again in the backward pass, and must meet the tensors it met before. There a
layer does as it did in the last forward with gradients: it takes the same values, or computes its own again.
"""

from __future__ import annotations

import itertools
import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asr_downstream.modules.affine import Constants, scaled_weight
from asr_downstream.plugging.gating.recurrence import recomputing

__all__ = ['Ready', 'Shelf']

ORDER = itertools.count()


class Ready(NamedTuple):
    """What the constant gates of a site come to, and what is already scaled by them.

    Attributes:
        constants: gates, shift, and gates of the inputs.
        weight: weight of a norm times the gates; None: the layer scales its weight itself.
        bias: bias of the layer times the gates, plus the shift; None likewise, or where the layer has no bias.
    """

    constants: Constants
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def v(self) -> Tensor | None:
        """Gates of the outputs."""
        return self.constants.gate

    def parameters(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``layer``, scaled and shifted."""
        gate, _, inputs = self.constants
        weight = scaled_weight(layer, layer.weight, gate, inputs) if self.weight is None else self.weight
        return weight, self.scaled_bias(layer)

    def scaled_bias(self, layer: Any) -> Tensor | None:
        """Bias of ``layer``, scaled and shifted; None where it has none."""
        gate, shift, _ = self.constants
        if self.bias is not None or layer.bias is None or gate is None:
            return layer.bias if self.bias is None else self.bias
        return layer.bias * gate if shift is None else torch.addcmul(shift, layer.bias, gate)


class Forward:
    """What one forward put on the shelf.

    Attributes:
        ready: by the id of a layer, so that no circle of references keeps a model alive; empty where the layers are to
            compute their own.
        graph: whether gradients were recorded.
        order: larger is later.
        frame: in which the model runs: where it is no longer among those that run, the forward was left by a Ctrl-C or
            another exception that torch calls no hook for. None once it has ended: a frame keeps its variables.
    """

    def __init__(self, ready: dict[nn.Module, Ready], frame: FrameType) -> None:
        self.frame: FrameType | None = frame
        self.ready = {id(layer): found for layer, found in ready.items()}
        self.graph = torch.is_grad_enabled()
        self.order = next(ORDER)


def runs(frame: FrameType | None) -> bool:
    """Whether a frame is among those that led here."""
    current: FrameType | None = sys._getframe(1)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


class Shelf:
    """One for the layers of a plugged model. Copies and pickles are empty: what is on it belongs to a forward."""

    def __init__(self) -> None:
        self.local = threading.local()
        self.latest: Forward | None = None  # with gradients, of any thread

    def __deepcopy__(self, memo: dict[int, Any]) -> Shelf:
        return Shelf()

    def __reduce__(self) -> tuple[type[Shelf], tuple[()]]:
        return Shelf, ()

    @property
    def opened(self) -> list[Forward]:
        """The forwards of this thread that have not ended, the innermost last."""
        found: list[Forward] = self.local.__dict__.setdefault('opened', [])
        while found and not runs(found[-1].frame):
            found.pop().frame = None
        return found

    def open(self, ready: dict[nn.Module, Ready], frame: FrameType) -> None:
        """A forward begins, in this frame."""
        forward = Forward(ready, frame)
        self.opened.append(forward)
        if not forward.graph:
            return
        if torch._C._current_graph_task_id() == -1:
            self.local.kept = self.latest = forward
        else:  # the whole model is computed again, perhaps in a thread of the backward pass
            self.local.again = forward

    def close(self, frame: FrameType) -> None:
        """The forward of this frame has ended; one with gradients is kept until the next one, for recomputation."""
        opened = self.opened
        if opened and opened[-1].frame is frame:
            opened.pop().frame = None

    @property
    def kept(self) -> Forward | None:
        """The last forward with gradients, for blocks that are computed again.

        Devices have threads of their own for the backward pass, where there was none: there it is that of any thread.
        """
        found = (getattr(self.local, 'kept', self.latest), getattr(self.local, 'again', None))
        return max((forward for forward in found if forward), key=lambda forward: forward.order, default=None)

    def take(self, layer: nn.Module) -> Ready | None:
        """Return what there is for ``layer`` here and now; None: it is to compute its own."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None
        if opened := self.opened:
            if opened[-1].graph == torch.is_grad_enabled() and (ready := opened[-1].ready.get(id(layer))):
                return ready
        elif recomputing():
            return None if self.kept is None else self.kept.ready.get(id(layer))
        if (kept := getattr(self.local, 'kept', None)) is not None:
            kept.ready.pop(id(layer), None)
        return None
