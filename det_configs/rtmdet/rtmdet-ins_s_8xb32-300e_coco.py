# python tools/train_det.py det_configs/rtmdet/rtmdet-ins_s_8xb32-300e_coco.py --data-root /data/coco
_base_ = 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py'
