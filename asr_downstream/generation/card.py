"""The model card of a shipped folder: what it is, how it was trained, what folding changed, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_downstream.generation.pipelines import folder_of, usage
from asr_downstream.generation.results import Result, tables
from asr_downstream.generation.runs import Run

__all__ = ['model_card']

TRAINING = (
    'max_train_steps', 'train_batch_size', 'gradient_accumulation_steps', 'learning_rate', 'lr_scheduler',
    'lr_warmup_steps', 'snr_gamma', 'use_ema', 'mixed_precision', 'seed',
)  # fmt: skip


def model_card(run: Run, report: dict[str, Any], results: list[Result]) -> str:
    """Text of ``README.md``.

    Args:
        run: that was shipped.
        report: of the fold.
        results: of evaluations of this checkpoint.
    """
    config = run.config
    training = '\n'.join(f'| {key} | {config[key]} |' for key in TRAINING)
    measured = f'```\n{tables(results)}\n```' if results else 'Not evaluated.'
    data = {k: Path(v).name if k == 'path' else v for k, v in config.data.items()}
    return f"""---
library_name: diffusers
tags: [diffusion, {folder_of(run.parts.model)}]
---
# {run.folder.name}

A stock `{report['model']}` of diffusers with {report['parameters']['shipped']:,} parameters. It was trained with the
attention below, whose gates were folded into the weights afterwards: nothing but diffusers is needed to run it.

![samples](samples.png)

```python
{usage(run)}
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
