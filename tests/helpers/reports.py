"""Folders like those of runs, small and without any training; and what a page consists of."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = [
    'Page',
    'analyses',
    'classification_run',
    'demo',
    'detection_run',
    'diffusion_run',
    'far_run',
    'picture',
    'put',
]

VOID = {'meta', 'link', 'img', 'br', 'input', 'hr'}


class Page(HTMLParser):
    """Tags, texts and attributes of a page; checks that it is well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or '' for key, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or '' for key, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if 'style' not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All text."""
        return ' '.join(' '.join(self.texts).split())

    def all(self, *names: str) -> list[dict[str, str]]:
        """Attributes of the tags of these names."""
        return [attributes for tag, attributes in self.tags if tag in names]


def check_is_one_file(text: str) -> Page:
    """No script, no style but the page's own, nothing that is loaded; ids are unique, anchors lead somewhere."""
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {'script', 'iframe', 'object', 'embed', 'form', 'base', 'input', 'button', 'audio', 'video'}
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith('on') or key == 'style'], (tag, attributes)
        for key in ('src', 'href', 'srcset', 'xlink:href', 'action', 'data'):
            assert attributes.get(key, '#').startswith(('#', 'data:')), attributes[key]
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(set(ids)) == len(ids)
    for attributes in page.all('a'):
        assert attributes['href'][1:] in ids
    for _, attributes in page.tags:
        for each in attributes.get('aria-labelledby', '').split():
            assert each in ids
    [style] = re.findall(r'<style>(.*?)</style>', text, re.DOTALL)
    [policy] = [each['content'] for each in page.all('meta') if 'Content-Security-Policy' in each.get('http-equiv', '')]
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{hashed}'" in policy
    assert policy.startswith("default-src 'none'")
    assert 'url(' not in style
    assert '@import' not in style
    assert all('alt' in each for each in page.all('img'))
    return page


def put(path: Path, content: Any) -> Path:
    """Write JSON, JSON lines or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.jsonl' or path.name == 'scalars.json':
        content = ''.join(json.dumps(row) + '\n' for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def picture(path: Path, size: tuple[int, int] = (60, 40), noise: bool = False) -> Path:
    """Write a picture; noise does not compress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8) if noise else np.zeros(shape, np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def detection_run(folder: Path, seed: int = 3) -> Path:
    """A trained and tested detector."""
    put(folder / 'mine.py', f"data_root = 'data/bccd/'\nrandomness = dict(seed={seed})\nmax_epochs = 2\n")
    put(folder / 'last_checkpoint', 'epoch_2.pth')
    rows = [{'iter': n, 'epoch': 1 + n // 100, 'loss': 1.5 / n**0.5, 'lr': 1e-3} for n in range(10, 200, 10)]
    aps = [{'coco/bbox_mAP': 0.1 * epoch, 'step': epoch} for epoch in (1, 2)]
    put(folder / '20260101/vis_data/scalars.json', rows + aps)
    numbers = {'AP': 0.457, 'AP50': 0.75, 'parameters': 3270111, 'gmacs': 1.17, 'latency_ms': 13.2}
    numbers['classes'] = {'RBC': {'AP': 0.513}, 'WBC': {'AP': 0.7}}
    tested = {'unfolded': numbers, 'folded': numbers, 'calibration': None, 'scored_with': 'pycocotools'}
    tested |= {'difference': {'boxes_px': 1.2e-5, 'scores': 1e-6, 'unmatched': 0, 'images': 87}}
    tested |= {
        'checkpoint': 'epoch_2.pth',
        'sha256': 'ab' * 32,
        'versions': {'torch': '2.13'},
        'data': ['bccd/val.json'],
    }
    put(folder / 'test.json', tested)
    picture(folder / 'pictures/a.png')
    return folder


def diffusion_run(folder: Path) -> Path:
    """A trained and evaluated diffusion model."""
    put(folder / 'config.py', "data = dict(type='Digits')\nseed = 5\nplug = None\nmax_train_steps = 200\n")
    put(folder / 'log.jsonl', [{'step': n, 'loss': 1 / n, 'lr': 1e-3} for n in range(1, 200)])
    provenance = {'images': 1000, 'sampler': 'DDIM', 'versions': {'torch': '2.13'}}
    rows = [
        {'run': 'x', 'arm': arm, 'step': step, 'weights': 'cd' * 32, 'provenance': provenance, 'numbers': numbers}
        for arm, step, numbers in (
            ('unfolded', 100, {'fid': 9.5}),
            ('unfolded', 200, {'fid': 4.25, 'kid': 0.03, 'parameters': 700}),
            ('folded', 200, {'fid': 4.25, 'kid': 0.03, 'parameters': 690, 'pixels': 0.01}),
        )
    ]
    put(folder / 'evaluation.json', rows)
    picture(folder / 'evaluation/folded-200.png')
    return folder


def classification_run(
    folder: Path, seed: int = 0, accuracy: float = 0.64, plug: Any = None, batch: int = 128, resolution: int = 32
) -> Path:
    """A trained and evaluated classifier."""
    lines = [f'seed = {seed}', 'max_train_steps = 20', "model = dict(type='ResNet')", f'train_batch_size = {batch}']
    lines += ['gradient_accumulation_steps = 1', 'learning_rate = 0.1', f'data = dict(resolution={resolution})']
    put(folder / 'config.py', '\n'.join(lines))
    put(folder / 'log.jsonl', [{'step': n, 'loss': 2.0 / n} for n in range(1, 20)])
    about = {'seed': seed, 'step': 20, 'plug': plug, 'data': 'cifar10.zip', 'training_images': 900, 'images': 100}
    numbers = {'accuracy': {'plugged': accuracy, 'folded': accuracy}, 'parameters': {'plugged': 80, 'folded': 70}}
    epochs = [{'step': 10 * n, 'epoch': n, 'accuracy': accuracy * n / 2} for n in (1, 2)]
    versions = {'weights': {'sha256': 'ef' * 32}, 'versions': {'torch': '2.13'}, 'calibration': None}
    put(folder / 'evaluation.json', {**about, **numbers, **versions, 'validations': epochs})
    return folder


def far_run(folder: Path) -> Path:
    """A FAR family."""
    put(folder / 'teacher/config.py', "seed = 1\ndata = dict(type='Digits')\n")
    rows = [{'step': n, 'epoch': n / 10, 'loss': 2.0 / n} for n in range(1, 40)]
    put(folder / 'teacher/log.jsonl', [*rows, {'step': 40, 'val/accuracy': 0.9}])
    models = {
        'teacher': {'accuracy': 0.97, 'parameters': 142026, 'gmacs': 0.0087, 'units': 0, 'latency': {'1': [1.0, 1, 1]}},
        'FAR-50': {
            'accuracy': 0.95,
            'parameters': 140882,
            'gmacs': 0.0085,
            'units': 256,
            'latency': {'1': [0.8, 1, 1]},
        },
    }
    put(folder / 'evaluation.json', {'models': models, 'images': 500, 'relations': {'FAR-50': {'a': 0.4, 'b': 0.6}}})
    picture(folder / 'relations.png')
    return folder


def analyses(folder: Path) -> Path:
    """Analyses of a model."""
    test = {'replaced': 8, 'change': 0.0125, 'metric': 'AP', 'before': 0.45, 'after': 0.44}
    sites = [
        {'path': 'a', 'stripe_ratio': 0.1},
        {'path': 'b', 'stripe_ratio': None},
        {'path': 'c', 'stripe_ratio': 0.3},
    ]
    totals = {'parameters': 9, 'launches': 5, 'saved_bytes': 100}
    curve = {'arm': 'se', 'kind': 'gaussian', 'strengths': [0, 0.1, 0.2], 'values': [0.45, 0.4, 0.2]}
    found = {
        'stripes': {'functional_test': test, 'sites': sites, 'kind': 'detection', 'step': 12},
        'correlation': {'mean': 0.62, 'stages': []},
        'cost': {'model': totals, 'without_attention': totals, 'latency_ratio': {'median': 1.12}},
        'noise': {'metric': 'AP', 'curves': [curve, {**curve, 'arm': 'se, folded'}]},
    }
    for name, run in found.items():
        put(folder / f'{name}.json', {'analysis': name, 'images': 64, 'runs': {'se': run}, 'versions': {'torch': '2'}})
    return folder


def demo(folder: Path) -> Path:
    """All parts of the demo."""
    arms = {name: {'AP': 0.68, 'AP50': 0.856, 'parameters': 288616} for name in ('stock', 'ASR(SE)', 'ASR(SE), folded')}
    checks = {'folded_AP_equals_unfolded_AP': True, 'same_detections': True}
    against = {'boxes_px': 2e-5, 'scores': 1e-6, 'unmatched': 0, 'images': 120}
    about = {'versions': {'torch': '2.13'}, 'wall_seconds': 300.0, 'seed': 0}
    put(folder / 'summary.json', {'arms': arms, 'checks': checks, 'folded_against_unfolded': against, **about})
    picture(folder / 'detections.png')
    detection_run(folder / 'retinanet')
    unets = {'stock': {'fid': 3.0, 'kid': 0.1, 'parameters': 7}, 'ASR(SE)': {'fid': 2.9, 'kid': 0.09, 'parameters': 8}}
    summary = {'arms': unets, 'checks': {'both_learn': False, 'same': True}, 'images': 256, 'inference_steps': 25}
    put(folder / 'diffusion/summary.json', {**summary, **about, 'largest_pixel_difference': 1e-4})
    picture(folder / 'diffusion/samples.png')
    diffusion_run(folder / 'diffusion/unet')
    far = json.loads((far_run(folder / 'far') / 'evaluation.json').read_text())
    put(folder / 'far/shipped/teacher/far.json', {})
    put(folder / 'far/summary.json', {**far, 'relations': {'FAR-50': 0.5}, 'checks': {'near': True}, **about})
    return folder
