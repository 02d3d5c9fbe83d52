"""Models, plugs and forms of plugged models that benchmarks compare."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from asr_downstream.models import resnet56
from asr_downstream.plugging.attach import detach
from asr_downstream.plugging.gating.gates import DynamicGate
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.plug import plug

__all__ = [
    'CASES', 'FOLDED', 'LAYER_SCALE', 'LOW', 'MAPS', 'PLAIN', 'SCALED', 'SE', 'SPEC', 'STOCK', 'Case', 'dia',
    'feature_map_form', 'low_form', 'mmdet_resnet50', 'plain_form', 'plugged_copy',
]  # fmt: skip

SPEC = {'type': 'ASR', 'attention': {'type': 'SE', 'reduction': 16}}
STOCK, SCALED, MAPS, FOLDED = 'stock', 'ASR(SE)', 'ASR(SE), feature maps', 'folded'
PLAIN, LOW = ', plain', ', low memory'
SE = {'type': 'Attention', 'attention': {'type': 'SE', 'reduction': 16}}
LAYER_SCALE = {'type': 'Attention', 'attention': {'type': 'LayerScale', 'init_value': 0.1}}


def dia(reduction: int) -> dict[str, Any]:
    """Spec of DIA."""
    return {'type': 'DIA', 'attention': {'type': 'DIALSTM', 'reduction': reduction}}


@dataclass(frozen=True)
class Case:
    """A model, the size of its input ``(batch, 3, side, side)``, and the input-dependent plugs that are tried on it."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    side: int
    dynamic: dict[str, dict[str, Any]]
    needs: str | None = None

    @property
    def missing(self) -> bool:
        """Whether the library that it ``needs`` is not installed."""
        return self.needs is not None and find_spec(self.needs) is None


def mmdet_resnet50(width: int = 64) -> nn.Module:
    """MMDetection's ResNet-50, all of it trained; ``width``: channels of its stem."""
    from mmdet.models import ResNet

    return ResNet(50, base_channels=width, norm_eval=False, frozen_stages=-1, zero_init_residual=False)


CASES = (
    Case('ResNet-56, 32 px', resnet56, batch=32, side=32, dynamic={'SE': SE, 'DIA r=4': dia(4)}),
    Case(
        'mmdet ResNet-50',
        mmdet_resnet50,
        batch=2,
        side=224,
        dynamic={'SE': SE, 'DIA r=20': dia(20), 'DIA r=4': dia(4)},
        needs='mmdet',
    ),
    Case(
        'half ResNet-50, 128 px',  # small maps, where the steps are short and the gates' share is large
        partial(mmdet_resnet50, 32),
        batch=4,
        side=128,
        dynamic={'SE': SE, 'DIA r=4': dia(4)},
        needs='mmdet',
    ),
)


def plain_form(plugged: nn.Module) -> nn.Module:
    """Copy a plugged model; the copy keeps what gates need: with ``memory='plain'``, and scaled weights of layers."""
    model = with_memory(plugged, 'plain')
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Plugged)]
    for layer in layers:
        layer.recomputes = False
    return model


def low_form(plugged: nn.Module) -> nn.Module:
    """Copy a plugged model; the copy has ``memory='low'``."""
    return with_memory(plugged, 'low')


def with_memory(plugged: nn.Module, memory: str) -> nn.Module:
    """Copy a plugged model, with another choice of ``memory``."""
    model = copy.deepcopy(plugged)
    for gate in model.modules():
        if isinstance(gate, DynamicGate):
            gate.memory = memory
    return model


def feature_map_form(plugged: nn.Module) -> nn.Module:
    """Copy a plugged model into the form that multiplies the output of each site's layer by its gates."""
    model = copy.deepcopy(plugged)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Plugged)]
    for layer in layers:
        gates, dim = layer.gate, layer.channel_dim
        detach(layer)
        layer.register_module('late_gates', gates)

        def scale(module: Any, _: Any, y: Tensor, dim: int = dim) -> Tensor:
            for gate in module.late_gates:
                y = y * (gate() if dim == -1 else gate().view(1, -1, 1, 1))
            return y

        layer.register_forward_hook(scale)
    return model


def plugged_copy(stock: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """Plug a copy, in eval mode."""
    model = copy.deepcopy(stock)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plug(model, spec)
    model.eval()
    return model
