"""Labelled images: which are trained on, and that it is the same images wherever they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.classification import config_of
from PIL import Image
from torch import Tensor, nn

from asr_downstream.classification.task import Classification
from asr_downstream.engine.classification import accuracy
from asr_downstream.engine.data.augment import AUGMENTATIONS, Crop, Flip, build_augmentations, check_many
from asr_downstream.engine.data.images import build_images
from asr_downstream.engine.data.labelled import Labelled, Store, first_of_each, labels_of, normal, split
from asr_downstream.errors import AsrError, DataError
from asr_downstream.modules.seeds import generator

KINDS = ('files', 'memory', 'device')
AUGMENT = [dict(type='Crop', padding=3), dict(type='Flip')]


def pictures(folder: Path, count: int = 6) -> Path:
    """Two classes of colourful noise."""
    for label in ('a', 'b'):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(256, (12, 12, 3), generator=generator(label, number)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / label / f'{number}.png')
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return dict(data=dict(type='ImageFolder', path=str(folder), resolution=12), holdout=0.25, augment=AUGMENT)


def batch_of(task: Classification, numbers: range, flags: bool = True) -> Tensor:
    """Training images of these numbers, as the loop makes them."""
    samples = task.samples()
    task.to(torch.device('cpu'))
    items = [samples[number % len(samples), number] for number in numbers]
    batch = torch.utils.data.default_collate(items)
    assert (batch['bad'] == -1).all() == flags
    return task.prepare(batch)['image']


def test_images_are_the_same_wherever_they_are_kept(tmp_path: Path) -> None:
    tasks = {
        kind: Classification(config_of(tmp_path, images_per_class=None, images_in=kind, **settings(folder)))
        for folder in [pictures(tmp_path / 'data')]
        for kind in KINDS
    }
    found = {kind: batch_of(task, range(40)) for kind, task in tasks.items()}
    assert found['files'].shape == (40, 3, 12, 12)
    assert torch.equal(found['files'], found['memory'])
    assert torch.equal(found['files'], found['device'])
    assert not torch.equal(found['files'][0], found['files'][9])  # the same image, drawn otherwise
    held_out = {
        kind: torch.cat([task.normalised(task.prepare(batch)) for batch in task.validation()])
        for kind, task in tasks.items()
    }
    assert len(held_out['files']) == 3
    assert torch.equal(held_out['files'], held_out['memory'])
    assert torch.equal(held_out['files'], held_out['device'])
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 2))
    for task in tasks.values():
        task.input_name = 'input'
    assert len({accuracy(network, task) for task in tasks.values()}) == 1


def test_kept_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / 'data')
    for kind, expected in (('files', 20), ('memory', 12), ('device', 12)):
        task = Classification(config_of(tmp_path, images_per_class=None, images_in=kind, **settings(folder)))
        count, read = [], type(task.all_images.source).read
        monkeypatch.setattr(type(task.all_images.source), 'read', lambda self, n: (count.append(n), read(self, n))[1])  # noqa: B023
        batch_of(task, range(20))
        assert len(count) == expected, kind
        monkeypatch.undo()


def test_a_file_that_cannot_be_decoded_is_replaced_in_the_same_way(tmp_path: Path) -> None:
    folder = pictures(tmp_path / 'data')
    bad = Classification(config_of(tmp_path, images_per_class=None, **settings(folder))).train_indices[2]
    (folder / 'ab'[bad // 6] / f'{bad % 6}.png').write_bytes(b'no picture')
    found = {}
    for kind in KINDS:
        task = Classification(config_of(tmp_path, images_per_class=None, images_in=kind, **settings(folder)))
        found[kind] = batch_of(task, range(9), flags=False)
        assert task.samples()[2, 2]['bad'] == bad
        assert task.samples()[2, 2]['label'] == task.samples()[3, 2]['label']
    assert torch.equal(found['files'], found['memory'])
    assert torch.equal(found['files'], found['device'])


@pytest.mark.parametrize('augmentation', [Flip(), Crop(2), Crop(0)])
def test_many_images_are_changed_as_one_by_one(augmentation: Any) -> None:
    images = torch.randn(16, 3, 7, 5)
    drawn = torch.stack([augmentation.draw(generator('x', n)) for n in range(16)])
    expected = torch.stack([augmentation(image, generator('x', n)) for n, image in enumerate(images)])
    assert torch.equal(augmentation.many(images, drawn), expected)
    assert torch.equal(expected, images) == (getattr(augmentation, 'padding', 1) == 0)


def test_what_changes_one_image_at_a_time_is_refused_on_the_device(tmp_path: Path) -> None:
    check_many(build_augmentations(AUGMENT))
    for name in set(AUGMENTATIONS.module_dict) - {'Crop', 'Flip'}:
        with pytest.raises(AsrError, match=f"{name} changes one image at a time.*use images_in='memory'"):
            Classification(config_of(tmp_path, augment=[dict(type=name)])).samples()


def test_batches_on_the_device_are_channels_last_where_the_model_is(tmp_path: Path) -> None:
    images = build_images(dict(type='Digits', resolution=8), 3)
    store = Store(images, range(4))
    store.read()
    batch = {'row': torch.arange(4)}
    assert store.batch(batch, [], channels_last=True).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(store.batch(batch, [], channels_last=True), store.batch(batch, []))


def test_images_per_class_are_the_first_ones_and_never_held_out() -> None:
    images = build_images(dict(type='Digits', resolution=8), 1)
    labels, (train, held_out) = labels_of(images), split(len(images), 0.1)
    few = first_of_each(labels, train, 7)
    assert len(few) == 70
    assert few == sorted(few)
    assert not set(few) & set(held_out)
    for label in range(10):
        of_label = [n for n in train if labels[n] == label]
        assert [n for n in few if labels[n] == label] == of_label[:7]
    assert first_of_each(labels, train, None) == train
    least = min(sum(labels[n] == label for n in train) for label in range(10))
    assert len(first_of_each(labels, train, least)) == 10 * least
    with pytest.raises(DataError, match=f'images_per_class=5000: .*give at most {least}'):
        first_of_each(labels, train, 5000)


def test_images_are_normalised_by_the_numbers_for_images_from_black_to_white() -> None:
    mean, std = normal([0.5, 0.25, 0.75], [0.5, 0.25, 0.1], 3)
    black, white = (torch.full((3, 1, 1), value) for value in (-1.0, 1.0))
    assert ((black - mean) / std).flatten().tolist() == pytest.approx([-1, -1, -7.5])
    assert ((white - mean) / std).flatten().tolist() == pytest.approx([1, 3, 2.5])
    assert torch.equal((white - normal(None, None, 3)[0]) / normal(None, None, 3)[1], white)
    for given in (([0.5], None), ([0.5] * 3, [0.5])):
        with pytest.raises(AsrError, match='give both, with 3 numbers each'):
            normal(*given, 3)


def test_unlabelled_images_are_refused(tmp_path: Path) -> None:
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    images = build_images(dict(type='ImageFolder', path=str(tmp_path), resolution=4), 3)
    with pytest.raises(DataError, match='has no labels'):
        Labelled(images, [0])
