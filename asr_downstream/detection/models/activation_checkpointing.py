"""Non-reentrant activation checkpointing for mmdet's blocks (``with_cp=True``).

mmdet calls ``torch.utils.checkpoint`` without ``use_reentrant``, which means the reentrant form. That form cuts the
autograd graph at every block, and with it the state that a shared recurrent attention carries from block to block.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mmdet.models.backbones import (
    detectors_resnet,
    efficientnet,
    res2net,
    resnest,
    resnet,
    resnext,
    swin,
    trident_resnet,
)
from mmdet.models.layers import inverted_residual
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['use_non_reentrant']

BLOCKS: tuple[type[nn.Module], ...] = (
    resnet.BasicBlock,
    resnet.Bottleneck,
    resnext.Bottleneck,
    res2net.Bottle2neck,
    resnest.Bottleneck,
    detectors_resnet.Bottleneck,
    trident_resnet.TridentBottleneck,
    inverted_residual.InvertedResidual,
    efficientnet.EdgeResidual,
    swin.SwinBlock,
)


class _Checkpointed:
    """Mixin: the stock block sees ``with_cp=False`` and is checkpointed from outside; folding gives the class back."""

    stock_class: ClassVar[type[nn.Module]]

    @property
    def with_cp(self) -> bool:
        """What the stock forward reads."""
        return False

    def forward(self, x: Tensor, *args: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        return checkpoint(forward, x, *args, use_reentrant=False) if x.requires_grad else forward(x, *args)


def checkpointed(block: type[nn.Module]) -> type[nn.Module]:
    """Make the checkpointed class of a block, as an attribute of this module, so that it pickles."""
    name = f'Checkpointed_{block.__module__.rpartition(".")[2]}_{block.__name__}'
    made = type(name, (_Checkpointed, block), {'stock_class': block, '__module__': __name__})
    globals()[name] = made
    return made


CHECKPOINTED: dict[type[nn.Module], type[nn.Module]] = {block: checkpointed(block) for block in BLOCKS}


def use_non_reentrant(model: nn.Module) -> None:
    """Change the blocks of ``model`` that were built with ``with_cp=True``, in place."""
    for module in model.modules():
        if type(module) in CHECKPOINTED and module.with_cp:
            module.__class__ = CHECKPOINTED[type(module)]
