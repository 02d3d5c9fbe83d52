# python tools/train_det.py det_configs/ssd/ssdlite_mobilenetv2-scratch-se_8xb24-600e_coco.py --data-root /data/coco
# SE at every residual branch.
_base_ = ['./ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', '../_base_/plugs/se.py']

model = dict(backbone=dict(type='asr_downstream.MobileNetV2', plug=_base_.plug))
