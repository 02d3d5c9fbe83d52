# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-asr-se_fpn_bccd.py --data-root /data/bccd
# ASR(SE) at every residual branch; folded, it is the detector of retinanet_r18-w32_fpn_bccd.py.
_base_ = './retinanet_r18-w32_fpn_bccd.py'

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(type='ASR', attention=dict(type='SE', reduction=16)))
)
