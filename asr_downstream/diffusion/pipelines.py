"""Which pipeline of diffusers holds a trained model, and the code that runs it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from asr_downstream.diffusion.models.conditions import ClassLabels, Condition, Text
from asr_downstream.diffusion.models.process import FLOW, Flow
from asr_downstream.diffusion.runs import Run

__all__ = ['folder_of', 'loop', 'pipeline_name', 'pipeline_of', 'quoted', 'usage']


def pipeline_name(run: Run) -> str | None:
    """Class of diffusers; None: it has none that runs this combination of model, latents and condition."""
    vae, condition = run.parts.vae, run.parts.condition
    kind = type(run.parts.model).__name__
    if kind == 'UNet2DModel' and vae is None and type(condition) is Condition:
        return 'DDPMPipeline'
    if vae is None or vae.config.shift_factor:  # the pipelines below would leave it out
        return None
    if kind == 'DiTTransformer2DModel' and isinstance(condition, ClassLabels):
        return 'DiTPipeline'
    if kind == 'UNet2DConditionModel' and isinstance(condition, Text):
        return 'StableDiffusionPipeline'
    return None


def pipeline_of(run: Run, model: nn.Module) -> Any | None:
    """Pipeline with a stock model of a run, or None, see `pipeline_name`."""
    name = pipeline_name(run)
    scheduler = run.parts.process.shipped(name)
    vae, condition = run.parts.vae, run.parts.condition
    if name == 'DDPMPipeline':
        return diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    if name == 'DiTPipeline':
        names = {str(number): label for number, label in enumerate(condition.classes)}
        pipeline = diffusers.DiTPipeline(transformer=model, vae=vae, scheduler=scheduler, id2label=names)
        pipeline.register_to_config(id2label=names)  # else it is not saved
        return pipeline
    if name == 'StableDiffusionPipeline':
        assert isinstance(condition, Text)
        return diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=condition.encoder,
            tokenizer=condition.tokenizer,
            unet=model,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return None


def folder_of(model: nn.Module) -> str:
    """Name that diffusers gives the folder of a model."""
    return 'transformer' if type(model).__name__.startswith('DiT') else 'unet'


def usage(run: Run) -> str:
    """Python code that loads a shipped folder and samples."""
    name = pipeline_name(run)
    if name is None:
        return loop(run)
    lines = [f'from diffusers import {name}', '', f"pipeline = {name}.from_pretrained('THIS FOLDER')"]
    condition, timesteps = run.parts.condition, run.parts.scheduler.config.num_train_timesteps
    steps, guidance = min(50, timesteps), run.config.guidance_scale
    if name == 'DDPMPipeline':
        most = steps if isinstance(run.parts.process, Flow) else timesteps
        lines.append(f'images = pipeline(batch_size=16, num_inference_steps={most}).images')
    elif name == 'DiTPipeline':
        lines += [
            f'labels = pipeline.get_label_ids([{quoted(condition.caption(0))}])',
            '# other than 1 needs the 1,000 classes of ImageNet, whose number is written into this pipeline',
            f'images = pipeline(labels, guidance_scale=1, num_inference_steps={steps}).images',
        ]
    else:
        prompt = f'{quoted(condition.caption(0))}, guidance_scale={guidance}, num_inference_steps={steps}'
        lines.append(f'images = pipeline({prompt}).images')
    return '\n'.join(lines)


def quoted(text: str) -> str:
    """Python literal of a text that can stand in a comment, a table and a code block of Markdown."""
    return repr(text).replace('`', '\\x60').replace('|', '\\x7c')


def literal(given: dict[str, Any]) -> str:
    """Arguments of a model as code; of large tensors, which only the condition can make, the shape."""
    rows = []
    for key, value in given.items():
        small = value.numel() <= 64
        code = f'torch.tensor({value.tolist()})' if small else f'torch.zeros({tuple(value.shape)})'
        rows.append(f'{quoted(key)}: {code}')
    return f'{{{", ".join(rows)}}}'


def loop(run: Run) -> str:
    """Code for what diffusers has no pipeline for; with guidance, if the run was trained for it."""
    model, condition = type(run.parts.model).__name__, run.parts.condition
    part = folder_of(run.parts.model)
    sampler = FLOW if isinstance(run.parts.process, Flow) else 'DDIMScheduler'
    lines = ['import torch', f'from diffusers import {model}, {sampler}']
    call = ''
    prepare = []
    if isinstance(condition, ClassLabels):
        call = 'class_labels={}'
        labels = [number % len(condition.classes) for number in range(4)]
        names = ', '.join(quoted(condition.classes[label]) for label in labels)
        prepare = [f'given = torch.tensor({labels})  # {names}']
        nothing = f'nothing = torch.full_like(given, {len(condition.classes)})  # the null class'
    elif isinstance(condition, Text):
        call = 'encoder_hidden_states={}'
        lines.append('from transformers import CLIPTextModel, CLIPTokenizer')
        tokens = "tokenizer({}, padding='max_length', truncation=True, return_tensors='pt').input_ids"
        prepare = [
            "tokenizer = CLIPTokenizer.from_pretrained('THIS FOLDER', subfolder='tokenizer')",
            "encoder = CLIPTextModel.from_pretrained('THIS FOLDER', subfolder='text_encoder')",
            f'prompts = [{quoted(condition.caption(0))}] * 4',
            f'given = encoder({tokens.format("prompts")}).last_hidden_state.detach()',
        ]
        empty = tokens.format("[''] * 4")
        nothing = f'nothing = encoder({empty}).last_hidden_state.detach()'
    elif type(condition) is not Condition:  # of a user
        call = '**{}'
        prepare = [f'given = {literal(condition.arguments(condition.of_samples(range(4))))}']
        drop = condition.arguments(condition.of_samples(range(4)), torch.ones(4, dtype=torch.bool))
        nothing = f'nothing = {literal(drop)}'
    predict = f'model(x, t.expand(4){", " if call else ""}{call.format("given")}).sample'
    step = [f'        x = scheduler.step({predict}, t, x).prev_sample']
    if condition.drop:
        scale = run.config.guidance_scale
        prepare += [nothing, f'guidance = {scale if scale != 1 else 2.0}  # 1: none']
        step = [
            f'        predicted = {predict}',
            f'        without = {predict.replace("given", "nothing")}',
            '        x = scheduler.step(without + guidance * (predicted - without), t, x).prev_sample',
        ]
    finish = ['images = (x / 2 + 0.5).clamp(0, 1)']
    if run.parts.vae is not None:
        lines[1] += ', AutoencoderKL'
        shift = f' + {run.parts.vae.config.shift_factor}' if run.parts.vae.config.shift_factor else ''
        finish = [
            "vae = AutoencoderKL.from_pretrained('THIS FOLDER', subfolder='vae')",
            f'images = (vae.decode(x / vae.config.scaling_factor{shift}).sample.detach() / 2 + 0.5).clamp(0, 1)',
        ]
    steps = min(50, run.parts.scheduler.config.num_train_timesteps)
    return '\n'.join(
        [
            *lines,
            '',
            f"model = {model}.from_pretrained('THIS FOLDER', subfolder='{part}').eval()",
            f"scheduler = {sampler}.from_pretrained('THIS FOLDER', subfolder='scheduler')",
            f'scheduler.set_timesteps({steps})',
            *prepare,
            f'x = torch.randn(4, {", ".join(map(str, run.parts.shape))})',
            'with torch.no_grad():',
            '    for t in scheduler.timesteps:',
            *step,
            *finish,
        ]
    )
