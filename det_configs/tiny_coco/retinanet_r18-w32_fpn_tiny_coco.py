# python tools/train_det.py det_configs/tiny_coco/retinanet_r18-w32_fpn_tiny_coco.py --data-root /data/tiny_coco
_base_ = ['../_base_/retinanet_r18-w32_small.py', '../_base_/tiny_coco.py']

model = dict(bbox_head=dict(num_classes=80))
max_epochs = 60
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=20))
