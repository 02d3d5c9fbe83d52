# FAR of DeiT-Tiny on ImageNet-1k, with the settings of the authors' repository (state of June 2025 and later).
#   accelerate launch tools/distill_far.py tools/far_configs/deit-tiny_imagenet.py --data /data/imagenet/train
#   accelerate launch tools/prune_far.py tools/far_configs/deit-tiny_imagenet.py --data /data/imagenet/train --keep 0.5
# Not run here. Known differences: one image in a hundred of the folder is held out instead of the validation set;
# images are cut to 224 px before the random crop; no RandAugment, no repeated augmentation, no fp16 loss scaling rules
# beyond accelerate's; the Small and Base settings (batch 64 on each of four processes, second stage 2e-5 x 64/512) are
# options: --cfg-options train_batch_size=64 stages.1.learning_rate=2.5e-6
teacher = dict(type='ViTForImageClassification', pretrained_model_name_or_path='facebook/deit-tiny-patch16-224')
replace = dict(type='FAR', variant='M3', layers='all')
data = dict(type='ImageFolder', path='data/imagenet/train', resolution=224)
holdout = 0.01
image_mean = [0.485, 0.456, 0.406]
image_std = [0.229, 0.224, 0.225]
augment = [
    dict(type='ResizedCrop'),
    dict(type='Flip'),
    dict(type='ColorJitter', strength=0.3),
    dict(type='Erasing', p=0.25),
]
train_batch_size = 256
adam_weight_decay = 0.05
lr_scheduler = 'cosine_warmup_with_min_lr'
lr_scheduler_kwargs = dict(min_lr=1e-6, warmup_lr_rate=0.04)  # warm-up from 1e-5 and 1e-6
mixed_precision = 'fp16'
dataloader_num_workers = 8
validation_steps = 5000
checkpointing_steps = 5000
stages = [
    dict(
        name='distill',
        learns='replacements',
        task_weight=1.0,
        distance=dict(type='MSE', feature='heads', weight=1.0),  # before: dict(type='Cosine', axis='tokens', ...)
        learning_rate=2.5e-4,  # 5e-4 x 256 / 512
        epochs=200,
        warmup_epochs=5,
    ),
    dict(
        name='finetune',
        learns='all',  # 'blocks' until August 2025
        learning_rate=2.5e-5,  # 5e-5 x 256 / 512
        epochs=100,
        warmup_epochs=5,
    ),
]
prune = dict(
    sparse=dict(learns='all', hoyer=5e-5, learning_rate=5e-4, epochs=200, warmup_epochs=5),
    finetune=dict(learns='all', learning_rate=5e-6, epochs=100, warmup_epochs=5),
)
