# python tools/train_det.py det_configs/faster_rcnn/faster-rcnn_r18-asr-eca-c3-c5_fpn_1x_coco.py --data-root /data/coco
# ASR(ECA) at stages 2 to 4 (c3 to c5), since stage 1 is frozen; starts from the outputs of the pretrained backbone.
_base_ = ['./faster-rcnn_r18_fpn_1x_coco.py', '../_base_/plugs/asr-eca.py']

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(_base_.plug, sites=['layer[234].*.bn2'], preserve=True))
)
