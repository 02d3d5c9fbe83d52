# python tools/train_det.py det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py
# ASR(SE) at every residual branch; folded, it is the detector of retinanet_r18-w16_fpn_digits.py.
_base_ = './retinanet_r18-w16_fpn_digits.py'

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(type='ASR', attention=dict(type='SE', reduction=16)))
)
