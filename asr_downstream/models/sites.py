"""Residual blocks of this package's own networks. Data, named in `asr_downstream.registry.FRAMEWORKS`."""

from __future__ import annotations

from asr_downstream.plugging.sites import Branch

__all__ = ['SITES']

SITES: dict[str, Branch] = {
    'asr_downstream.models.resnet_cifar.BasicBlock': Branch(('bn2',)),
    'asr_downstream.models.resnet_cifar.Bottleneck': Branch(('bn3',)),
}
