# python tools/train_cls.py tools/cls_configs/resnet164_cifar10.py --data /data/cifar10-train.zip --plug asr-se --seed 0
# ResNet-164 with bottlenecks and the papers' recipe: 164 epochs of SGD at 0.1, dropped after 81 and 122; for a GPU. They
# train on all 50,000 images and test on 10,000 others; here a tenth of the 50,000 is held out, so numbers differ.
model = dict(type='ResNet', depth=164, block='bottleneck', init='he')
data = dict(type='Zip', path='data/cifar10-train.zip', resolution=32)
images_in = 'device'
augment = [dict(type='Crop', padding=4), dict(type='Flip')]
image_mean = [0.4914, 0.4822, 0.4465]
image_std = [0.2023, 0.1994, 0.2010]
epochs = 164
lr_scheduler = 'step'
lr_scheduler_kwargs = dict(milestones=[81 / 164, 122 / 164], gamma=0.1)
validation_epochs = 1
logging_steps = 88
checkpointing_steps = 1760  # five epochs
checkpoints_total_limit = 2
dataloader_num_workers = 2
report_to = []
