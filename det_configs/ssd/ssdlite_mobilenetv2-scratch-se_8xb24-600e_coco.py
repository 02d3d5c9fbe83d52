# python tools/train_det.py det_configs/ssd/ssdlite_mobilenetv2-scratch-se_8xb24-600e_coco.py --data-root /data/coco
# Classic SE at the residual branches: input-dependent; folds by calibration only
# (tools/fold.py --calibrate).
_base_ = './ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.MobileNetV2',
        plug=dict(
            type='Attention',
            attention=dict(type='SE', reduction=16),
        ),
    )
)
