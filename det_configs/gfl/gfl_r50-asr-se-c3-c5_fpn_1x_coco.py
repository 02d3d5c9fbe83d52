# python tools/train_det.py det_configs/gfl/gfl_r50-asr-se-c3-c5_fpn_1x_coco.py --data-root /data/coco
# ASR(SE) at stages 2 to 4 (c3 to c5), since stage 1 is frozen; starts from the outputs of the pretrained backbone.
_base_ = ['./gfl_r50_fpn_1x_coco.py', '../_base_/plugs/asr-se.py']

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(_base_.plug, sites=['layer[234].*.bn3'], preserve=True))
)
