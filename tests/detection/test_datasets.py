"""Data sets of detection: any COCO-format set by its folder, PASCAL VOC, and configs that are made to fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from asr_downstream.detection.config import load_config, stock_config
from asr_downstream.detection.data.coco import check_annotations, check_datasets, path_of
from asr_downstream.detection.data.convert.voc import convert_voc
from asr_downstream.detection.data.fit import find_splits, fit_to_data
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.errors import DataError

COCO = ROOT / 'det_configs/retinanet/retinanet_r18-asr-se-c3-c5_fpn_1x_coco.py'
CASCADE = ROOT / 'det_configs/cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'
LAYOUTS = {
    'plain': ('annotations/train.json', 'images', 'annotations/val.json', 'images'),
    'coco': ('annotations/instances_train2017.json', 'train2017', 'annotations/instances_val2017.json', 'val2017'),
    'exported': ('train/_annotations.coco.json', 'train', 'valid/_annotations.coco.json', 'valid'),
    'flat': ('train.json', '.', 'test.json', '.'),
    'nested': ('annotations/train.json', 'images/train', 'annotations/val.json', 'images/val'),
    'voc-like': ('annotations/voc_trainval.json', 'trainval', 'annotations/voc_test.json', 'test'),
}
Tool = Callable[..., Any]


def make(root: Path, layout: str, names: tuple[str, ...] = ('cell', 'dust')) -> Path:
    """A data set of one picture a split, of the same name where the splits have folders of their own."""
    train, train_images, val, val_images = LAYOUTS[layout]
    own = 'b' if train_images == val_images else 'a'
    for file, folder, split in ((train, train_images, 'a'), (val, val_images, own)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 48)).save(root / folder / f'{split}.png')
        (root / file).write_text(
            json.dumps(
                {
                    'images': [{'id': 1, 'file_name': f'{split}.png', 'width': 64, 'height': 48}],
                    'annotations': [
                        {'id': 1, 'image_id': 1, 'category_id': 7, 'bbox': [4, 4, 20, 20], 'area': 400, 'iscrowd': 0}
                    ],
                    'categories': [{'id': n, 'name': name} for n, name in enumerate(names, 7)],
                }
            )
        )
    return root


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_coco_config_fits_any_coco_format_set(layout: str, tmp_path: Path, capsys: Any) -> None:
    root = make(tmp_path / 'set', layout)
    config = load_config(COCO, root)
    assert '2 classes (cell, dust)' in capsys.readouterr().out
    check_datasets(config, 'train_dataloader', 'val_dataloader', 'test_dataloader')
    assert config.model.bbox_head.num_classes == 2
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert config[loader].dataset.metainfo.classes == ('cell', 'dust')
    train, train_images, val, val_images = LAYOUTS[layout]
    assert Path(config.test_evaluator.ann_file) == root / val
    for loader, file, images in (('train', train, train_images), ('val', val, val_images), ('test', val, val_images)):
        found = path_of(config[f'{loader}_dataloader'].dataset)
        assert found.annotations == root / file
        assert found.images.resolve() == (root / images).resolve()
    assert build_detector(config).bbox_head.num_classes == 2
    assert 'asr_downstream' not in stock_config(config).pretty_text


def test_lists_of_evaluators_are_fitted_too(tmp_path: Path) -> None:
    config = load_config(COCO)
    config.val_evaluator = [dict(type='CocoMetric', ann_file='data/coco/annotations/a.json')]
    root = make(tmp_path / 'set', 'plain')
    fit_to_data(config, root)
    assert config.val_evaluator[0].ann_file == str(root / 'annotations/val.json')


def test_several_data_sets_are_not_guessed(tmp_path: Path) -> None:
    config = load_config(COCO)
    leaf = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[dict(leaf, ann_file='a'), dict(leaf)])
    with pytest.raises(DataError, match='train_dataloader has several data sets, and not all are there'):
        fit_to_data(config, make(tmp_path, 'plain'))


def test_splits_must_number_their_classes_alike(tmp_path: Path) -> None:
    root = make(tmp_path, 'plain')
    val = json.loads((root / 'annotations/val.json').read_text())
    val['categories'].reverse()
    (root / 'annotations/val.json').write_text(json.dumps(val))
    with pytest.raises(DataError, match=r'names and order must be the same'):
        load_config(COCO, root)
    with pytest.raises(DataError, match=r'in the order dust, cell, the config in the order cell, dust'):
        check_annotations(root / 'annotations/val.json', root / 'images', ['cell', 'dust'])
    val['categories'].append({'id': 9, 'name': 'dust'})
    (root / 'annotations/val.json').write_text(json.dumps(val))
    with pytest.raises(DataError, match=r'several categories named dust'):
        load_config(COCO, root)


def test_images_of_one_name_in_folders_that_say_nothing_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path, 'plain')
    for folder in ('one', 'two'):
        (root / folder).mkdir()
        (root / folder / 'b.png').write_bytes((root / 'images' / 'b.png').read_bytes())
    with pytest.raises(DataError, match=r'the images of val.json are in images, one, two; name the folder'):
        find_splits(root)


def test_every_head_gets_the_number_of_classes(tmp_path: Path) -> None:
    config = load_config(CASCADE, make(tmp_path, 'plain'))
    heads = config.model.roi_head
    assert [head.num_classes for head in heads.bbox_head] == [2, 2, 2]
    assert heads.mask_head.num_classes == 2


def test_the_classes_of_coco_change_nothing(tmp_path: Path, capsys: Any) -> None:
    from mmdet.datasets import CocoDataset

    root = make(tmp_path, 'coco', CocoDataset.METAINFO['classes'])
    config = load_config(COCO, root)
    assert config.model.bbox_head.num_classes == 80
    assert 'metainfo' not in config.train_dataloader.dataset
    assert 'fitted' not in capsys.readouterr().out


def test_classes_that_a_config_names_stay(tmp_path: Path) -> None:
    config = load_config(ROOT / 'det_configs/bccd/retinanet_r18-w32_fpn_bccd.py', make(tmp_path, 'plain'))
    assert config.train_dataloader.dataset.metainfo.classes == ('RBC', 'WBC', 'Platelets')
    with pytest.raises(DataError, match=r'has no category RBC, WBC, Platelets; it has cell, dust'):
        check_datasets(config, 'train_dataloader')


def test_names_that_a_config_leaves_to_coco_are_checked_as_any(tmp_path: Path) -> None:
    """Labels are numbered by the order of the file: these would be called person, bicycle, car."""
    config = load_config(COCO, options={'data_root': f'{make(tmp_path, "coco", ("dog", "cat", "person"))}/'})
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        config[loader].dataset.data_root = config.data_root
        with pytest.raises(DataError, match='has no category bicycle, car, motorcycle'):
            check_datasets(config, loader)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    root = make(tmp_path, 'plain')
    (root / 'annotations/val.json').rename(root / 'annotations/other.json')
    with pytest.raises(DataError, match=r'no annotation file for val: none of annotations/other.json.*valid.*expected'):
        load_config(COCO, root)
    (root / 'annotations/other.json').rename(root / 'annotations/val.json')
    (root / 'images/b.png').unlink()
    with pytest.raises(DataError, match=r'b.png, the first image of val.json, is in none of its folders'):
        find_splits(root)


def voc(root: Path, year: str, splits: dict[str, list[str]]) -> None:
    """A year of PASCAL VOC; the second object of every image is difficult."""
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / year / folder).mkdir(parents=True)
    for split, names in splits.items():
        (root / year / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names) + '\n')
        for name in names:
            Image.new('RGB', (50, 40)).save(root / year / f'JPEGImages/{name}.jpg')
            objects = ''.join(
                f'<object><name>{kind}</name><difficult>{hard}</difficult><bndbox><xmin>1</xmin><ymin>11</ymin>'
                '<xmax>10</xmax><ymax>40</ymax></bndbox></object>'
                for kind, hard in (('person', 0), ('cat', 1))
            )
            (root / year / f'Annotations/{name}.xml').write_text(
                f'<annotation><size><width>50</width><height>40</height></size>{objects}</annotation>'
            )


@pytest.mark.slow
def test_voc_is_converted_and_trains_like_any_set(tmp_path: Path, tool: Tool) -> None:
    voc(tmp_path, 'VOC2007', {'trainval': ['1', '2'], 'train': ['1'], 'val': ['2'], 'test': ['3']})
    voc(tmp_path, 'VOC2012', {'trainval': ['2012_1'], 'train': ['2012_1'], 'val': []})
    done = tool('prepare_data', 'voc', tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'train (trainval): 3 images, 6 boxes, 2 classes' in done.stdout
    assert 'val (test): 1 images, 2 boxes, 2 classes' in done.stdout
    content = json.loads((tmp_path / 'annotations/val.json').read_text())
    assert [c['name'] for c in content['categories']] == ['cat', 'person']
    first, second = content['annotations']
    assert first['bbox'] == [0, 10, 10, 30]  # pixels 1 to 10 and 11 to 40, counted from 0
    assert (first['area'], first['iscrowd'], second['iscrowd']) == (300, 0, 1)
    config = load_config(COCO, tmp_path)
    check_datasets(config, 'train_dataloader', 'val_dataloader')
    assert config.model.bbox_head.num_classes == 2
    checked = tool('prepare_data', 'check', tmp_path)
    assert 'images in ' in checked.stdout
    assert '3 images, 6 boxes, 2 classes' in checked.stdout


def test_voc_without_a_test_set_validates_on_val(tmp_path: Path) -> None:
    voc(tmp_path / 'year', '.', {'train': ['1'], 'val': ['2']})
    assert [line.split(':')[0] for line in convert_voc(tmp_path / 'year')] == ['train (train)', 'val (val)']


def test_what_is_wrong_with_voc_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='has no ImageSets/Main; expected ROOT'):
        convert_voc(tmp_path)
    voc(tmp_path, 'VOC2007', {'train': ['1'], 'val': ['2']})
    (tmp_path / 'VOC2007/JPEGImages/1.jpg').unlink()
    with pytest.raises(DataError, match=r'1\.jpg: no such image'):
        convert_voc(tmp_path)
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations/train.json').write_text('{}')
    with pytest.raises(DataError, match=r'train\.json: is there already; --overwrite'):
        convert_voc(tmp_path)
    (tmp_path / 'annotations/train.json').unlink()
    (tmp_path / 'VOC2007/Annotations/1.xml').write_text('<annotation>')
    with pytest.raises(DataError, match=r'1\.xml: is not a VOC annotation'):
        convert_voc(tmp_path)
