# python tools/train_det.py det_configs/bccd/retinanet_pvtv2-b0-w16_4e-ft_fpn_bccd.py --data-root /data/bccd
# The teacher trained on, with its attention: what the further epochs of the configs with "far" are worth by themselves.
_base_ = './retinanet_pvtv2-b0-w16_fpn_bccd.py'

load_from = 'work_dirs/retinanet_pvtv2-b0-w16_fpn_bccd/epoch_12.pth'
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
