# A ViT for CIFAR-10, 64 patches of 4x4 and a class token; all its attention replaced.
#   python tools/distill_far.py tools/far_configs/vit-w64_cifar10.py --data /data/cifar10-train.zip
#   python tools/prune_far.py tools/far_configs/vit-w64_cifar10.py --data /data/cifar10-train.zip --keep 0.75 0.5 0.25
# Data: https://www.cs.toronto.edu/~kriz/cifar.html, as images, a folder a class; one in ten is held out.
teacher = dict(
    type='ViTForImageClassification',
    image_size=32,
    patch_size=4,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
    num_labels=10,
    initializer_range=0.08,
)
replace = dict(type='FAR', variant='M3', layers='all')
data = dict(type='Zip', path='data/cifar10-train.zip', resolution=32)
holdout = 0.1
augment = [dict(type='Crop', padding=4), dict(type='Flip')]
train_batch_size = 128
learning_rate = 1e-3
validation_steps = 704  # two epochs
checkpointing_steps = 352
checkpoints_total_limit = 2
logging_steps = 44
report_to = []
stages = [
    dict(name='teacher', learns='teacher', learning_rate=2e-3, epochs=12, warmup_epochs=1),
    dict(
        name='distill', learns='replacements', distance=dict(type='MSE', feature='heads'), epochs=6, warmup_epochs=0.5
    ),
    dict(name='finetune', learns='all', learning_rate=5e-4, epochs=3, warmup_epochs=0.2),
]
prune = dict(
    sparse=dict(learns='all', hoyer=1e-2, learning_rate=5e-4, epochs=1.5, warmup_epochs=0.2),
    finetune=dict(learns='all', learning_rate=5e-4, epochs=1, warmup_epochs=0.2),
)
