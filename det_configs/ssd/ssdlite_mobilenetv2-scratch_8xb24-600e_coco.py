# python tools/train_det.py det_configs/ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py --data-root /data/coco
_base_ = 'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py'
