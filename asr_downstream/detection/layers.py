"""Layers of mmengine and mmcv that join the fold table when the MMDetection adapter is imported."""

from __future__ import annotations

from mmcv.cnn.bricks import wrappers
from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm

from asr_downstream import layers
from asr_downstream.layers import LAYERS

__all__ = [
    'PluggedBatchNormXd',
    'PluggedEngineSyncBatchNorm',
    'PluggedWrappedConv2d',
    'PluggedWrappedConv3d',
    'PluggedWrappedConvTranspose2d',
    'PluggedWrappedConvTranspose3d',
    'PluggedWrappedLinear',
]


class PluggedEngineSyncBatchNorm(layers._SyncBatchNorm, SyncBatchNorm):
    """``norm_cfg=dict(type='SyncBN')`` builds this subclass of torch's."""

    stock = SyncBatchNorm


class PluggedBatchNormXd(layers._BatchNorm, _BatchNormXd):
    """``revert_sync_batchnorm`` puts this in place of SyncBN where there is one process."""

    stock = _BatchNormXd


# mmcv's wrappers of torch's layers, which only treat empty inputs in another way, in torch before 1.5.


class PluggedWrappedConv2d(layers._Conv, wrappers.Conv2d):
    stock = wrappers.Conv2d


class PluggedWrappedConv3d(layers._Conv, wrappers.Conv3d):
    stock = wrappers.Conv3d
    positions = (2, 2, 2)


class PluggedWrappedConvTranspose2d(layers._ConvTranspose, wrappers.ConvTranspose2d):
    stock = wrappers.ConvTranspose2d


class PluggedWrappedConvTranspose3d(layers._ConvTranspose, wrappers.ConvTranspose3d):
    stock = wrappers.ConvTranspose3d
    positions = (2, 2, 2)


class PluggedWrappedLinear(layers.PluggedLinear, wrappers.Linear):
    stock = wrappers.Linear


LAYERS.update(
    {
        plugged.stock: plugged
        for plugged in (
            PluggedEngineSyncBatchNorm,
            PluggedBatchNormXd,
            PluggedWrappedConv2d,
            PluggedWrappedConv3d,
            PluggedWrappedConvTranspose2d,
            PluggedWrappedConvTranspose3d,
            PluggedWrappedLinear,
        )
    }
)
