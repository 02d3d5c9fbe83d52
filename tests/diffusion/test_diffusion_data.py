"""Draws and images: which sample comes when, from which file, and files that cannot be decoded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.diffusion import write_images
from PIL import Image

from asr_downstream.diffusion.data import Samples
from asr_downstream.diffusion.models.process import process_of
from asr_downstream.engine.data.images import BadFiles, build_images
from asr_downstream.engine.data.sampler import Draws
from asr_downstream.errors import AsrError, DataError

DIGITS = {'type': 'Digits', 'resolution': 8}
DRAW = process_of(diffusers.DDPMScheduler()).draw


# Draws ----------------------------------------------------------------------------------------------------------------


def drawn(steps: range, batch: int = 4, accumulation: int = 1, rank: int = 0, world: int = 1) -> list[Any]:
    draws = Draws(10, batch, accumulation, steps, 0, rank, world)
    found = list(draws)
    assert len(found) == len(draws)
    return found


def test_every_epoch_shows_every_image_once() -> None:
    order = [index for batch in drawn(range(5)) for index, _ in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_a_later_start_continues_the_same_sequence() -> None:
    assert drawn(range(7))[3:] == drawn(range(3, 7))
    assert drawn(range(6), accumulation=2)[4:] == drawn(range(2, 6), accumulation=2)


def test_processes_and_accumulation_share_the_batch_of_one_process() -> None:
    whole = drawn(range(4))
    ranks = [drawn(range(4), batch=2, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    halves = drawn(range(4), batch=2, accumulation=2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole


def test_samples_depend_on_their_number_alone() -> None:
    images = build_images({**DIGITS, 'random_flip': True}, 1)
    samples = Samples(images, (1, 8, 8), DRAW, seed=0)
    one, again, other = samples[3, 5], samples[3, 5], samples[3, 6]
    for key in ('image', 'noise', 'timestep'):
        assert torch.equal(one[key], again[key])
    assert not torch.equal(one['noise'], other['noise'])
    assert not torch.equal(one['noise'], Samples(images, (1, 8, 8), DRAW, seed=1)[3, 5]['noise'])
    flips = {torch.equal(samples[3, n]['image'], images[3]) for n in range(20)}
    assert flips == {True, False}


# Images ---------------------------------------------------------------------------------------------------------------


def zipped(folder: Path) -> Path:
    path = folder.with_suffix('.zip')
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*.png')):
            archive.write(file, file.relative_to(folder))
        archive.writestr('__MACOSX/cat/._0.png', b'not an image')
        archive.writestr('README.txt', 'hello')
    return path


def test_folder_zip_and_data_set_give_the_same_images_and_classes(tmp_path: Path) -> None:
    pytest.importorskip('datasets')
    folder = write_images(tmp_path / 'images')
    sources = [
        {'type': 'ImageFolder', 'path': str(folder)},
        {'type': 'Zip', 'path': str(zipped(folder))},
        {'type': 'HubDataset', 'path': 'imagefolder', 'data_dir': str(folder), 'cache_dir': str(tmp_path / 'cache')},
    ]
    found = [build_images({**source, 'resolution': 8}, 3) for source in sources]
    for images in found:
        assert images.source.classes == ('cat', 'dog', 'owl')
        assert images.source.labels == [0] * 4 + [1] * 4 + [2] * 4
        assert images[5].shape == (3, 8, 8)
        assert torch.equal(images[5], found[0][5])
        assert -1 <= images[5].min() < images[5].max() <= 1
    assert found[1].source.name(5).endswith('images.zip/dog/1.png')


def test_the_middle_is_cut_out_and_grey_levels_stay() -> None:
    images = build_images(DIGITS, 1)
    pixels = (images[0] + 1) * 127.5
    torch.testing.assert_close(pixels[0], torch.from_numpy(np.asarray(images.source.read(0), np.float32)))
    wide = Image.fromarray(np.repeat(np.arange(24, dtype=np.uint8)[None], 8, 0))
    images.source.read = lambda index: wide  # type: ignore[method-assign]
    torch.testing.assert_close((images[0][0, 0] + 1) * 127.5, torch.arange(8.0, 16.0))


@pytest.mark.parametrize('damage', ['text', 'cut'])
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_undecodable_files_are_named_counted_and_limited(tmp_path: Path, damage: str, kind: str) -> None:
    folder = write_images(tmp_path / 'images')
    bad = folder / 'dog' / '2.png'
    bad.write_bytes(b'hello' if damage == 'text' else bad.read_bytes()[:300])
    spec = {'type': 'ImageFolder', 'path': str(folder)}
    if kind == 'zip':
        spec = {'type': 'Zip', 'path': str(zipped(folder))}
    images = build_images({**spec, 'resolution': 8, 'max_bad_share': 0.1}, 3)
    with pytest.raises(DataError, match=r'dog/2\.png: cannot be decoded'):
        images[6]
    item = Samples(images, (3, 8, 8), DRAW, 0)[6, 0]
    assert item['bad'] == 6
    assert torch.equal(item['image'], images[7])
    lines: list[str] = []
    files = BadFiles(images, lines.append)
    files.add([-1, 6, 6])
    files.add([6])
    assert len(lines) == 1
    assert 'dog/2.png' in lines[0]
    assert '1 of 12 images' in str(files)
    files.check()
    files.add([3])
    with pytest.raises(DataError, match='2 of 12 images cannot be decoded.*max_bad_share'):
        files.check()


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'type': 'ImageFolder', 'path': 'nowhere', 'resolution': 8}, 'no such image folder'),
        ({'type': 'Zip', 'path': 'nowhere.zip', 'resolution': 8}, 'no such zip'),
        ({'type': 'Zip', 'path': 'README.md', 'resolution': 8}, 'is no zip file'),
        ({'type': 'ImageFolder', 'path': 'tests', 'resolution': 8}, 'has no images'),
        ({'type': 'Imagefolder', 'path': 'tests', 'resolution': 8}, "did you mean 'ImageFolder'"),
        ({'type': 'Digits'}, 'has no resolution'),
        ({'type': 'Digits', 'resolution': 8, 'colour': 1}, 'colour'),
        ({'type': 'HubDataset', 'path': '/nowhere', 'resolution': 8}, 'cannot be loaded by datasets'),
    ],
)
def test_data_that_is_not_there_is_an_error(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(AsrError, match=message):
        build_images(spec, 1)


def test_damaged_archives_and_sixteen_bits(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'images', classes=('a',), each=1)
    path = tmp_path / 'deflated.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.bmp', (folder / 'a/0.png').read_bytes() + bytes(5000))
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'a\.bmp: cannot be decoded'):
        build_images({'type': 'Zip', 'path': str(path), 'resolution': 8}, 3)[0]
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / 'deep.png')
    deep = build_images({'type': 'ImageFolder', 'path': str(tmp_path), 'resolution': 8}, 1)
    image = next(deep[i] for i in range(len(deep)) if deep.source.name(i).endswith('deep.png'))
    torch.testing.assert_close((image[0] + 1) / 2, torch.from_numpy(levels / 65535).float(), rtol=0, atol=0.003)
