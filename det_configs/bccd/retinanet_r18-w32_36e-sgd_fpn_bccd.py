# python tools/train_det.py det_configs/bccd/retinanet_r18-w32_36e-sgd_fpn_bccd.py --data-root /data/bccd
# MMDetection's recipe (schedule_1x.py: SGD at 0.02, warm-up over 500 steps, rate a tenth after 2/3 and 11/12) three
# times as long. Its rate is for 16 images a step and stays as it is for 2: the network starts from nothing here.
_base_ = ['./retinanet_r18-w32_fpn_bccd.py']

max_epochs = 36
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones=[24, 33], gamma=0.1),
]
