"""Non-reentrant activation checkpointing for mmdet's blocks (``with_cp=True``).

mmdet calls ``torch.utils.checkpoint`` without ``use_reentrant``, which means the reentrant form. That form cuts the
autograd graph at every block, and with it the state that a shared recurrent attention carries from block to block.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdet.models.backbones import resnet, resnext
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['use_non_reentrant']


class _Checkpointed:
    """Mixin: the stock block sees ``with_cp=False`` and is checkpointed from outside; folding gives the class back."""

    stock_class: ClassVar[type[nn.Module]]

    @property
    def with_cp(self) -> bool:
        """What the stock forward reads."""
        return False

    def forward(self, x: Tensor) -> Any:
        forward = super().forward  # type: ignore[misc]
        return checkpoint(forward, x, use_reentrant=False) if x.requires_grad else forward(x)


class CheckpointedBasicBlock(_Checkpointed, resnet.BasicBlock):
    stock_class = resnet.BasicBlock


class CheckpointedBottleneck(_Checkpointed, resnet.Bottleneck):
    stock_class = resnet.Bottleneck


class CheckpointedResNeXtBottleneck(_Checkpointed, resnext.Bottleneck):
    stock_class = resnext.Bottleneck


CHECKPOINTED: dict[type[nn.Module], type[nn.Module]] = {
    cls.stock_class: cls
    for cls in (CheckpointedBasicBlock, CheckpointedBottleneck, CheckpointedResNeXtBottleneck)
}  # fmt: skip


def use_non_reentrant(model: nn.Module) -> None:
    """Change the blocks of ``model`` that were built with ``with_cp=True``, in place."""
    for module in model.modules():
        if type(module) in CHECKPOINTED and module.with_cp:
            module.__class__ = CHECKPOINTED[type(module)]
