# python tools/train_det.py det_configs/yolox/yolox_s-asr-se_8xb8-300e_coco.py --data-root /data/coco
# ASR(SE) at the residual branches; folds into the stock detector.
_base_ = './yolox_s_8xb8-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPDarknet',
        plug=dict(
            type='ASR',
            attention=dict(type='SE', reduction=16),
        ),
    )
)
