# python tools/train_det.py det_configs/atss/atss_r50_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
