# python tools/train_det.py det_configs/yolox/yolox_s_8xb8-300e_coco.py --data-root /data/coco
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
