# python tools/train_det.py det_configs/digits/retinanet_r18-w16_fpn_digits.py
# A RetinaNet small enough for two CPU cores: ResNet-18 of a quarter of the width, trained from scratch.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/default_runtime.py', '../_base_/digits.py']

model = dict(
    data_preprocessor=dict(mean=[100.0] * 3, std=[60.0] * 3),
    backbone=dict(
        depth=18,
        base_channels=16,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64], out_channels=48, start_level=0, add_extra_convs=False, num_outs=2),
    bbox_head=dict(
        num_classes=10,
        in_channels=48,
        feat_channels=48,
        stacked_convs=1,
        anchor_generator=dict(octave_base_scale=3, scales_per_octave=2, ratios=[1.0, 1.8], strides=[8, 16]),
    ),
    test_cfg=dict(nms_pre=300, max_per_img=30),
)

max_epochs = 10
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
