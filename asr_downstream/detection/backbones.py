"""MMDetection backbones that take ``plug=dict(...)``: ``type='asr_downstream.ResNet'`` in any mmdet config.

A plugged backbone is its stock class with gates: same arguments, same keys, same initial stock weights for one seed.
`asr_downstream.fold` gives back the stock class.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdet.models import backbones
from torch import nn

from asr_downstream.detection import layers  # noqa: F401  (mmengine's norms join the fold table)
from asr_downstream.detection.checkpointing import use_non_reentrant
from asr_downstream.gates import Gate
from asr_downstream.layers import rebind
from asr_downstream.plugging import Spec
from asr_downstream.plugging import plug as attach_plug
from asr_downstream.registry import MODELS
from asr_downstream.sharing import SharedUnit

__all__ = ['PluggedBackbone', 'ResNeXt', 'ResNet', 'ResNetV1d']


class PluggedBackbone:
    """Mixin: plugs the backbone once it is built, and keeps mmdet's mode switches as they are."""

    stock_class: ClassVar[type[nn.Module]]

    def __init__(self, *args: Any, plug: Spec | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if plug is not None:
            to_dict = getattr(plug, 'to_dict', None)  # a config holds the spec as mmengine's own dicts
            attach_plug(self, to_dict() if to_dict else plug)  # type: ignore[arg-type]
            use_non_reentrant(self)  # type: ignore[arg-type]
            self._freeze_stages()  # type: ignore[attr-defined]  # sites that were named in frozen stages

    def train(self, mode: bool = True) -> Any:
        """Switch the mode.

        Gates of layers that a SyncBN conversion has rebuilt are attached again. ``norm_eval=True`` is about pretrained
        statistics: batch norms inside an attention have none, and train.
        """
        rebind(self)  # type: ignore[arg-type]
        result = super().train(mode)  # type: ignore[misc]
        for gate in [m for m in self.modules() if isinstance(m, Gate | SharedUnit)]:  # type: ignore[attr-defined]
            if any(p.requires_grad for p in gate.parameters()):
                gate.train(mode)
        return result


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
