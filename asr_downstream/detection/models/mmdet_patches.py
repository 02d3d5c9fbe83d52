"""Faults of MMDetection that would stop its own models here, mended at import; each says where it is reported."""

from __future__ import annotations

from mmdet.models.dense_heads import SSDHead

__all__: list[str] = []

# Since 3.2, inference reads `self.loss_cls` of every dense head, and SSDHead has none (open-mmlab/mmdetection#11780).
# None is what the code behind it needs: "no custom activation".
if not hasattr(SSDHead, 'loss_cls'):
    SSDHead.loss_cls = None
