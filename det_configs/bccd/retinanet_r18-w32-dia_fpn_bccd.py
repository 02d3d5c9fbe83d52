# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-dia_fpn_bccd.py --data-root /data/bccd
# One DIA-LSTM along each stage: depends on the input; tools/fold.py --calibrate replaces its gates by their mean.
_base_ = './retinanet_r18-w32_fpn_bccd.py'

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(type='DIA', attention=dict(type='DIALSTM', reduction=4)))
)
