# python diffusion/train.py diffusion/configs/dit-w64-flow_digits.py
# A small DiT (0.39 M parameters) on the classes of the digits, by flow matching, in pixels.
model = dict(
    type='DiTTransformer2DModel',
    sample_size=8,
    in_channels=1,
    out_channels=1,
    patch_size=2,
    num_layers=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_embeds_ada_norm=10,
    norm_num_groups=8,
)
condition = dict(type='ClassLabels', drop=0.1)
data = dict(type='Digits', resolution=8)
noise_scheduler = dict(type='FlowMatchEulerDiscreteScheduler', num_train_timesteps=1000)
train_batch_size = 64
max_train_steps = 2000
learning_rate = 1e-3
lr_warmup_steps = 100
ema_max_decay = 0.995
validation_steps = 500
num_validation_images = 20
num_inference_steps = 25
guidance_scale = 1.5
