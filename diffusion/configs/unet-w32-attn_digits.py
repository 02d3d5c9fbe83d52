# python diffusion/train.py diffusion/configs/unet-w32-attn_digits.py
# unet-w32_digits.py with self-attention where there are 4x4 pixels, 16 tokens: 4 of them, of 8 heads each.
model = dict(
    type='UNet2DModel',
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
    attention_head_dim=8,
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
