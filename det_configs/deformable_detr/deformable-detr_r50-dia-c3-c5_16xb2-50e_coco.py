# python tools/train_det.py det_configs/deformable_detr/deformable-detr_r50-dia-c3-c5_16xb2-50e_coco.py --data-root /data/coco
# DIA at stages 2 to 4 (c3 to c5), since stage 1 is frozen; starts from the outputs of the pretrained backbone.
_base_ = ['./deformable-detr_r50_16xb2-50e_coco.py', '../_base_/plugs/dia.py']

model = dict(
    backbone=dict(type='asr_downstream.ResNet', plug=dict(_base_.plug, sites=['layer[234].*.bn3'], preserve=True))
)
