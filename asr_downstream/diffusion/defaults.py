"""The keys of a diffusion config besides those of every training, `asr_downstream.engine.defaults`, and their defaults.

A config is a Python file that sets what differs; ``model`` and ``max_train_steps`` have no default. Names are those of
diffusers' training scripts where they have one.
"""

from __future__ import annotations

from typing import Literal

from asr_downstream.engine.values import Above, AtLeast, Count, Finite, Limit, Number, Share

DEFAULT_SCHEDULE = dict(type='DDPMScheduler', num_train_timesteps=1000, beta_schedule='linear')

# What is trained: a class of diffusers and its arguments,
#   dict(type='UNet2DModel', sample_size=32, in_channels=3, out_channels=3, ...), or
#   dict(type='UNet2DModel', pretrained_model_name_or_path='PATH or id').
# Of a pipeline the part of this class is found; subfolder='...' names another one.
model: dict | None = None
plug: dict | list | None = None  # which attention, such as dict(type='ASR', attention=dict(type='SE', reduction=16))
# Which self-attention is replaced by LSTMs, after the plug: dict(type='FAR', variant='M3', layers='all'), see
# asr_downstream.far.replace. tools/distill_far.py writes it into the configs of its stages.
replace: dict | None = None
# What learns: 'all', 'gates' (with a plug; preserve=True starts from the base), 'norms', 'bias', several with +,
# patterns of names of weights, or a list of these. The rest is frozen.
learns: str | list[str] = 'all'

# What the model is conditioned on: None, dict(type='ClassLabels', drop=0.1), or
# dict(type='Text', pretrained_model_name_or_path=..., drop=0.1); drop is for classifier-free guidance.
condition: dict | None = None
vae: dict | None = None  # dict(pretrained_model_name_or_path=..., subfolder='vae'): train on its latents

# What is learnt: dict(type='DDPMScheduler', prediction_type=...) of epsilon, v_prediction, sample; or flow matching,
# dict(type='FlowMatchEulerDiscreteScheduler', shift=1.0), whose model predicts noise - image. None, and keys that are
# not given: those of the pipeline of a pretrained model, which they may not contradict; without one DEFAULT_SCHEDULE.
noise_scheduler: dict | None = None
snr_gamma: Limit | None = None  # min-SNR weighting (arXiv 2303.09556), which recommends 5.0
# Timesteps of flow matching, as in diffusers' script of SD3: logit_normal (None), mode, or uniform, with a loss that is
# weighted by sigma_sqrt, cosmap or none.
weighting_scheme: Literal['logit_normal', 'mode', 'none', 'sigma_sqrt', 'cosmap'] | None = None
logit_mean: Finite = 0.0
logit_std: Above = 1.0
mode_scale: Finite = 1.29

# Other defaults than those of the engine.
adam_beta1: Share = 0.95
adam_weight_decay: AtLeast = 1e-6
max_grad_norm: Limit | None = 1.0
use_ema: bool = True

# Steps between pipelines, pipeline-<step> beside the checkpoints: folded, and at the last step too; a multiple of
# checkpointing_steps, of which checkpoints_total_limit stay; 0: none.
save_pipeline_steps: Number = 0

# A validation is a grid of samples, samples/step-*.png.
validate_at_start: bool | None = (
    None  # also before the first step; None: of pretrained models, whose grid says something
)
num_validation_images: Count = 16
sampler: Literal['DDPM', 'DDIM', 'DPM-Solver++', 'Euler'] | None = None  # None: DDIM, of flow matching Euler
sampler_kwargs: dict = {}  # of the sampler in diffusers: dict(thresholding=True) clips DPM-Solver++, for pixels alone
num_inference_steps: Count = 50
guidance_scale: Finite = 1.0  # of conditioned models that were trained with drop > 0
