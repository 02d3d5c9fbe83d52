# python tools/train_det.py det_configs/deformable_detr/deformable-detr_r50-se-c3-c5_16xb2-50e_coco.py --data-root /data/coco
# Classic SE at the residual branches of stages 2 to 4 (c3 to c5): input-dependent; folds by calibration only
# (tools/fold.py --calibrate).
# The pretrained stage 1 is frozen, as in the base; preserve=True starts where the pretrained backbone stands.
_base_ = './deformable-detr_r50_16xb2-50e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.ResNet',
        plug=dict(
            type='Attention',
            attention=dict(type='SE', reduction=16),
            sites=['layer[234].*.bn3'],
            preserve=True,
        ),
    )
)
