"""MMEngine's batch norms, which join the fold table when the MMDetection adapter is imported."""

from __future__ import annotations

from mmengine.model.utils import _BatchNormXd
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm

from asr_downstream.layers import LAYERS, _BatchNorm, _SyncBatchNorm

__all__ = ['PluggedBatchNormXd', 'PluggedEngineSyncBatchNorm']


class PluggedEngineSyncBatchNorm(_SyncBatchNorm, SyncBatchNorm):
    """``norm_cfg=dict(type='SyncBN')`` builds this subclass of torch's."""

    stock = SyncBatchNorm


class PluggedBatchNormXd(_BatchNorm, _BatchNormXd):
    """``revert_sync_batchnorm`` puts this in place of SyncBN where there is one process."""

    stock = _BatchNormXd


LAYERS.update({plugged.stock: plugged for plugged in (PluggedEngineSyncBatchNorm, PluggedBatchNormXd)})
