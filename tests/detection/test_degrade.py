"""A worse copy of a detection set: the same layout and boxes, other pixels, drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from test_datasets import LAYOUTS, make

from asr_downstream.detection.data.degrade import ABOUT, degrade_image, degrade_set
from asr_downstream.errors import DataError


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """A set with pictures that have something to lose."""
    root = make(tmp_path / 'cells', 'plain')
    rng = np.random.default_rng(0)
    for path in (root / 'images').iterdir():
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return root


def pixels(root: Path) -> dict[str, np.ndarray]:
    """All images under a folder."""
    return {str(p.relative_to(root)): np.asarray(Image.open(p), np.float64) for p in sorted(root.rglob('*.png'))}


def test_the_copy_is_worse_and_has_the_same_boxes(cells: Path, tmp_path: Path) -> None:
    made = degrade_set(cells, tmp_path / 'dark', noise=0.0)
    assert set(made) == {'train', 'val'}
    for path in made.values():
        assert path.read_bytes() == (cells / path.relative_to(tmp_path / 'dark')).read_bytes()
    before, after = pixels(cells), pixels(tmp_path / 'dark')
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert 0.25 < after[name].mean() / old.mean() < 0.75  # dark
        assert after[name].std() / after[name].mean() < 0.5 * old.std() / old.mean()  # blurred
    assert json.loads((tmp_path / 'dark' / ABOUT).read_text())['seed'] == 0


def test_the_seed_and_the_name_alone_decide(cells: Path, tmp_path: Path) -> None:
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        degrade_set(cells, tmp_path / name, seed=seed)
    first, again, other = (pixels(tmp_path / name) for name in 'abc')
    assert all((first[name] == again[name]).all() for name in first)
    assert all((first[name] != other[name]).any() for name in first)
    one, two = first.values()
    assert one.mean() != two.mean()


def test_nothing_asked_is_nothing_done() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert (degrade_image(image, np.random.default_rng(0), (0.0, 0.0), (1.0, 1.0), 0.0) == image).all()
    noisy = degrade_image(image, np.random.default_rng(0), (0.0, 0.0), (0.5, 0.5), 3.0)
    assert 2.5 < (noisy - image / 2)[10:].std() < 3.5


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_is_kept(layout: str, tmp_path: Path) -> None:
    root = make(tmp_path / 'set', layout)
    made = degrade_set(root, tmp_path / 'dark')
    for split, path in made.items():
        assert path.relative_to(tmp_path / 'dark') == Path(LAYOUTS[layout][0 if split == 'train' else 2])
    assert pixels(root).keys() == pixels(tmp_path / 'dark').keys()


def test_refusals(cells: Path, tmp_path: Path) -> None:
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.txt').write_text('mine')
    with pytest.raises(DataError, match='is not a degraded set'):
        degrade_set(cells, tmp_path / 'full')
    assert (tmp_path / 'full' / 'thesis.txt').read_text() == 'mine'
    with pytest.raises(DataError, match='is the set itself'):
        degrade_set(cells, cells)
    with pytest.raises(DataError, match='the smaller one first'):
        degrade_set(cells, tmp_path / 'dark', blur=(2.0, 1.0))
    with pytest.raises(DataError, match='should be at least 0'):
        degrade_set(cells, tmp_path / 'dark', noise=-1.0)
    degrade_set(cells, tmp_path / 'dark')
    degrade_set(cells, tmp_path / 'dark', seed=1)  # an earlier copy is replaced
    good = (cells / 'images' / 'a.png').read_bytes()
    (cells / 'images' / 'a.png').write_bytes(b'no image')
    with pytest.raises(DataError, match='cannot be read as an image'):
        degrade_set(cells, tmp_path / 'dark')
    assert json.loads((tmp_path / 'dark' / ABOUT).read_text())['seed'] == 1  # the earlier one is still there
    (cells / 'images' / 'a.png').write_bytes(good)
    content = json.loads((cells / 'annotations' / 'train.json').read_text())
    Image.new('RGB', (64, 48)).save(tmp_path / 'elsewhere.png')
    content['images'] += [{**content['images'][0], 'id': 2, 'file_name': '../../elsewhere.png'}, content['images'][0]]
    (cells / 'annotations' / 'train.json').write_text(json.dumps(content))
    with pytest.raises(DataError, match='outside'):
        degrade_set(cells, tmp_path / 'other')


@pytest.mark.slow
def test_the_command(cells: Path, tmp_path: Path, tool: Callable[..., Any]) -> None:
    done = tool('prepare_data', 'degrade', cells, tmp_path / 'dark', '--blur', '1', '1', '--light', '0.5', '0.5')
    assert done.returncode == 0, done.stderr
    assert 'train: ' in done.stdout
    assert json.loads((tmp_path / 'dark' / ABOUT).read_text())['light'] == [0.5, 0.5]
