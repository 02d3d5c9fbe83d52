# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-layerscale_fpn_bccd.py --data-root /data/bccd
# The control: one free number a channel instead of an attention, started at 0.1 as its paper does up to depth 18; folds.
_base_ = './retinanet_r18-w32_fpn_bccd.py'

model = dict(
    backbone=dict(
        type='asr_downstream.ResNet', plug=dict(type='Attention', attention=dict(type='LayerScale', init_value=0.1))
    )
)
