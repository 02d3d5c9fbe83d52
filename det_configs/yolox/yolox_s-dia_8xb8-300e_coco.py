# python tools/train_det.py det_configs/yolox/yolox_s-dia_8xb8-300e_coco.py --data-root /data/coco
# One DIA-LSTM along each stage, with the ImageNet setting r = 20: input-dependent; folds by
# calibration only (tools/fold.py --calibrate).
_base_ = './yolox_s_8xb8-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPDarknet',
        plug=dict(
            type='DIA',
            attention=dict(type='DIALSTM', reduction=20),
        ),
    )
)
