"""The keys that every training has, and their defaults. Names are those of diffusers' training scripts.

A kind of training adds keys of its own, and may have other defaults.
"""

from __future__ import annotations

# Where images come from: Digits, ImageFolder, Zip or HubDataset; path=..., resolution=..., random_flip=False,
# max_bad_share=0.01 (the share of files that may be undecodable before the run stops).
data: dict = dict(type='Digits', resolution=8)

# How long, and with what.
max_train_steps: int | None = None  # optimiser steps
train_batch_size: int = 64  # images a process and a forward
gradient_accumulation_steps: int = 1
learning_rate: float = 1e-4
# constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, cosine_with_min_lr or
# cosine_warmup_with_min_lr
lr_scheduler: str = 'cosine'
lr_warmup_steps: int = 500
lr_scheduler_kwargs: dict = {}  # of the schedule: num_cycles, power, lr_end, min_lr or min_lr_rate, warmup_lr_rate
adam_beta1: float = 0.9
adam_beta2: float = 0.999
adam_weight_decay: float = 0.05
adam_epsilon: float = 1e-8
max_grad_norm: float | None = None  # None: gradients are measured, not clipped
use_ema: bool = False
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
validation_steps: int = 500  # steps between validations; 0: none
