# python tools/train_det.py det_configs/dino/dino-4scale_r50-asr-dia-c3-c5_8xb2-12e_coco.py --data-root /data/coco
# ASR over DIA at stages 2 to 4 (c3 to c5): learned inputs through one DIA-LSTM a stage, r = 20; constant gates, which
# fold into the stock detector.
# The pretrained stage 1 is frozen, as in the base; preserve=True starts where the pretrained backbone stands.
_base_ = './dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.ResNet',
        plug=dict(
            type='ASR',
            attention=dict(type='DIALSTM', reduction=20),
            sites=['layer[234].*.bn3'],
            preserve=True,
        ),
    )
)
