# python tools/train_det.py det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py
# ASR(SE) at every residual branch.
_base_ = ['./retinanet_r18-w16_fpn_digits.py', '../_base_/plugs/asr-se.py']

model = dict(backbone=dict(type='asr_downstream.ResNet', plug=_base_.plug))
