"""Diffusion models that `fold` has shipped: noisy images or latents and timesteps in, predictions out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asr_downstream.commands.exporting.images import open_images, tensors_of
from asr_downstream.commands.exporting.kinds.base import Kind, Request
from asr_downstream.commands.exporting.kinds.classification import batches
from asr_downstream.commands.exporting.subject import Axes, Outputs, Subject, refuse_gates
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import first_line
from asr_downstream.plugging.save import SPEC

if TYPE_CHECKING:  # needs diffusers, which exports of other models do not
    from asr_downstream.diffusion.models.process import Process

__all__ = ['Diffusion', 'subject_of']

PARTS = ('unet', 'transformer')
TEXT = 'text_encoder/config.json'
TOKENS, MOST_TOKENS = 77, 10_000
# Schedules of flows that the program beside the files does not have.
OTHER_FLOWS = (
    'use_dynamic_shifting', 'invert_sigmas', 'shift_terminal', 'use_karras_sigmas', 'use_exponential_sigmas',
    'use_beta_sigmas', 'stochastic_sampling',
)  # fmt: skip
FOLD = 'fold the training: asr-downstream fold RUN OUT'


class Diffusion(Kind):
    """A folder of diffusers with a UNet or a transformer in it."""

    name = 'diffusion'
    shipped = 'a folder of diffusers with unet/ or transformer/'

    def is_shipped(self, path: Path) -> bool:
        return any((path / part / 'config.json').is_file() for part in PARTS)

    def open(self, request: Request) -> Subject:
        import diffusers

        part = next(request.shipped / part for part in PARTS if (request.shipped / part / 'config.json').is_file())
        if (part / SPEC).is_file():
            raise AsrError(f'{part}: has gates, which {SPEC} lists; what is exported is the stock model: {FOLD}')
        try:
            name = json.loads((part / 'config.json').read_text())['_class_name']
            model = getattr(diffusers, name).from_pretrained(part, local_files_only=True).eval()
        except Exception as error:  # libraries raise anything for damaged folders
            raise CheckpointError(
                f'{part}: cannot be read ({first_line(error)[:200]}); ship the model again'
            ) from error
        refuse_gates(model, part, FOLD)
        weights = tuple(sorted(part.glob('*.safetensors')))
        return subject_of(model, request, self.name, (part / 'config.json', *weights))


def subject_of(model: Any, request: Request, kind: str, sources: tuple[Path, ...]) -> Subject:
    """Make what is exported of a model of diffusers; schedule and VAE are in folders beside its own.

    Raises:
        AsrError: the images do not fit it.
    """
    import diffusers

    settings, folder = model.config, request.shipped
    channels, size = settings.in_channels, settings.sample_size
    size = size if isinstance(size, int) else size[0]
    draw = torch.Generator().manual_seed(0)
    data, given = 'random numbers', torch.randn(8, channels, size, size, generator=draw)
    process = process_in(folder / 'scheduler') if (folder / 'scheduler').is_dir() else None
    vae = diffusers.AutoencoderKL.from_pretrained(folder / 'vae').eval() if (folder / 'vae').is_dir() else None
    if request.data is not None:
        scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        images = open_images(request.data, size * scale, channels if vae is None else vae.config.in_channels)
        given, used = tensors_of(images, request.images)
        data = f'{len(used)} images of {request.data}, with noise'
        if vae is not None:
            with torch.no_grad():
                given = vae.encode(given).latent_dist.mode() * vae.config.scaling_factor
    timesteps = timesteps_of(process, len(given))
    if request.data is not None and process is not None:
        given = process.noisy(given, torch.randn(given.shape, generator=draw), timesteps)
    others = {'timestep': timesteps, **condition_of(model, len(given), draw, tokens_in(folder))}
    name = 'hidden_states' if type(model).__name__.startswith('DiT') else 'sample'
    calls = batches(given, name, **others)
    batch: Axes = {key: {0: ('batch', 1)} for key in calls[0]}
    axes: tuple[Axes, ...] = (batch,)
    if name == 'sample':
        multiple = 2 ** (len(settings.block_out_channels) - 1)
        axes = ({**batch, name: {0: ('batch', 1), 2: ('height', multiple), 3: ('width', multiple)}}, batch)
        calls.append({key: larger(value, multiple) if key == name else value for key, value in calls[1].items()})
    return Subject(
        kind=kind,
        name=type(model).__name__,
        model=Outputs(model, lambda model, **inputs: {'prediction': model(**inputs, return_dict=False)[0]}, calls[0]),
        calls=calls,
        axes=axes,
        sources=sources,
        data=data,
        infer=sampler_of(process, [channels, size, size]) if vae is None and len(calls[0]) == 2 else None,
    )


def process_in(folder: Path) -> Process:
    """What a shipped scheduler belongs to: diffusion, or a flow, also where another solver runs it.

    Raises:
        CheckpointError: the folder is damaged.
    """
    import diffusers

    from asr_downstream.diffusion.models.process import FLOW, process_of

    try:
        config = json.loads((folder / 'scheduler_config.json').read_text())
        is_flow = config['_class_name'] == FLOW or config.get('use_flow_sigmas')
        kind = diffusers.FlowMatchEulerDiscreteScheduler if is_flow else diffusers.DDPMScheduler
        return process_of(kind.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # libraries raise anything for damaged folders
        raise CheckpointError(f'{folder}: cannot be read ({first_line(error)[:200]}); ship the model again') from error


def timesteps_of(process: Process | None, count: int) -> Tensor:
    """Timesteps from the first to the last: whole numbers, of a flow fractions."""
    if process is not None and process.dtype.is_floating_point:
        return torch.linspace(1, process.timesteps, count)
    return torch.linspace(0, (process.timesteps if process else 1000) - 1, count).round().long()


def tokens_in(folder: Path) -> int:
    """Length of the prompts that the shipped tokenizer gives; that of CLIP where there is none."""
    for name, key in (('tokenizer/tokenizer_config.json', 'model_max_length'), (TEXT, 'max_position_embeddings')):
        try:
            found = json.loads((folder / name).read_text()).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, int) and 0 < found < MOST_TOKENS:  # a tokenizer without a limit says 10 to the 30
            return found
    return TOKENS


def condition_of(model: Any, count: int, draw: torch.Generator, tokens: int) -> dict[str, Tensor]:
    """Random classes and random states of a text encoder, for a model that takes them."""
    settings, found = model.config, {}
    embedding: Any = getattr(model, 'class_embedding', None)
    classes = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else settings.get('num_embeds_ada_norm')
    if classes:
        found['class_labels'] = torch.randint(0, classes, (count,), generator=draw)
    if settings.get('cross_attention_dim') and type(model).__name__ == 'UNet2DConditionModel':
        width = settings.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        found['encoder_hidden_states'] = torch.randn(count, tokens, width, generator=draw)
    return found


def larger(image: Tensor, multiple: int) -> Tensor:
    """A larger image, by repeating the first rows and columns."""
    image = torch.cat([image, image[..., :multiple, :]], dim=-2)
    return torch.cat([image, image[..., : 2 * multiple]], dim=-1)


def sampler_of(process: Process | None, shape: list[int]) -> tuple[str, dict[str, Any]] | None:
    """What a program that samples has to know: the schedule, and the shape of images; None: it cannot sample so."""
    if process is None or shape[0] not in (1, 3):
        return None
    scheduler = process.scheduler
    if process.dtype.is_floating_point:  # a flow
        if any(scheduler.config.get(key) for key in OTHER_FLOWS):
            return None
        ends = {key: float(getattr(scheduler, key)) for key in ('sigma_max', 'sigma_min', 'shift')}
        return 'sample', {'prediction_type': 'flow', 'timesteps': process.timesteps, **ends, 'shape': shape}
    return 'sample', {
        'alphas_cumprod': scheduler.alphas_cumprod.double().tolist(),
        'prediction_type': scheduler.config.prediction_type,
        'clip_sample': bool(scheduler.config.clip_sample),
        'shape': shape,
    }
