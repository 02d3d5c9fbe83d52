# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-layerscale_fpn_bccd.py --data-root /data/bccd
# LayerScale at every residual branch.
_base_ = ['./retinanet_r18-w32_fpn_bccd.py', '../_base_/plugs/layerscale.py']

model = dict(backbone=dict(type='asr_downstream.ResNet', plug=_base_.plug))
