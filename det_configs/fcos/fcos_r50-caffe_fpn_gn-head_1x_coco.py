# python tools/train_det.py det_configs/fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py --data-root /data/coco
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
