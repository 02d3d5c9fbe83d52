# python diffusion/train.py diffusion/configs/unet-w32_digits.py
# Handwritten digits of 8x8 pixels, which need no download.
model = dict(
    type='UNet2DModel',
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=('DownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'UpBlock2D'),
    norm_num_groups=8,
)
data = dict(type='Digits', resolution=8)
noise_scheduler = dict(type='DDPMScheduler', num_train_timesteps=1000, beta_schedule='squaredcos_cap_v2')
train_batch_size = 64
max_train_steps = 2000
learning_rate = 2e-3
lr_warmup_steps = 100
ema_max_decay = 0.995
validation_steps = 500
