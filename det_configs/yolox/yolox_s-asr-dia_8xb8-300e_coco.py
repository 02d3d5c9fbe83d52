# python tools/train_det.py det_configs/yolox/yolox_s-asr-dia_8xb8-300e_coco.py --data-root /data/coco
# ASR over DIA: learned inputs through one DIA-LSTM a stage, r = 20; constant gates, which
# fold into the stock detector.
_base_ = './yolox_s_8xb8-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPDarknet',
        plug=dict(
            type='ASR',
            attention=dict(type='DIALSTM', reduction=20),
        ),
    )
)
