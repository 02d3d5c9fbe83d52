# python tools/train_det.py det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py
# DIA at every residual branch.
_base_ = ['./retinanet_r18-w16_fpn_digits.py', '../_base_/plugs/dia-r4.py']

model = dict(backbone=dict(type='asr_downstream.ResNet', plug=_base_.plug))
