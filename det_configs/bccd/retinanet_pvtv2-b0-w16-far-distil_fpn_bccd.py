# python tools/train_det.py det_configs/bccd/retinanet_pvtv2-b0-w16-far-distil_fpn_bccd.py --data-root /data/bccd
# The same, with a distance to the teacher at every replaced attention; its checkpoints load with the config without it.
_base_ = './retinanet_pvtv2-b0-w16-far_fpn_bccd.py'

model = dict(
    type='asr_downstream.RetinaNet',
    distil=dict(
        teacher=dict(
            config='det_configs/bccd/retinanet_pvtv2-b0-w16_fpn_bccd.py',
            checkpoint='work_dirs/retinanet_pvtv2-b0-w16_fpn_bccd/epoch_12.pth',
        ),
        distance=dict(type='MSE', feature='attention', weight=1.0),
        learns='all',
    ),
)
