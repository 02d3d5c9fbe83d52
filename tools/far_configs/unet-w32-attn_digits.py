# The UNet of diffusion/configs/unet-w32-attn_digits.py, 4 self-attentions over 16 tokens; all of them replaced.
#   accelerate launch diffusion/train.py diffusion/configs/unet-w32-attn_digits.py
#   python tools/distill_far.py tools/far_configs/unet-w32-attn_digits.py
#   python tools/prune_far.py tools/far_configs/unet-w32-attn_digits.py --keep 0.5
task = dict(type='Denoising')
teacher = dict(run='work_dirs/unet-w32-attn_digits')
replace = dict(type='FAR', variant='M3', layers='all')
train_batch_size = 64
learning_rate = 2e-3
adam_weight_decay = 1e-6
max_grad_norm = 1.0
use_ema = True
ema_max_decay = 0.99
validation_steps = 200
checkpointing_steps = 200
dataloader_num_workers = 0
report_to = []
stages = [
    dict(
        name='distill',
        learns='replacements',
        distance=dict(type='MSE', feature='heads'),
        max_train_steps=400,
        lr_warmup_steps=20,
    ),
    dict(name='finetune', learns='all', learning_rate=5e-4, max_train_steps=200, lr_warmup_steps=20),
]
prune = dict(
    sparse=dict(learns='all', hoyer=1e-3, learning_rate=5e-4, max_train_steps=200, lr_warmup_steps=20),
    finetune=dict(learns='all', learning_rate=1e-3, max_train_steps=200, lr_warmup_steps=20),
)
