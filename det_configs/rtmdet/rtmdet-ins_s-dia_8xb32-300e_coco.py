# python tools/train_det.py det_configs/rtmdet/rtmdet-ins_s-dia_8xb32-300e_coco.py --data-root /data/coco
# One DIA-LSTM along each stage, with the ImageNet setting r = 20: input-dependent; folds by
# calibration only (tools/fold.py --calibrate).
# preserve=True starts where the pretrained backbone stands.
_base_ = './rtmdet-ins_s_8xb32-300e_coco.py'

model = dict(
    backbone=dict(
        type='asr_downstream.CSPNeXt',
        plug=dict(
            type='DIA',
            attention=dict(type='DIALSTM', reduction=20),
            preserve=True,
        ),
    )
)
