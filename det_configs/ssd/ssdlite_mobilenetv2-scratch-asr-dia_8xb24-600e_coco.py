# python tools/train_det.py det_configs/ssd/ssdlite_mobilenetv2-scratch-asr-dia_8xb24-600e_coco.py --data-root /data/coco
# ASR(DIA) at every residual branch.
_base_ = ['./ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', '../_base_/plugs/asr-dia.py']

model = dict(backbone=dict(type='asr_downstream.MobileNetV2', plug=_base_.plug))
