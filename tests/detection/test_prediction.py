"""Detections in images of no data set: what is found, written and drawn, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.tiny_detection import as_file, tiny
from mmengine.structures import InstanceData
from pycocotools.coco import COCO

from asr_downstream.detection.evaluation.evaluate import detect
from asr_downstream.detection.models.detectors import load_detector
from asr_downstream.detection.prediction.images import Truth, find_images
from asr_downstream.detection.prediction.predict import class_names, found_in, predict
from asr_downstream.detection.prediction.write import check_pictures, entries_of, numbered
from asr_downstream.errors import DataError


@pytest.fixture(scope='module')
def trained(stock: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A config whose detector finds something everywhere, its file, and a checkpoint."""
    folder = tmp_path_factory.mktemp('trained')
    config = tiny(digits, validate=True, **{'model.test_cfg.score_thr': 0.0, 'model.test_cfg.max_per_img': 7})
    return config, as_file(config, folder), stock


def test_what_is_found_is_what_the_test_finds(trained: Any, digits: Path) -> None:
    config, _, checkpoint = trained
    model, _ = load_detector(config, checkpoint)
    _, expected, _ = detect(config, model, 'detector')
    coco = COCO(str(digits / 'annotations/val.json'))
    files = {number: digits / 'val' / image['file_name'] for number, image in coco.imgs.items()}
    for batch_size in (1, 2):
        found = list(predict(config, model, list(files.values()), batch_size))
        for number, seen in zip(files, found, strict=True):
            assert seen.size == (coco.imgs[number]['height'], coco.imgs[number]['width'])
            assert len(seen.detections[1]) == 7
            for mine, theirs in zip(seen.detections, expected[number], strict=True):
                assert torch.allclose(mine.float(), theirs.float(), atol=1e-3)


def test_the_command_writes_cocos_json_and_pictures(trained: Any, digits: Path, tmp_path: Path) -> None:
    _, config, checkpoint = trained
    truth = json.loads((digits / 'annotations/val.json').read_text())
    photos = tmp_path / 'photos/below'
    photos.mkdir(parents=True)
    for image in truth['images']:
        shutil.copy(digits / 'val' / image['file_name'], photos)
    (photos / 'broken.png').write_bytes(b'no image')
    annotations = digits / 'annotations/val.json'
    words = [config, checkpoint, tmp_path / 'photos', '--out', tmp_path / 'photos/out', '--batch-size', 2]
    for _ in range(2):  # what it has written is no image of the second time
        done = command('predict', *words, '--annotations', annotations, '--threshold', '0.0001')
        assert done.returncode == 0, done.stderr
    assert 'left out:' in done.stdout
    assert 'broken.png: cannot be read as an image' in done.stdout
    assert 'annotation file' not in done.stdout
    found = tmp_path / 'photos/out/predictions.json'
    content = json.loads(found.read_text())
    names = {image['id']: image['file_name'] for image in truth['images']}
    assert {image['id']: Path(image['file_name']).name for image in content['images']} == names
    assert {c['name']: c['id'] for c in truth['categories']}.items() <= {
        c['name']: c['id'] for c in content['categories']
    }.items()
    assert len(content['annotations']) == 7 * len(names)
    results = COCO(str(annotations)).loadRes(content['annotations'])  # ids are those of the truth
    assert len(results.anns) == 7 * len(names)
    assert len(COCO(str(found)).anns) == 7 * len(names)
    pictures = sorted(tmp_path.glob('photos/out/pictures/**/*.png'))
    assert [p.relative_to(tmp_path / 'photos/out/pictures').parent.as_posix() for p in pictures] == ['below'] * 2
    beside = Image.open(pictures[0]).width
    done = command('predict', *words[:2], next(photos.glob('[!b]*')), '--out', tmp_path / 'alone')
    assert done.returncode == 0, done.stderr
    alone = Image.open(next(tmp_path.glob('alone/pictures/*.png'))).width
    assert beside > 1.5 * alone, 'what is annotated has a column of its own'
    command('predict', *words[:3], '--out', tmp_path / 'bare', '--no-pictures')
    assert [p.name for p in (tmp_path / 'bare').iterdir()] == ['predictions.json']


def test_only_broken_images_are_an_error(trained: Any, tmp_path: Path) -> None:
    _, config, checkpoint = trained
    (tmp_path / 'broken.png').write_bytes(b'no image')
    done = command('predict', config, checkpoint, tmp_path / 'broken.png', '--out', tmp_path / 'out')
    assert done.returncode == 1
    assert f'error: none of 1 images can be read, such as {tmp_path / "broken.png"}' in done.stderr
    assert not (tmp_path / 'out').exists() or not any((tmp_path / 'out').iterdir())


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(path)
    return path


def test_images_are_found_by_name(tmp_path: Path) -> None:
    a, b = picture(tmp_path / 'set/a.png'), picture(tmp_path / 'set/deep/b.jpg')
    (tmp_path / 'set/notes.txt').write_text('')
    picture(tmp_path / 'set/out/pictures/a.png')
    out = tmp_path / 'set/out'
    assert find_images([tmp_path / 'set'], out) == {'a.png': a, 'deep/b.jpg': b}
    assert find_images([b, a], out) == {'b.jpg': b, 'a.png': a}
    with pytest.raises(DataError, match='such image or folder'):
        find_images([tmp_path / 'nowhere'], out)
    with pytest.raises(DataError, match='has no images'):
        find_images([out], out)
    with pytest.raises(DataError, match=r'has a.png, as another'):
        find_images([a, tmp_path / 'set'], out)
    with pytest.raises(DataError, match='is one of the images'):
        check_pictures({'a.png': a}, {'a.png': a})
    with pytest.raises(DataError, match='differ in their suffix alone'):
        check_pictures({'a.png': out / 'a.png', 'a.jpg': out / 'a.png'}, {})


def test_truth_is_found_by_name_if_that_is_the_only_one(tmp_path: Path) -> None:
    def written(*names: str) -> Path:
        images = [{'id': 10 + k, 'file_name': name, 'width': 8, 'height': 8} for k, name in enumerate(names)]
        box = {'id': 1, 'image_id': 10, 'category_id': 5, 'bbox': [1, 2, 3, 4], 'area': 12, 'iscrowd': 0}
        content = {'images': images, 'annotations': [box], 'categories': [{'id': 5, 'name': 'cat'}]}
        (tmp_path / 'truth.json').write_text(json.dumps(content))
        return tmp_path / 'truth.json'

    truth = Truth(written('x/a.png', 'x/b.png'), ['a.png', 'c.png'])
    assert truth.images == {'a.png': 10}
    boxes, scores, labels = truth.of('a.png', ['dog', 'cat'])
    assert (boxes.tolist(), scores.tolist(), labels.tolist()) == ([[1, 2, 4, 6]], [1], [1])
    assert truth.of('c.png', ['cat']) is None
    assert truth.of('a.png', ['dog'])[0].shape == (0, 4)
    with pytest.raises(DataError, match='has none of the images'):
        Truth(written('x/a.png', 'y/a.png'), ['a.png'])
    assert Truth(written('x/a.png', 'y/a.png'), ['y/a.png']).images == {'y/a.png': 11}


def test_ids_are_the_known_ones_and_go_on_after_them() -> None:
    assert numbered(['a', 'b', 'c'], {'b': 7}) == {'a': 8, 'b': 7, 'c': 9}
    assert numbered(['a', 'b'], {}, first=1) == {'a': 1, 'b': 2}


def test_masks_are_written_as_cocos_code() -> None:
    class Sample:
        ori_shape = (4, 6, 3)
        pred_instances = InstanceData(
            bboxes=torch.tensor([[1.0, 1, 3, 3]]),
            scores=torch.tensor([0.5]),
            labels=torch.tensor([0]),
            masks=torch.zeros(1, 4, 6, dtype=torch.bool),
        )

    Sample.pred_instances.masks[0, 1:3, 1:3] = True
    (entry,) = entries_of(found_in(Sample), ['cat'], {'cat': 3})
    assert (entry['category_id'], entry['bbox'], entry['area']) == (3, [1, 1, 2, 2], 4)
    from pycocotools import mask as masks

    assert (masks.decode(entry['segmentation']) == np.asarray(Sample.pred_instances.masks[0])).all()


def test_classes_are_those_of_the_checkpoint_then_of_the_config(trained: Any) -> None:
    config, _, checkpoint = trained
    model, _ = load_detector(config, checkpoint)
    known = class_names(config, model)
    assert len(known) == config.model.bbox_head.num_classes
    model.dataset_meta = None
    assert class_names(config, model) == known
    model.dataset_meta = {'classes': ('x', 'y')}
    assert class_names(config, model) == ['x', 'y']
