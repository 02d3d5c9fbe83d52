# python tools/train_det.py det_configs/tiny_coco/retinanet_r18-w32-asr-se_fpn_tiny_coco.py --data-root /data/tiny_coco
# ASR(SE) at every residual branch.
_base_ = ['./retinanet_r18-w32_fpn_tiny_coco.py', '../_base_/plugs/asr-se.py']

model = dict(backbone=dict(type='asr_downstream.ResNet', plug=_base_.plug))
