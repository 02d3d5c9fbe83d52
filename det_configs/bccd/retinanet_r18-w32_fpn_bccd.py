# python tools/train_det.py det_configs/bccd/retinanet_r18-w32_fpn_bccd.py --data-root /data/bccd
_base_ = ['../_base_/retinanet_r18-w32_small.py', '../_base_/bccd.py']

model = dict(bbox_head=dict(num_classes=3))
