"""The model card of a shipped folder: what it is, how it was trained, what folding changed, how to load it."""

from __future__ import annotations

from typing import Any

from asr_downstream.generation.conditions import ClassLabels, Text
from asr_downstream.generation.results import Result, tables
from asr_downstream.generation.runs import Run

__all__ = ['model_card']

TRAINING = (
    'max_train_steps', 'train_batch_size', 'gradient_accumulation_steps', 'learning_rate', 'lr_scheduler',
    'lr_warmup_steps', 'snr_gamma', 'use_ema', 'mixed_precision', 'seed',
)  # fmt: skip

PIPELINE = """from diffusers import {name}

pipeline = {name}.from_pretrained('THIS FOLDER')
{call}"""
CALLS = {
    'DDPMPipeline': 'images = pipeline(batch_size=16, num_inference_steps=1000).images',
    # guidance needs ImageNet's number of classes, which is written into that pipeline
    'DiTPipeline': "labels = pipeline.get_label_ids(['{label}'])\n"
    'images = pipeline(labels, guidance_scale=1, num_inference_steps=50).images',
    'StableDiffusionPipeline': "images = pipeline('{prompt}', num_inference_steps=50).images",
}
LOOP = """import torch
from diffusers import {model}, DDIMScheduler

model = {model}.from_pretrained('THIS FOLDER', subfolder='{part}').eval()
scheduler = DDIMScheduler.from_pretrained('THIS FOLDER', subfolder='scheduler')
scheduler.set_timesteps(50)
x = torch.randn(4, {shape})
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(4){arguments}).sample, t, x).prev_sample
{images}"""


def model_card(run: Run, report: dict[str, Any], results: list[Result], part: str) -> str:
    """Text of ``README.md``.

    Args:
        run: that was shipped.
        report: of the fold.
        results: of evaluations of this checkpoint.
        part: name of the folder of the model.
    """
    config = run.config
    training = '\n'.join(f'| {key} | {config[key]} |' for key in TRAINING)
    measured = f'```\n{tables(results)}\n```' if results else 'Not evaluated.'
    data = {k: v for k, v in config.data.items() if k != 'path'}
    return f"""---
library_name: diffusers
tags: [diffusion, {part}]
---
# {run.folder.name}

A stock `{report['model']}` of diffusers with {report['parameters']['shipped']:,} parameters. It was trained with the
attention below, whose gates were folded into the weights afterwards: nothing but diffusers is needed to run it.

![samples](samples.png)

```python
{usage(run, report, part)}
```

## Training
Step {run.step} of a training on `{data}`, {'averaged weights' if run.ema else 'weights as trained'}.

| | |
|---|---|
| model | `{dict(config.model)}` |
| plug | `{report['plug']}` |
| noise schedule | `{dict(config.noise_scheduler)}` |
{training}

## Folding
{folding(report)}

## Measured
{measured}
"""


def folding(report: dict[str, Any]) -> str:
    """What folding changed."""
    sites, plugged = len(report['sites']), report['parameters']['plugged']
    text = f'{sites} sites were folded; while it trained the model had {plugged:,} parameters.\n'
    if report['difference'] is None:
        change = report['calibration']['output_change']
        return text + (
            f'Gates that depended on the input were replaced by their mean over training images. That changes the '
            f'predictions of the model by {change:.2%} (root mean square).'
        )
    rows = '\n'.join(f'| {p} | {d["model"]:.1e} | {d["sample"]:.1e} |' for p, d in report['difference'].items())
    return text + (
        'The folded model against the trained one, largest difference (of a forward: relative to the largest output; '
        f'of a DDIM sample of ten steps: in [0, 1]):\n\n| precision | forward | sample |\n|---|---|---|\n{rows}'
    )


def usage(run: Run, report: dict[str, Any], part: str) -> str:
    """Code that loads and samples."""
    from asr_downstream.generation.shipping import pipeline_of

    condition = run.parts.condition
    pipeline = pipeline_of(run, run.parts.model)
    if pipeline is not None and not (isinstance(condition, ClassLabels) and part == 'unet'):
        name = type(pipeline).__name__
        label = condition.classes[0] if condition.classes else ''
        return PIPELINE.format(name=name, call=CALLS[name].format(label=label, prompt=condition.caption(0)))
    arguments = ''
    if isinstance(condition, ClassLabels):
        arguments = ', class_labels=torch.tensor([0, 1, 2, 3])'
    elif isinstance(condition, Text):
        arguments = ', encoder_hidden_states=embeddings'
    images = 'images = (x / 2 + 0.5).clamp(0, 1)' if run.parts.vae is None else '# decode x with the VAE in vae/'
    return LOOP.format(
        model=report['model'],
        part=part,
        shape=', '.join(map(str, run.parts.shape)),
        arguments=arguments,
        images=images,
    )
