# python tools/train_det.py det_configs/dino/dino-4scale_r50_8xb2-12e_coco.py --data-root /data/coco
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
