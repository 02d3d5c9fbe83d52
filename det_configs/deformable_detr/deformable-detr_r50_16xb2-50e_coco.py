# python tools/train_det.py det_configs/deformable_detr/deformable-detr_r50_16xb2-50e_coco.py --data-root /data/coco
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
