# python tools/train_det.py det_configs/bccd/retinanet_pvtv2-b0-w16_fpn_bccd.py --data-root /data/bccd
# PVTv2-B0 of half the width, one layer a stage, from scratch: the teacher of the configs with "far" in their names.
_base_ = './retinanet_r18-w32_fpn_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PyramidVisionTransformerV2',
        embed_dims=16,
        num_layers=[1, 1, 1, 1],
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    neck=dict(in_channels=[16, 32, 80, 128]),
)
