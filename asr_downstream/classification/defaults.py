"""The keys of a classification config besides those of every training, `asr_downstream.engine.defaults`.

A config is a Python file that sets what differs; ``model`` has no default. The optimiser is that of the papers: SGD at
0.1, and all weights decay.
"""

from __future__ import annotations

from typing import Literal

from asr_downstream.engine.values import Above, AtLeast, Count, Finite, Number, Part

# What is trained: dict(type='ResNet', depth=20, block='basic'), or a class of your own that takes num_classes, see
# asr_downstream.classification.models. num_classes is that of the data.
model: dict | None = None
plug: dict | list | None = None  # which attention, such as dict(type='ASR', attention=dict(type='SE', reduction=16))

# Labelled images: see asr_downstream.engine.defaults; labels are those of the source, such as its folders.
channels: Literal[1, 3, 4] = 3  # of the images: grey, RGB, RGBA
holdout: Part = 0.1  # share of the images that is only validated on; the same images for every seed
images_per_class: Count | None = None  # the first so many of each class are trained on; None: all
# Where decoded images are: 'files', decoded each time; 'memory'; or 'device', where augment then happens as well.
images_in: Literal['files', 'memory', 'device'] = 'files'
augment: list[dict] = []  # of training images, in this order: dict(type='Flip'), dict(type='Crop', padding=4), ...
image_mean: list[Finite] | None = None  # of images in [0, 1], a number a channel; None: images in [-1, 1]
image_std: list[Above] | None = None

# How it is trained.
max_train_steps: Count | None = 1000  # optimiser steps
epochs: Above | None = None  # instead of max_train_steps
warmup_epochs: AtLeast | None = None  # instead of lr_warmup_steps
validation_epochs: Above | None = None  # instead of validation_steps
train_batch_size: Count = 128
optimizer: Literal['adamw', 'sgd'] = 'sgd'
learning_rate: Above = 0.1
weight_decay: AtLeast | None = 1e-4
lr_warmup_steps: Number = 0
