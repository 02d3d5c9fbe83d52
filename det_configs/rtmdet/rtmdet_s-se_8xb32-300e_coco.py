# python tools/train_det.py det_configs/rtmdet/rtmdet_s-se_8xb32-300e_coco.py --data-root /data/coco
# Classic SE at the residual branches: input-dependent; folds by calibration only
# (tools/fold.py --calibrate).
# preserve=True starts where the pretrained backbone stands.
_base_ = './rtmdet_s_8xb32-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPNeXt',
        plug=dict(
            type='Attention',
            attention=dict(type='SE', reduction=16),
            preserve=True,
        ),
    )
)
