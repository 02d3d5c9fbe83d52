# python tools/train_det.py det_configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
