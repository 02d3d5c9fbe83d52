"""Annotations that MMDetection would train on in silence, or die of: what stops a training, and what is only said."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from helpers.detsets import HEIGHT, WIDTH, coco, tiny_set
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(60)]

from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.check import check_set
from asr_downstream.detection.data.coco import check_annotations, check_datasets
from asr_downstream.errors import DataError

COCO = ROOT / 'det_configs/retinanet/retinanet_r18-asr-se-c3-c5_fpn_1x_coco.py'
NAN, INF = float('nan'), float('inf')


def box(*values: Any) -> Callable[[Any], None]:
    return lambda c: c['annotations'][1].update(bbox=list(values))


def first(key: str, **values: Any) -> Callable[[Any], None]:
    return lambda c: c[key][1].update(values)


def twice(key: str, **values: Any) -> Callable[[Any], None]:
    return lambda c: c[key].append({**c[key][0], **values})


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    'NaN': (box(NAN, 5, 20, 16), r'1 box is not finite \(id 2\)'),
    'infinite': (box(4, 5, INF, 16), r'1 box is not finite \(id 2\)'),
    'too large for float32': (box(4, 5, 1e39, 16), r'1 box is not finite \(id 2\)'),
    'strings': (box('4', '5', '20', '16'), r'1 bbox is not four numbers \(id 2\)'),
    'one string': (box(4, 5, 20, 'x'), r'1 bbox is not four numbers'),
    'two numbers': (box(4, 5), r'1 bbox is not four numbers \(id 2\)'),
    'five numbers': (box(4, 5, 20, 16, 1), r'1 bbox is not four numbers'),
    'no box': (first('annotations', bbox=None), r'1 bbox is not four numbers'),
    'nested': (box([4, 5], 5, 20, 16), r'1 bbox is not four numbers'),
    'area NaN': (first('annotations', area=NAN), r'1 area is not a finite number \(id 2\)'),
    'area text': (first('annotations', area='320'), r'1 area is not a finite number \(id 2\)'),
    'orphan': (first('annotations', image_id=99), r'1 box belongs to no image \(id 2: image_id 99\)'),
    'a list for an id': (first('annotations', image_id=[1]), r'1 box belongs to no image'),
    'unknown category': (first('annotations', category_id=7), r'1 box is of no category \(id 2: category_id 7\)'),
    'annotation id twice': (twice('annotations'), r'1 annotation id occurs more than once \(1\)'),
    'image id twice': (twice('images', file_name='train2.png'), r'1 image id occurs more than once \(1\)'),
    'category id twice': (twice('categories', name='x'), r'1 category id occurs more than once \(1\)'),
    'an id is missing its value': (first('images', id=None), r'1 image id is no whole number or text \(None\)'),
    'width of a text': (first('images', width='64'), r'1 image has no size: width and height .* \(train2.png\)'),
    'height 0': (first('images', height=0), r'1 image has no size'),
    'a size that is not of the file': (
        first('images', width=640, height=480),
        r'1 image has another size than its file \(train2.png: 640x480, the file 64x48\)',
    ),
    'sides exchanged': (first('images', width=HEIGHT, height=WIDTH), r'1 image has another size than its file'),
    'a name that is a number': (first('images', file_name=7), r'1 file_name is no text'),
    'no images': (lambda c: (c['images'].clear(), c['annotations'].clear()), r'it has no images'),
}  # fmt: skip
SAID: dict[str, tuple[Callable[[Any], Any], str]] = {
    'no width': (box(4, 5, 0, 16), r'1 box has no width or height of a pixel, and is left out \(id 2\)'),
    'negative': (box(30, 30, -20, -16), r'1 box has no width or height'),
    'outside': (box(400, 400, 20, 20), r'1 box lies outside of its image, and is left out \(id 2\)'),
    'huge': (box(0, 0, 1e9, 1e9), r'1 box reaches beyond its image, and is cut off \(id 2\)'),
    'no area': (first('annotations', area=0), r'1 box has an area of 0 or less, and is left out \(id 2\)'),
    'a mask of text': (first('annotations', segmentation='x'), r'1 segmentation is neither polygons nor'),
    'a mask of texts': (first('annotations', segmentation=[['1', '2', '3', '4', '5', '6']]), r'1 segmentation is neit'),
    'image twice': (twice('images', id=9), r'1 file_name occurs more than once \(train1.png\)'),
}  # fmt: skip


def check(root: Path, split: str = 'train') -> str:
    return check_annotations(root / 'annotations' / f'{split}.json', root / 'images')


@pytest.mark.parametrize('case', WRONG)
def test_what_would_train_wrongly_stops(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    root = tiny_set(tmp_path / 'set', change)
    with pytest.raises(DataError, match=message) as error:
        check(root)
    assert str(error.value).startswith(f'{root}/annotations/train.json: ')
    assert '\n' not in str(error.value)
    check(root, 'val')


@pytest.mark.parametrize('case', SAID)
def test_what_mmdetection_drops_is_said_with_counts(case: str, tmp_path: Path) -> None:
    change, message = SAID[case]
    root = tiny_set(tmp_path / 'set', change)
    with pytest.warns(UserWarning, match=message) as said:
        check(root)
    assert all(str(warning.message).startswith(f'{root}/annotations/train.json: ') for warning in said)


def test_a_sound_set_says_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert check(tiny_set(tmp_path / 'set')) == '3 images, 6 boxes, 2 classes'


def test_nested_brackets_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / 'train.json'
    path.write_text('[' * 100_000)
    with pytest.raises(DataError, match=r'train.json: is not JSON \(nested too deeply\)'):
        check_annotations(path, tmp_path)


def test_check_lists_everything_and_fails(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        content['annotations'][0]['bbox'][0] = NAN
        content['annotations'][1]['image_id'] = 77
        content['annotations'][2]['bbox'] = [0, 0, 900, 900]
        content['images'][2]['width'] = 63

    root = tiny_set(tmp_path / 'set', change)
    done = command('prepare_data', 'check', root)
    assert done.returncode == 1
    assert '3 findings would make a training wrong' in done.stderr
    for text in (
        'wrong: 1 box is not finite (id 1)', 'wrong: 1 box belongs to no image (id 2: image_id 77)',
        'wrong: 1 image has another size than its file (train3.png: 63x48, the file 64x48)',
        'note: 1 box reaches beyond its image', 'val: ', '3 images, 6 boxes, 2 classes: cell 3, dust 3',
    ):  # fmt: skip
        assert text in done.stdout


def test_check_names_the_classes(tmp_path: Path) -> None:
    done = command('prepare_data', 'check', tiny_set(tmp_path / 'set'))
    assert done.returncode == 0
    assert '3 images, 6 boxes, 2 classes: cell 3, dust 3' in done.stdout


def test_training_and_testing_refuse_it(tmp_path: Path) -> None:
    config = load_config(COCO, tiny_set(tmp_path / 'set', box(NAN, 1, 2, 3), 'val'))
    check_datasets(config, 'train_dataloader')
    for loader in ('val_dataloader', 'test_dataloader'):
        with pytest.raises(DataError, match=r'val.json: 1 box is not finite'):
            check_datasets(config, loader)


@pytest.mark.parametrize('value', ['missing', None, 2])
def test_what_cannot_be_scored_is_told_before_a_training(tmp_path: Path, value: Any) -> None:
    def change(content: Any) -> None:
        if value == 'missing':
            del content['annotations'][1]['iscrowd']
        else:
            content['annotations'][1]['iscrowd'] = value

    config = load_config(COCO, tiny_set(tmp_path / 'train', change))
    check_datasets(config, 'train_dataloader')  # which does not need it
    config = load_config(COCO, tiny_set(tmp_path / 'val', change, 'val'))
    with pytest.raises(DataError, match=r'val.json: 1 annotation has no iscrowd of 0 or 1 .* be scored \(id 2\)'):
        check_datasets(config, 'val_dataloader')
    config.val_evaluator = dict(type='VOCMetric')
    check_datasets(config, 'val_dataloader')


def test_masks_are_looked_at_where_they_are_used(tmp_path: Path) -> None:
    config = load_config(COCO, tiny_set(tmp_path / 'set', first('annotations', segmentation='x')))
    with pytest.warns(UserWarning, match='1 segmentation is neither'):
        check_datasets(config, 'train_dataloader')
    config.train_dataloader.dataset.pipeline[1].with_mask = True
    with pytest.raises(DataError, match='1 segmentation is neither'):
        check_datasets(config, 'train_dataloader')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check(tiny_set(tmp_path / 'none', first('annotations', segmentation=None)))


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_what_pycocotools_cannot_decode_is_refused(tmp_path: Path, encoding: str) -> None:
    root = tiny_set(tmp_path / 'set')
    path = root / 'annotations/train.json'
    path.write_text(path.read_text(), encoding=encoding)
    with pytest.raises(DataError, match=r'train.json: is not JSON in UTF-8'):
        check(root)


@pytest.mark.parametrize('name', ['q\0q/x.png', 'x\0.png', 'q\ud800/x.png'])
def test_names_that_no_system_takes_are_found(tmp_path: Path, name: str) -> None:
    root = tiny_set(tmp_path / 'set', first('images', file_name=name))
    with pytest.raises(DataError, match='are missing|is no text'):
        check(root)
    with pytest.raises(DataError):
        check_set(root)


def test_only_jpeg_and_png_are_turned(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', lambda c: c['images'][0].update(file_name='turned.webp'))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new('RGB', (WIDTH, HEIGHT)).save(root / 'images/turned.webp', exif=turned)
    check(root)


def test_a_rotation_in_exif_turns_the_size(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', lambda c: c['images'][0].update(file_name='turned.jpg'))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new('RGB', (WIDTH, HEIGHT)).save(root / 'images/turned.jpg', exif=turned)
    with pytest.raises(DataError, match=r'turned.jpg: 64x48, the file 48x64 as EXIF turns it'):
        check(root)


def test_a_folder_that_is_a_link_is_followed_and_a_loop_is_not(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', lambda c: [i.update(file_name=f'linked/{i["file_name"]}') for i in c['images']])
    (root / 'images/linked').symlink_to(root / 'images')
    (root / 'images/again').symlink_to(root / 'images')
    check(root)


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set')
    (root / 'images/train1.png').unlink()
    os.mkfifo(root / 'images/train1.png')
    with pytest.raises(DataError, match=r'1 of the 3 images of train.json are missing: train1.png'):
        check(root)


@pytest.mark.slow
def test_a_set_of_the_size_of_coco_is_checked_in_seconds() -> None:
    from asr_downstream.detection.data.soundness import examine

    content = coco('train', images=118_000, boxes=7)
    began = time.perf_counter()
    assert not list(examine(content))
    assert time.perf_counter() - began < 30
