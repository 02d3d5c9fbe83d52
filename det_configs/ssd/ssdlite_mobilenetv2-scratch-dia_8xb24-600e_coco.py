# python tools/train_det.py det_configs/ssd/ssdlite_mobilenetv2-scratch-dia_8xb24-600e_coco.py --data-root /data/coco
# One DIA-LSTM along each stage, with the ImageNet setting r = 20: input-dependent; folds by
# calibration only (tools/fold.py --calibrate).
_base_ = './ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.MobileNetV2',
        plug=dict(
            type='DIA',
            attention=dict(type='DIALSTM', reduction=20),
        ),
    )
)
