# python tools/train_det.py det_configs/ssd/ssdlite_mobilenetv2-scratch-asr-se_8xb24-600e_coco.py --data-root /data/coco
# ASR(SE) at the residual branches; folds into the stock detector.
_base_ = './ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.MobileNetV2',
        plug=dict(
            type='ASR',
            attention=dict(type='SE', reduction=16),
        ),
    )
)
