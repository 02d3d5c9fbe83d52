# python tools/train_det.py det_configs/bccd/retinanet_r18-w32-start_fpn_bccd.py --data-root /data/bccd
# Every residual branch started at one half; no attention. MMDetection's ResNets start them at zero, where half is nothing.
_base_ = ['./retinanet_r18-w32_fpn_bccd.py', '../_base_/plugs/start.py']

model = dict(backbone=dict(type='asr_downstream.ResNet', zero_init_residual=False, plug=_base_.plug))
