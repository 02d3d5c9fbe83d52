# python tools/train_det.py det_configs/cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'
