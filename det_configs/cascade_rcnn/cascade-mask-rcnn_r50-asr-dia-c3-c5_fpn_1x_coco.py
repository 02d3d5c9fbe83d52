# python tools/train_det.py det_configs/cascade_rcnn/cascade-mask-rcnn_r50-asr-dia-c3-c5_fpn_1x_coco.py --data-root /data/coco
# ASR(DIA) at stages 2 to 4 (c3 to c5), since stage 1 is frozen; starts from the outputs of the pretrained backbone.
_base_ = ['./cascade-mask-rcnn_r50_fpn_1x_coco.py', '../_base_/plugs/asr-dia.py']

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(_base_.plug, sites=['layer[234].*.bn3'], preserve=True))
)
