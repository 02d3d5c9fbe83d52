# python tools/train_det.py det_configs/gfl/gfl_r50_fpn_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'
