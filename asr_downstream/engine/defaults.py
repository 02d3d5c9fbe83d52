"""The keys that every training has, and their defaults. Names are those of diffusers' training scripts.

A kind of training adds keys of its own, and may have other defaults.
"""

from __future__ import annotations

from typing import Literal

from asr_downstream.engine.values import Above, AtLeast, Count, Limit, MaxShare, Number, Seed, Share

# Modules that register what is named below: dict(imports=['mypackage.data']). See docs/extending.md.
custom_imports: dict | None = None

# Where images come from: Digits, ImageFolder, Zip or HubDataset; path=..., resolution=..., random_flip=False,
# max_bad_share=0.01 (the share of files that may be undecodable before the run stops). Of a folder or zip, a part:
# classes=['cat', 'dog'], whose numbers are 0 and 1 in that order; subset=1000 images, or subset='train/*' by path.
data: dict = dict(type='Digits', resolution=8)

# How long, and with what.
max_train_steps: Count | None = None  # optimiser steps
train_batch_size: Count = 64  # images a process and a forward
gradient_accumulation_steps: Count = 1
learning_rate: Above = 1e-4
lr_scheduler: Literal[
    'constant', 'constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial',
    'cosine_with_min_lr', 'cosine_warmup_with_min_lr', 'step',
] = 'cosine'  # fmt: skip
lr_warmup_steps: Number = 500
# Of the schedule: num_cycles, power, lr_end, min_lr or min_lr_rate, warmup_lr_rate; of 'step' milestones=[0.5, 0.75],
# as shares of all steps or as steps, and gamma=0.1.
lr_scheduler_kwargs: dict = {}
optimizer: Literal['adamw', 'adamw8bit', 'sgd', 'adafactor'] = 'adamw'  # adamw8bit needs bitsandbytes
weight_decay: AtLeast | None = None  # None: adam_weight_decay with adamw and adamw8bit, 0 with others
momentum: Share = 0.9  # of sgd
nesterov: bool = False  # of sgd
adam_beta1: Share = 0.9
adam_beta2: Share = 0.999
adam_weight_decay: AtLeast = 0.05
adam_epsilon: AtLeast = 1e-8
max_grad_norm: Limit | None = None  # None or inf: gradients are measured, not clipped
use_ema: bool = False
ema_max_decay: MaxShare = 0.9999
ema_inv_gamma: Above = 1.0  # decay at step n = 1, 2, ...: 1 - (1 + (n - 1) / inv_gamma) ** -power
ema_power: AtLeast = 0.75
seed: Seed = 0

# How it runs.
mixed_precision: Literal['no', 'fp16', 'bf16'] | None = None  # None: what accelerate was launched or configured with
gradient_checkpointing: bool = False
torch_compile: bool = False
channels_last: bool = False
dataloader_num_workers: Number = 1

# What it writes.
output_dir: str | None = None  # default: work_dirs/<config name>
logging_steps: Count = 10
checkpointing_steps: Count = 500
checkpoints_total_limit: Count | None = 3
report_to: list[Literal['tensorboard', 'wandb', 'trackio']] = ['tensorboard']  # log.jsonl is always written
validation_steps: Number = 500  # steps between validations; 0: none
validate_at_start: bool = False  # also before the first step: the baseline
gate_steps: Number = 0  # steps between lines of gates.jsonl, for `asr-downstream analyze stripes`; 0: none
