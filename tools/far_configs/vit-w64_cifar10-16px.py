# The control of the students beside it: a teacher, and LSTMs distilled by the distance between heads alone.
#   python tools/distill_far.py tools/far_configs/vit-w64_cifar10-16px.py --data /data/cifar10-train.zip
# 10,000 images of CIFAR-10 at 16 pixels, 16 patches and a class token: some minutes on a core.
_base_ = './vit-w64_cifar10.py'
teacher = dict(image_size=16)
data = dict(resolution=16)
images_per_class = 1000
images_in = 'device'
image_mean = image_std = [0.5, 0.5, 0.5]  # pixels in [-1, 1]; a shipped teacher does not say
augment = [dict(type='Crop', padding=2), dict(type='Flip')]
validation_steps = 0  # evaluate-far measures what is shipped
checkpointing_steps = 10_000
checkpoints_total_limit = 1
logging_steps = 39
dataloader_num_workers = 0
stages = [
    dict(name='teacher', learns='teacher', learning_rate=2e-3, epochs=20, warmup_epochs=1),
    dict(
        name='distill', learns='replacements', distance=dict(type='MSE', feature='heads'), epochs=6, warmup_epochs=0.5
    ),
    dict(name='finetune', learns='all', learning_rate=5e-4, epochs=3, warmup_epochs=0.2),
]
