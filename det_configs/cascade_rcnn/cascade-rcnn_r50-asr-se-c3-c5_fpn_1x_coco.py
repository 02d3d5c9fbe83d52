# python tools/train_det.py det_configs/cascade_rcnn/cascade-rcnn_r50-asr-se-c3-c5_fpn_1x_coco.py --data-root /data/coco
# ASR(SE) at the residual branches of stages 2 to 4 (c3 to c5); folds into the stock detector.
# The pretrained stage 1 is frozen, as in the base; preserve=True starts where the pretrained backbone stands.
_base_ = './cascade-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.ResNet',
        plug=dict(
            type='ASR',
            attention=dict(type='SE', reduction=16),
            sites=['layer[234].*.bn3'],
            preserve=True,
        ),
    )
)
