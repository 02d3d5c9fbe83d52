# python tools/train_det.py det_configs/gfl/gfl_r50-dia-c3-c5_fpn_1x_coco.py --data-root /data/coco
# One DIA-LSTM along each stage, stages 2 to 4 (c3 to c5), with the ImageNet setting r = 20: input-dependent; folds by
# calibration only (tools/fold.py --calibrate).
# The pretrained stage 1 is frozen, as in the base; preserve=True starts where the pretrained backbone stands.
_base_ = './gfl_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.ResNet',
        plug=dict(
            type='DIA',
            attention=dict(type='DIALSTM', reduction=20),
            sites=['layer[234].*.bn3'],
            preserve=True,
        ),
    )
)
