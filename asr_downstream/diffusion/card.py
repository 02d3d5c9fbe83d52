"""The model card of a shipped folder: what it is, how it was trained, what folding changed, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.diffusion.evaluation.results import Result, tables
from asr_downstream.diffusion.models.conditions import ClassLabels
from asr_downstream.diffusion.pipelines import folder_of, loop, pipeline_name, quoted, usage
from asr_downstream.diffusion.runs import Run
from asr_downstream.files.card import card_text, measured

__all__ = ['Metadata', 'far_card', 'model_card']

TRAINING = (
    'max_train_steps', 'train_batch_size', 'gradient_accumulation_steps', 'learning_rate', 'lr_scheduler',
    'lr_warmup_steps', 'snr_gamma', 'weighting_scheme', 'use_ema', 'mixed_precision', 'seed',
)  # fmt: skip
TASKS = {'DDPMPipeline': 'unconditional-image-generation', 'StableDiffusionPipeline': 'text-to-image'}
HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')


@dataclass(frozen=True)
class Metadata:
    """What the head of a card says besides what is always known; nothing is guessed.

    Attributes:
        license: such as ``'apache-2.0'``.
        base_model: id of the model that the training started from.
        datasets: ids of the data.
        tags: further ones.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def of(self, config: Config) -> Metadata:
        """Fill in ids of the hub that a config names; folders of a disk say nothing to others."""
        base = config.model.get('pretrained_model_name_or_path')
        data = config.data.get('path') if config.data.get('type') == 'HubDataset' else None
        return replace(
            self,
            base_model=self.base_model or (base if is_hub_id(base) else None),
            datasets=self.datasets or ((str(data),) if is_hub_id(data) else ()),
        )

    def given(self) -> dict[str, Any]:
        """What there is of it, see `asr_downstream.files.card.card_of`."""
        found = {
            'license': self.license,
            'base_model': self.base_model,
            'datasets': list(self.datasets),
            'tags': list(self.tags),
        }
        return {key: value for key, value in found.items() if value}


def is_hub_id(path: Any) -> bool:
    """Whether a path is an id such as ``'google/ddpm-cat-256'`` and nothing on this disk."""
    return isinstance(path, str) and HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def model_card(run: Run, report: dict[str, Any], results: list[Result], metadata: Metadata) -> str:
    """Text of ``README.md``.

    Args:
        run: that was shipped.
        report: of the fold.
        results: of evaluations of this checkpoint.
        metadata: of its head.
    """
    name = pipeline_name(run)
    numbers = f'```\n{tables(results)}\n```' if results else 'Not evaluated.'
    attention = (
        'It was trained with the attention below, whose gates were folded into the weights afterwards: nothing'
        if report['sites'] or report['calibration']
        else 'It was trained as it is: nothing'
    )
    guided = ''
    if name == 'DiTPipeline' and run.parts.condition.drop:
        guided = (
            f'\nWith guidance, which `DiTPipeline` has for the 1,000 classes of ImageNet only:\n\n{block(loop(run))}\n'
        )
    tags = ('diffusion', folder_of(run.parts.model))
    count = f'{report["parameters"]["shipped"]:,} parameters'
    text = f"""# {run.folder.name}

A stock `{report['model']}` of diffusers with {count}. {attention} but diffusers is needed to run it.

![samples](samples.png)

{block(usage(run))}
{guided}{classes(run)}
{training(run, report['plug'])}

## Folding
{folding(report)}

## Measured
{numbers}
"""
    task = TASKS.get(name or '')
    more = {'pipeline_tag': task} if task else {}
    given = metadata.of(run.config).given()
    return card_text(text, run.folder.name, 'diffusers', given, tags, shipped_results(results, report, task), **more)


def far_card(run: Run, facts: Mapping[str, Any], results: list[Result], metadata: Metadata) -> str:
    """Text of ``README.md`` of a run whose attention is replaced; see `model_card`."""
    code = f"from asr_downstream.far.export import load_far\n\nmodel = load_far('THIS FOLDER')  # a {facts['model']}"
    text = f"""# {run.folder.name}

A `{facts['model']}` of diffusers whose self-attention is replaced (FAR, arXiv 2505.21535), with
{facts['parameters']:,} parameters. Plain diffusers cannot load it: it needs asr_downstream.

{block(code)}

Called as the class of diffusers is; the noise schedule is in `scheduler`.
{classes(run)}
{training(run, run.config.plug)}

Replaced: `{run.config.replace}`
"""
    tags = ('diffusion', folder_of(run.parts.model), 'FAR')
    given = metadata.of(run.config).given()
    return card_text(text, run.folder.name, 'asr_downstream', given, tags, shipped_results(results, None, None))


def shipped_results(results: list[Result], report: Mapping[str, Any] | None, task: str | None) -> list[Any]:
    """FID and KID of what is shipped, for the metadata of its card.

    Those of the folded model; where an exact fold was not evaluated, those of the trained model, which say so.

    Args:
        results: of evaluations of this checkpoint.
        report: of the fold, or None if nothing was folded.
        task: as hubs call it.
    """
    calibration = report and report['calibration']
    folded = bool(report and report['sites'])
    images = max((site['samples'] for site in calibration['sites']), default=0) if calibration else 0
    wanted = f'calibrated on {images}' if calibration else 'folded' if folded else 'unfolded'
    found: dict[str, Result] = {}
    for arm in ('unfolded', wanted) if not calibration else (wanted,):
        found |= {json.dumps(r.provenance, sort_keys=True): r for r in results if r.arm == arm}
    listed = []
    for result in found.values():
        how = {key: value for key, value in result.provenance.items() if key not in ('real', 'versions')}
        if result.arm != wanted:
            how['measured'] = 'before folding'
        numbers = {k.upper(): (k, result.numbers[k]) for k in ('fid', 'kid') if k in result.numbers}
        data = str(result.provenance.get('real', 'images'))
        listed += measured(task or 'image-generation', data, numbers, how=how)
    return listed


def block(code: str) -> str:
    """Python code as Markdown."""
    return f'```python\n{code}\n```'


def training(run: Run, plug: Any) -> str:
    """How it was trained."""
    config = run.config
    data = {k: Path(v).name if k == 'path' else v for k, v in config.data.items()}
    rows = '\n'.join(f'| {key} | {config[key]} |' for key in TRAINING)
    return f"""## Training
Step {run.step} of a training on `{data}`, {'averaged weights' if run.ema else 'weights as trained'}.

| | |
|---|---|
| model | `{dict(config.model)}` |
| plug | `{plug}` |
| noise schedule | `{dict(config.noise_scheduler)}` |
{rows}"""


def classes(run: Run) -> str:
    """Numbers of the classes, and of the one that stands for none."""
    condition = run.parts.condition
    if not isinstance(condition, ClassLabels):
        return ''
    rows = [
        f'| {number} | `{quoted(name)[1:-1]}` |'.replace('||', '| |') for number, name in enumerate(condition.classes)
    ]
    if condition.drop:
        rows.append(
            f'| {len(rows)} | none: the null class, trained with {condition.drop:.0%} of the samples, for guidance |'
        )
    return '\n## Classes\n| number | class |\n|---|---|\n' + '\n'.join(rows) + '\n'


def folding(report: dict[str, Any]) -> str:
    """What folding changed."""
    sites, plugged = len(report['sites']), report['parameters']['plugged']
    if not sites and report['calibration'] is None:
        return 'There was nothing to fold: the run has no gates, and its weights are shipped as they were trained.'
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
        f'of a sample of ten steps: in [0, 1]):\n\n| precision | forward | sample |\n|---|---|---|\n{rows}'
    )
