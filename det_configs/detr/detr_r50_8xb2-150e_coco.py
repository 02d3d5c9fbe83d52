# python tools/train_det.py det_configs/detr/detr_r50_8xb2-150e_coco.py --data-root /data/coco
_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
