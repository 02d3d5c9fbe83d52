# python tools/train_det.py det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py
# One DIA-LSTM along each stage: depends on the input; folds by calibration (tools/fold.py --calibrate).
_base_ = './retinanet_r18-w16_fpn_digits.py'

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(type='DIA', attention=dict(type='DIALSTM', reduction=4)))
)
