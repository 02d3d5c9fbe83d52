# python tools/train_det.py det_configs/yolox/yolox_s-dia_8xb8-300e_coco.py --data-root /data/coco
# DIA at every residual branch.
_base_ = ['./yolox_s_8xb8-300e_coco.py', '../_base_/plugs/dia.py']

model = dict(backbone=dict(type='asr_downstream.CSPDarknet', plug=_base_.plug))
