# python tools/train_det.py det_configs/yolox/yolox_s-se_8xb8-300e_coco.py --data-root /data/coco
# Classic SE at the residual branches: input-dependent; folds by calibration only
# (tools/fold.py --calibrate).
_base_ = './yolox_s_8xb8-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPDarknet',
        plug=dict(
            type='Attention',
            attention=dict(type='SE', reduction=16),
        ),
    )
)
