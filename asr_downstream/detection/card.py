"""The model card of a shipped detector: what it is, what it was trained on, how to load it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from mmengine.config import Config

from asr_downstream.detection.data.coco import named_sets
from asr_downstream.detection.evaluation.results import results_of
from asr_downstream.files.card import card_text

__all__ = ['card_path', 'detector_card']

MARK = '<!-- written when the detector was shipped; to keep changes, take this line out -->'


def card_path(out: Path) -> Path:
    """Where the card of ``out`` goes: ``README.md`` beside it, or ``<out>.md`` if somebody wrote a README there."""
    readme = out.parent / 'README.md'
    if readme.is_file() and MARK not in readme.read_text(errors='replace'):
        return out.with_suffix('.md')
    return readme


def detector_card(
    config: Config,
    out: Path,
    report: dict[str, Any],
    meta: dict[str, Any],
    card: dict[str, Any],
    tested: dict[str, Any] | None = None,
) -> str:
    """Text of the card.

    Args:
        config: of the stock model, as shipped.
        out: the shipped weights.
        report: of the fold.
        meta: of the checkpoint.
        card: see `asr_downstream.files.card.card_of`.
        tested: what `tools/test_det.py` has written about the checkpoint.
    """
    kind = str(getattr(config.model.type, '__name__', config.model.type))
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    results = results_of(tested, report) if tested else []
    rows = {
        'annotations': ', '.join(f'`{name}`' for name in named_sets(config, 'train_dataloader')),
        'classes': f'{len(classes)}: {", ".join(map(str, classes))}' if classes else '',
        'epochs': str(meta.get('epoch', '')),
        'start of the backbone': f'`{start}`' if (start := start_of(config)) else '',
        **{f'{r.metric_name} on {r.dataset_split}': f'{r.metric_value:.3f}{note(r)}' for r in results},
    }
    table = '\n'.join(f'| {key} | {value} |' for key, value in rows.items() if value)
    usage = loading(out, [str(name) for name in classes], report.get('removed_attention') or ())
    plain = 'nothing but MMDetection is needed to run it' if not report['still_plugged'] else 'see the config'
    text = f"""{MARK}
# {out.stem}

A `{kind}` of MMDetection: {plain}.

```python
{usage}
```

| | |
|---|---|
{table}

{folding(report)} Differences, hashes and versions are in `fold_report.json`.
"""
    return card_text(text, out.stem, 'mmdetection', card, [kind.lower()], results, pipeline_tag='object-detection')


def note(result: EvalResult) -> str:
    """What a number has to have said about it, besides the data."""
    return f', {result.metric_args["measured"]}' if result.metric_args else ''


def loading(out: Path, classes: list[str], removed: Collection[str] = ()) -> str:
    """Code that loads the detector; safetensors hold no names of classes, for which MMDetection would take COCO's.

    Where attention was ``removed``, the config builds it still.
    """
    config, weights = out.with_suffix('.py').name, out.name
    if removed:
        safe = out.suffix == '.safetensors'
        lines = [
            'import torch',
            'from mmdet.apis import init_detector',
            *(['from safetensors.torch import load_file'] if safe else []),
            '',
            f"model = init_detector({config!r}, device='cpu')",
            'for path in model.cfg.removed_attention:',
            "    parent, _, name = path.rpartition('.')",
            '    setattr(model.get_submodule(parent), name, torch.nn.Identity())',
            f'state = load_file({weights!r})' if safe else f"state = torch.load({weights!r})['state_dict']",
            'model.load_state_dict(state, strict=True)',
            *([f"model.dataset_meta = {{'classes': {tuple(classes)!r}}}"] if classes else []),
        ]
    elif out.suffix != '.safetensors':
        lines = [
            'from mmdet.apis import init_detector',
            '',
            f"model = init_detector({config!r}, {weights!r}, device='cpu')",
        ]
    else:
        lines = [
            'from mmdet.apis import init_detector',
            'from safetensors.torch import load_file',
            '',
            f"model = init_detector({config!r}, device='cpu')",
            f'model.load_state_dict(load_file({weights!r}), strict=True)',
            *([f"model.dataset_meta = {{'classes': {tuple(classes)!r}}}"] if classes else []),
        ]
    return '\n'.join(lines)


def start_of(config: Config) -> str | None:
    """Checkpoint that the config starts the backbone from, as it names it."""
    start = (config.model.get('backbone') or {}).get('init_cfg') or {}
    return start.get('checkpoint') if isinstance(start, dict) else None


def folding(report: dict[str, Any]) -> str:
    """One sentence about what folding did."""
    if native := report.get('native'):
        count, total = len(native['removed']), len(native['blocks'])
        return (
            f'Of the {total} attention blocks that it was trained with, {count} were replaced by the mean of their '
            f'gates over training images and folded into the layers beside them.'
        )
    if not report['sites']:
        return 'It was trained as it is: there was nothing to fold.'
    how = 'exactly' if report['calibration'] is None else 'by their mean over training images'
    return f'While it trained, {len(report["sites"])} layers had gates of channels, which were folded into them {how}.'
