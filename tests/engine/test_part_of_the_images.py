"""Classes and subsets of image folders and zips."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.diffusion import UNET, config_for, write_images

from asr_downstream.engine.data.sources import HubDataset, ImageFolder, Zip
from asr_downstream.engine.state.train_state import Progress, check_same_run
from asr_downstream.errors import AsrError, CheckpointError, DataError


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, str]]:
    """The same images as a folder and as a zip: 3 classes of 4, for training and for tests."""
    root = tmp_path_factory.mktemp('images')
    for part in ('train', 'test'):
        write_images(root / 'set' / part)
    with zipfile.ZipFile(root / 'set.zip', 'w') as archive:
        for path in (root / 'set').rglob('*.png'):
            archive.write(path, path.relative_to(root / 'set'))
    return [(ImageFolder, str(root / 'set')), (Zip, str(root / 'set.zip'))]


def test_classes_are_numbered_in_the_order_given(sources: list[tuple[Any, str]]) -> None:
    for cls, path in sources:
        found = cls(path, classes=['owl', 'cat'])
        assert (found.classes, len(found)) == (('owl', 'cat'), 16)
        assert [found.labels[i] for i in range(16)] == [int('/cat/' in p) for p in found.paths]
        assert found.read(3).size == (18, 16)
        one = cls(path, classes=('dog',))
        assert (one.classes, one.labels) == (('dog',), [0] * 8)


def test_a_subset_keeps_classes_and_numbers(sources: list[tuple[Any, str]]) -> None:
    for cls, path in sources:
        every = cls(path)
        label_of = dict(zip(every.paths, every.labels, strict=True))
        for subset, count in (('train/*', 12), ('test/owl/*', 4), ('*/[01].png', 12), (5, 5), (24, 24)):
            part = cls(path, subset=subset)
            assert (len(part), part.classes) == (count, every.classes)
            assert part.labels == [label_of[p] for p in part.paths]
            assert part.paths == sorted(part.paths)
        assert set(cls(path, subset=5).paths) < set(cls(path, subset=9).paths)
        assert cls(path, subset=5).paths != every.paths[:5]  # else they were of one class
        both = cls(path, classes=['owl', 'dog'], subset='train/*')
        assert (both.classes, both.labels) == (('owl', 'dog'), [1] * 4 + [0] * 4)


def test_a_part_of_a_data_set_of_the_hub(sources: list[tuple[Any, str]], tmp_path: Path) -> None:
    pytest.importorskip('datasets')
    data = dict(path='imagefolder', data_dir=f'{sources[0][1]}/train', cache_dir=str(tmp_path), split='train')
    every = HubDataset(**data)
    assert (every.classes, every.labels) == (('cat', 'dog', 'owl'), [0] * 4 + [1] * 4 + [2] * 4)
    pixels = [np.asarray(every.read(index)) for index in range(12)]
    both = HubDataset(**data, classes=['owl', 'cat'])
    assert (both.classes, both.labels) == (('owl', 'cat'), [1] * 4 + [0] * 4)
    assert both.name(5).endswith('row 9')
    assert all(np.array_equal(both.read(i), pixels[i if i < 4 else i + 4]) for i in range(8))
    some, more = HubDataset(**data, subset=5), HubDataset(**data, subset=9)
    assert (len(some), some.classes) == (5, every.classes)
    assert set(some.numbers) < set(more.numbers)
    assert some.labels == [every.labels[number] for number in some.numbers]
    assert np.array_equal(some.read(4), pixels[some.numbers[4]])
    assert len(HubDataset(**data, subset=3, classes=['dog'])) == 3
    for settings, message in (
        ({'classes': ['cow']}, "has no images of 'cow'; its classes are cat, dog, owl"),
        ({'subset': 'train/*'}, 'should be a number of images; rows have no paths'),
        ({'subset': 5, 'classes': ['cat']}, 'has 4 images, fewer than subset=5'),
    ):
        with pytest.raises(AsrError, match=message):
            HubDataset(**data, **settings)


@pytest.mark.parametrize(
    ('settings', 'error', 'message'),
    [
        ({'classes': ['cat', 'cow', 'pig']}, DataError, "no images of 'cow', 'pig'; the folders .* are cat, dog, owl"),
        ({'classes': []}, AsrError, 'should be a list of names'),
        ({'classes': 'cat'}, AsrError, "classes='cat' should be a list of names"),
        ({'classes': ['cat', 'cat']}, AsrError, 'has a name twice'),
        ({'subset': 'valid/*'}, DataError, "no image fits subset='valid/.'; paths are such as test/cat/0.png"),
        ({'subset': 25}, DataError, 'has 24 images, fewer than subset=25'),
        ({'subset': 9, 'classes': ['cat']}, DataError, 'has 8 images, fewer'),
        ({'subset': 0}, AsrError, 'subset=0 should be a number of images'),
        ({'subset': True}, AsrError, 'subset=True should be'),
        ({'subset': 0.5}, AsrError, 'subset=0.5 should be'),
    ],
)
def test_parts_that_are_not_there_are_refused(
    sources: list[tuple[Any, str]], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    for cls, path in sources:
        with pytest.raises(error, match=message):
            cls(path, **settings)


def test_a_config_trains_on_a_part(sources: list[tuple[Any, str]], tmp_path: Path) -> None:
    from asr_downstream.diffusion.models.components import build_parts

    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3}, num_class_embeds=2)
    data = dict(type='ImageFolder', path=sources[1][1], resolution=8, classes=['owl', 'dog'], subset=6)
    parts = build_parts(config_for(tmp_path, model=model, data=data, condition=dict(type='ClassLabels'), plug=None))
    assert parts.condition.classes == ('owl', 'dog')
    assert len(parts.samples()) == 6
    assert {int(parts.samples()[i, i]['label']) for i in range(6)} == {0, 1}


def test_a_resumed_training_says_that_its_images_are_others_and_keeps_its_classes(tmp_path: Path) -> None:
    def of(**data: Any) -> Progress:
        config = config_for(tmp_path, data=dict(type='Zip', path=str(tmp_path / 'a.zip'), resolution=16, **data))
        return Progress.of(config, 1, 16, ('model',))

    said: list[str] = []

    def check(before: Progress, now: Progress) -> None:
        check_same_run(before, now, tmp_path, ('model',), {}, said.append)

    check(of(), of(random_flip=True))
    assert 'random_flip' in said.pop()
    check(
        of(),
        Progress.of(config_for(tmp_path, data=dict(type='ImageFolder', path='b', resolution=16)), 1, 16, ('model',)),
    )
    old = of()
    del old.settings['data']  # of an older version
    check(old, of())
    assert said == []
    with pytest.raises(CheckpointError, match=r"data.classes=\['a', 'b'\], the config says \['b', 'a'\]: the labels"):
        check(of(classes=['a', 'b']), of(classes=['b', 'a']))
