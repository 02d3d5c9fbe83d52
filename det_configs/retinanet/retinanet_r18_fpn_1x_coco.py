# python tools/train_det.py det_configs/retinanet/retinanet_r18_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
