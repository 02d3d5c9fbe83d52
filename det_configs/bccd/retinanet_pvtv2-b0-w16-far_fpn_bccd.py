# python tools/train_det.py det_configs/bccd/retinanet_pvtv2-b0-w16-far_fpn_bccd.py --data-root /data/bccd
# Every attention is a multi-head LSTM; starts from the teacher, retinanet_pvtv2-b0-w16_fpn_bccd.py, with the task alone.
_base_ = './retinanet_pvtv2-b0-w16_4e-ft_fpn_bccd.py'

model = dict(
    backbone=dict(
        type='asr_downstream.PyramidVisionTransformerV2', replace=dict(type='FAR', variant='M3', layers='all')
    )
)
