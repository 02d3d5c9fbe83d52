# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-asr-dia_fpn_bccd.py --data-root /data/bccd
# ASR over DIA: learned inputs through one recurrent unit a stage; folds into the stock detector.
_base_ = './retinanet_r18-w32_fpn_bccd.py'

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(type='ASR', attention=dict(type='DIALSTM', reduction=4)))
)
