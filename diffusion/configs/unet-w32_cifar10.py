# python diffusion/train.py diffusion/configs/unet-w32_cifar10.py --data /data/cifar10-train.zip
# A small UNet (1.1 M parameters) on the 50,000 training images of CIFAR-10, as a zip or a folder. 3,000 steps are one
# epoch: enough to compare arms on two cores, far from converged.
model = dict(
    type='UNet2DModel',
    sample_size=32,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=('DownBlock2D', 'DownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'UpBlock2D', 'UpBlock2D'),
    norm_num_groups=8,
)
data = dict(type='Zip', path='data/cifar10-train.zip', resolution=32, random_flip=True)
noise_scheduler = dict(type='DDPMScheduler', num_train_timesteps=1000, beta_schedule='squaredcos_cap_v2')
train_batch_size = 16
max_train_steps = 3000
learning_rate = 5e-4
lr_warmup_steps = 200
ema_max_decay = 0.999
checkpointing_steps = 500
checkpoints_total_limit = None
validation_steps = 500
