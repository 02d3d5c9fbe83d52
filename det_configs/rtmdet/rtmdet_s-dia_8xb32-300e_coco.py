# python tools/train_det.py det_configs/rtmdet/rtmdet_s-dia_8xb32-300e_coco.py --data-root /data/coco
# DIA at every residual branch; starts from the outputs of the pretrained backbone.
_base_ = ['./rtmdet_s_8xb32-300e_coco.py', '../_base_/plugs/dia.py']

model = dict(backbone=dict(type='asr_downstream.CSPNeXt', plug=dict(_base_.plug, preserve=True)))
