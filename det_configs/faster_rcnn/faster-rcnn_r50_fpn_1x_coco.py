# python tools/train_det.py det_configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
