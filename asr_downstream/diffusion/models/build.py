"""Models and schedulers of diffusers, built from configs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding
from mmengine.config import Config

from asr_downstream.console.text import some
from asr_downstream.diffusion.models.pretrained import find_model, load_whole
from asr_downstream.diffusion.models.process import FLOW, check_schedule
from asr_downstream.engine.values import Above, Count, MaxShare, check_values
from asr_downstream.errors import AsrError, PlugError
from asr_downstream.far import replace
from asr_downstream.files.configs import plain
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.plug import plug
from asr_downstream.registry import Registry, build, find

__all__ = ['build_model', 'build_scheduler', 'check_gates', 'gated', 'sample_shape']

REFUSED = 'is not one that is trained here'
MODELS = Registry('model', error=AsrError, key='model', unknown=REFUSED, typed=False)
SCHEDULERS = Registry('noise scheduler', error=AsrError, key='noise_scheduler', unknown=REFUSED, typed=False)
for each in (diffusers.UNet2DModel, diffusers.UNet2DConditionModel, diffusers.DiTTransformer2DModel):
    MODELS.register_module(module=each)
for each in (diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
    SCHEDULERS.register_module(module=each)
LATENTS = {'clip_sample': False, 'steps_offset': 1}  # of schedules of latents, see `build_scheduler`
# Values that diffusers takes, and fails on later.
Counts = Count | list[Count] | None
VALUES: dict[str, Any] = {
    **dict.fromkeys(('layers_per_block', 'sample_size', 'attention_head_dim', 'num_attention_heads'), Counts),
    **dict.fromkeys(('cross_attention_dim', 'norm_num_groups', 'num_layers', 'patch_size'), Counts),
    **dict.fromkeys(('block_out_channels',), list[Count]),
    **dict.fromkeys(('in_channels', 'out_channels'), Count | None),
    **dict.fromkeys(('num_train_timesteps',), Count | None),
    **dict.fromkeys(('beta_start', 'beta_end'), MaxShare),
    'shift': Above,
}


def build_model(config: Config, plugged: bool = True) -> Any:
    """Build the model of a config; of two configs of one seed, the plugged model has the weights of the stock one.

    Args:
        config: a diffusion config.
        plugged: whether to plug it as the config says. Attention is replaced in any case: LSTMs do not fold.

    Raises:
        AsrError: the class or an argument is not known, or a pretrained model is not there.
        PlugError: plug or replacements do not fit, or not each other.
    """
    torch.manual_seed(config.seed)
    model = make(MODELS, config.model)
    if model.config.out_channels != model.config.in_channels:
        raise AsrError(
            f'model: out_channels={model.config.out_channels} should equal in_channels={model.config.in_channels}; '
            f'a learned variance is not trained here'
        )
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block of a DiT would drop other labels, on top of the condition's drop
    if plugged and config.plug is not None:
        plug(model, plain(config.plug))
    if config.replace is not None:
        before = gated(model)
        replace(model, plain(config.replace))
        check_gates(before, model)
    return model


def gated(model: Any) -> set[str]:
    """Paths of the layers that have gates."""
    return {site.path for site in describe(model).sites}


def check_gates(before: set[str], model: Any) -> None:
    """Refuse a model that lost layers with gates together with its attention.

    Args:
        before: see `gated`; of the plugged model.
        model: the same with its attention replaced.

    Raises:
        PlugError: see above.
    """
    if gone := sorted(before - gated(model)):
        raise PlugError(
            f"replace: the gates of {some(gone)} would go with the attention; use variant='M3', which keeps output "
            f'projections, or leave these layers out of the sites of the plug'
        )


def build_scheduler(spec: dict[str, Any], latents: bool = False) -> Any:
    """Build a noise scheduler of diffusers from ``dict(type='DDPMScheduler', ...)``.

    Args:
        spec: of the config.
        latents: whether it is for latents, which do not lie in [-1, 1]: then ``clip_sample`` is off, and
            ``steps_offset`` 1, as diffusers' latent pipelines want it, unless the spec says otherwise.

    Raises:
        AsrError: the class or an argument is not known.
    """
    check_schedule(spec)
    scheduler = make(SCHEDULERS, {**LATENTS, **spec} if latents and spec.get('type') != FLOW else spec)
    check_schedule({'type': type(scheduler).__name__, **scheduler.config})
    return scheduler


def make(registry: Registry, spec: dict[str, Any]) -> Any:
    """Make an object of diffusers from its class name and arguments, or load it from a pretrained folder.

    Raises:
        AsrError: class or argument are not known, or the folder cannot be read.
    """
    arguments = plain(spec)
    pretrained = arguments.get('pretrained_model_name_or_path')
    if pretrained is None:
        known = {key: value for key, value in arguments.items() if key in VALUES}
        check_values({key: VALUES[key] for key in known}, known, str(registry.key))
        return build(registry, arguments)
    name = arguments.pop('type', None)
    cls = find(registry, name)
    if issubclass(cls, diffusers.ModelMixin):
        return load_whole(cls, str(registry.key), **find_model(arguments, name, str(registry.key)))
    try:
        return cls.from_pretrained(**arguments)
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise AsrError(f'{registry.label(name)} cannot be made from {pretrained} ({first})') from error


def sample_shape(model: Any) -> tuple[int, int, int]:
    """Shape ``(C, H, W)`` of what the model denoises."""
    size = model.config.sample_size
    if size is None:
        raise AsrError('model: sample_size should be given, it is the height and width of what is denoised')
    height, width = (size, size) if isinstance(size, int) else size
    return model.config.in_channels, height, width
