"""Every key of a FAR config beyond those that every training has, and its default; and other defaults of some.

A config is a Python file that sets what differs; ``teacher`` and ``stages`` have no default. A stage is a dict with a
``name`` and any keys of this file or of `asr_downstream.engine.defaults`, which hold for that stage alone.
"""

from __future__ import annotations

from typing import Literal

from asr_downstream.engine.values import Above, AtLeast, Count, Finite, Number, Part

# What the model is for. Classification: an image classifier of transformers on labelled images. Denoising: a run of
# diffusion/train.py, whose data, noise schedule and condition are used.
task: dict = dict(type='Classification')
# The model whose attention is replaced. Classification: a class of transformers and its arguments,
#   dict(type='ViTForImageClassification', image_size=32, patch_size=4, hidden_size=96, ...), or
#   dict(type='DeiTForImageClassification', pretrained_model_name_or_path='PATH or id').
# Denoising: dict(run='work_dirs/unet-w32-attn_digits').
teacher: dict | None = None
# See asr_downstream.far.replace; scan='cross' reads columns too, mixer='linear' is linear attention, a control.
replace: dict = dict(type='FAR', variant='M3', layers='all')

# Labelled images: see asr_downstream.engine.defaults; labels are those of the source, such as its folders.
holdout: Part = 0.1  # share of the images that is only validated on; the same images for every seed
images_per_class: Count | None = None  # the first so many of each class are trained on; None: all
# Where decoded images are: 'files', decoded each time; 'memory'; or 'device', where augment then happens as well.
images_in: Literal['files', 'memory', 'device'] = 'files'
augment: list[dict] = []  # of training images, in this order: dict(type='Flip'), dict(type='Crop', padding=4), ...
image_mean: list[Finite] | None = None  # of images in [0, 1], a number a channel; None: images in [-1, 1]
image_std: list[Above] | None = None

# How it is trained.
stages: list[dict] = []
# What learns: 'blocks' are those whose attention was replaced.
learns: Literal['teacher', 'replacements', 'blocks', 'all'] = 'replacements'
task_weight: AtLeast = 1.0  # of the loss of the task
# Between replaced and original: dict(type='MSE' or 'Cosine', feature='heads', 'attention' or 'block', weight=1.0);
# Cosine has axis='tokens' or 'channels'. Of classifiers also dict(type='KL', temperature=2.0), of their logits. A list
# of several is their sum. None: no teacher.
distance: dict | list[dict] | None = None
# How tools/prune_far.py trains, as stages do: sparse, with the regulariser, and then finetune, each pruned member.
prune: dict[str, dict] = dict(sparse=dict(learns='all', hoyer=1e-2), finetune=dict(learns='all'))
hoyer: AtLeast = 0.0  # weight of the Hoyer-square regulariser over hidden units, before pruning
max_train_steps: Count | None = 1000  # optimiser steps
epochs: Above | None = None  # instead of max_train_steps
warmup_epochs: AtLeast | None = None  # instead of lr_warmup_steps
lr_warmup_steps: Number = 0
adam_weight_decay: AtLeast = 0.05  # of matrices; biases and norms have none
validation_steps: Number = 500
