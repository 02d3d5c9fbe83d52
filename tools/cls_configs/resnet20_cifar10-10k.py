# python tools/train_cls.py tools/cls_configs/resnet20_cifar10-10k.py --data /data/cifar10-train.zip --plug asr-se --seed 0
# ResNet-20 on 10,000 of CIFAR-10's training images, 10 epochs of SGD at 0.1, dropped after 8: some minutes on a core.
model = dict(type='ResNet', depth=20)
data = dict(type='Zip', path='data/cifar10-train.zip', resolution=32)
images_per_class = 1000
images_in = 'device'
augment = [dict(type='Crop', padding=4), dict(type='Flip')]
image_mean = [0.491, 0.482, 0.447]
image_std = [0.247, 0.243, 0.262]
epochs = 10
lr_scheduler = 'step'
lr_scheduler_kwargs = dict(milestones=[8 / 10], gamma=0.1)
validation_epochs = 1
logging_steps = 39
checkpoints_total_limit = 1
dataloader_num_workers = 0
report_to = []
