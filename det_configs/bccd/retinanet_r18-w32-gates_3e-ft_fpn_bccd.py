# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-gates_3e-ft_fpn_bccd.py --data-root data/bccd-dark \
#   --load-from work_dirs/retinanet_r18-w32_fpn_bccd/epoch_12.pth --learns gates
# A gate for every channel of the norms of the backbone and of the convolutions of neck and head; they start at 1, so
# the start is the detector that was loaded. With --cfg-options model.plug.shift=True a shift beside each gate.
_base_ = './retinanet_r18-w32_3e-ft_fpn_bccd.py'

model = dict(
    type='asr_downstream.RetinaNet',
    plug=dict(
        type='Attention',
        attention=dict(type='LayerScale', init_value=1.0),
        sites=['backbone.*bn*', 'backbone.*.downsample.1', 'neck.*.conv', 'bbox_head.*_convs.*.conv'],
    ),
)
# Gates want a larger rate than weights: 1e-3 of the base's config learns next to nothing in three epochs.
optim_wrapper = dict(optimizer=dict(lr=3e-2))
