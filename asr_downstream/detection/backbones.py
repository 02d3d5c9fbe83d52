"""MMDetection backbones that take ``plug=dict(...)``: ``type='asr_downstream.ResNet'`` in any mmdet config.

A plugged backbone is its stock class with gates: same arguments, same keys, same initial stock weights for one seed.
`asr_downstream.fold` gives back the stock class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from mmdet.models import backbones
from torch import nn

from asr_downstream.layers import Plugged, rebind
from asr_downstream.plugging import Spec, plug
from asr_downstream.registry import MODELS

__all__ = ['PluggedBackbone', 'ResNeXt', 'ResNet', 'ResNetV1d']


class PluggedBackbone:
    """Mixin: plugs the backbone once it is built, and keeps mmdet's initialisation and mode switches as they are."""

    stock_class: ClassVar[type[nn.Module]]

    def __init__(self, *args: Any, plug: Spec | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if plug is not None:
            attach_plug(self, plug)

    def init_weights(self: Any) -> None:
        """Initialise the stock weights as the stock class does.

        A pretrained checkpoint of the stock model leaves only gates missing; one of a plugged model fills them too. A
        random initialisation does not see the gates: mmengine chooses layers by class name and would treat them as
        part of the network, and draw other numbers for the stock weights.
        """
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            super().init_weights()  # type: ignore[misc]
        else:
            with unplugged(self):
                super().init_weights()  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; gates of layers that a SyncBN conversion has rebuilt are attached again."""
        rebind(self)  # type: ignore[arg-type]
        return super().train(mode)  # type: ignore[misc]


def attach_plug(backbone: Any, spec: Spec) -> None:
    """Plug ``backbone``; a config may hold the spec as mmengine's own dicts and lists."""
    to_dict = getattr(spec, 'to_dict', None)
    plug(backbone, to_dict() if to_dict else spec)


@contextmanager
def unplugged(model: nn.Module) -> Iterator[None]:
    """Hide the gates of ``model`` and give its plugged layers their stock classes for a while."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, Plugged)]
    hidden = [(m, type(m), {slot: m._modules.pop(slot) for slot in ('gate', 'dynamic')}) for m in layers]
    for layer, _, _ in hidden:
        layer.__class__ = layer.stock
    try:
        yield
    finally:
        for layer, plugged, slots in hidden:
            layer.__class__ = plugged
            layer._modules.update(slots)


@MODELS.register_module()
class ResNet(PluggedBackbone, backbones.ResNet):
    """ResNet-18 to 152 with ``plug``; sites: the last norm of each block."""

    stock_class = backbones.ResNet


@MODELS.register_module()
class ResNetV1d(PluggedBackbone, backbones.ResNetV1d):
    """ResNet-V1d with ``plug``; sites: the last norm of each block."""

    stock_class = backbones.ResNetV1d


@MODELS.register_module()
class ResNeXt(PluggedBackbone, backbones.ResNeXt):
    """ResNeXt with ``plug``; sites: the last norm of each block."""

    stock_class = backbones.ResNeXt
