# python tools/train_det.py det_configs/faster_rcnn/faster-rcnn_r18_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
