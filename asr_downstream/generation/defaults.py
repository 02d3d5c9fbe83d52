"""Every key of a diffusion config and its default. Names are those of diffusers' training scripts where they have one.

A config is a Python file that sets what differs; ``model`` and ``max_train_steps`` have no default.
"""

from __future__ import annotations

# What is trained: a class of diffusers and its arguments,
#   dict(type='UNet2DModel', sample_size=32, in_channels=3, out_channels=3, ...), or
#   dict(type='UNet2DModel', pretrained_model_name_or_path='PATH or id', subfolder='unet').
model: dict | None = None
plug: dict | list | None = None  # which attention, such as dict(type='ASR', attention=dict(type='SE', reduction=16))

# Where images come from: Digits, ImageFolder, Zip or HubDataset; path=..., resolution=..., random_flip=False,
# max_bad_share=0.01 (the share of files that may be undecodable before the run stops).
data: dict = dict(type='Digits', resolution=8)
# What the model is conditioned on: None, dict(type='ClassLabels', drop=0.1), or
# dict(type='Text', pretrained_model_name_or_path=..., drop=0.1); drop is for classifier-free guidance.
condition: dict | None = None
vae: dict | None = None  # dict(pretrained_model_name_or_path=..., subfolder='vae'): train on its latents

# What is learnt. prediction_type of the scheduler: epsilon, v_prediction or sample.
noise_scheduler: dict = dict(type='DDPMScheduler', num_train_timesteps=1000, beta_schedule='linear')
snr_gamma: float | None = None  # min-SNR weighting (arXiv 2303.09556), which recommends 5.0

# How long, and with what.
max_train_steps: int | None = None  # optimiser steps
train_batch_size: int = 64  # images a process and a forward
gradient_accumulation_steps: int = 1
learning_rate: float = 1e-4
lr_scheduler: str = 'cosine'  # constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial
lr_warmup_steps: int = 500
adam_beta1: float = 0.95
adam_beta2: float = 0.999
adam_weight_decay: float = 1e-6
adam_epsilon: float = 1e-8
max_grad_norm: float = 1.0
use_ema: bool = True
ema_max_decay: float = 0.9999
ema_inv_gamma: float = 1.0  # decay at step n = 1, 2, ...: 1 - (1 + (n - 1) / inv_gamma) ** -power
ema_power: float = 0.75
seed: int = 0

# How it runs.
mixed_precision: str | None = None  # no, fp16 or bf16; None: what accelerate was launched or configured with
gradient_checkpointing: bool = False
torch_compile: bool = False
channels_last: bool = False
dataloader_num_workers: int = 1

# What it writes.
output_dir: str | None = None  # default: work_dirs/<config name>
logging_steps: int = 10
checkpointing_steps: int = 500
checkpoints_total_limit: int | None = 3
report_to: list = ['tensorboard']  # and 'wandb'; log.jsonl is always written
validation_steps: int = 500  # steps between grids of samples, samples/step-*.png; 0: none
num_validation_images: int = 16
sampler: str = 'DDIM'  # DDPM, DDIM or DPM-Solver++
num_inference_steps: int = 50
guidance_scale: float = 1.0  # of conditioned models that were trained with drop > 0
