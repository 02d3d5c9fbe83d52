# python tools/train_det.py det_configs/rtmdet/rtmdet-ins_s-asr-se_8xb32-300e_coco.py --data-root /data/coco
# ASR(SE) at the residual branches; folds into the stock detector.
# preserve=True starts where the pretrained backbone stands.
_base_ = './rtmdet-ins_s_8xb32-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPNeXt',
        plug=dict(
            type='ASR',
            attention=dict(type='SE', reduction=16),
            preserve=True,
        ),
    )
)
