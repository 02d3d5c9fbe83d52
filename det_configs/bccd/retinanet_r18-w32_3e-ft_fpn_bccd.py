# python tools/train_det.py det_configs/bccd/retinanet_r18-w32_3e-ft_fpn_bccd.py --data-root data/bccd-dark \
#   --load-from work_dirs/retinanet_r18-w32_fpn_bccd/epoch_12.pth --learns norms
# The detector trained on for three epochs, on other images; --learns says what of it: norms, bbox_head.*, all.
_base_ = './retinanet_r18-w32_fpn_bccd.py'

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
