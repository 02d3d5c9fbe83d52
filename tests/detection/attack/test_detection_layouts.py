"""Data sets as people have them: images elsewhere than the config says, broken files, flat VOC, heads of all kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, command
from helpers.detsets import flat_voc, tiny_set
from mmengine.config import Config

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(60)]

from mmdet.datasets import CocoDataset
from mmengine import hooks, runner

from asr_downstream.detection.config import load_config, set_data_root, stock_config
from asr_downstream.detection.data.coco import check_datasets, path_of
from asr_downstream.detection.data.fit import fit_to_data
from asr_downstream.detection.training import loops
from asr_downstream.detection.training import save as saving
from asr_downstream.detection.training.train import prepare
from asr_downstream.detection.types import kind_of
from asr_downstream.errors import DataError
from asr_downstream.registry import HOOKS, LOOPS

BCCD = ROOT / 'det_configs/bccd/retinanet_r18-w32_fpn_bccd.py'
COCO = ROOT / 'det_configs/retinanet/retinanet_r18_fpn_1x_coco.py'
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def test_a_broken_training_file_is_named(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set')
    (root / 'annotations/train.json').write_text('{"images": [')
    with pytest.raises(DataError, match=r'set/annotations/train.json: is not JSON'):
        check_datasets(load_config(COCO, root), 'train_dataloader')


def test_a_training_set_without_images_is_named_and_is_no_matter_to_a_test(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set')
    for path in (root / 'images').glob('train*'):
        path.unlink()
    config = load_config(COCO, root)
    check_datasets(config, 'test_dataloader')
    with pytest.raises(DataError, match=r'3 of the 3 images of train.json are missing'):
        check_datasets(config, 'train_dataloader')


def edited(tmp_path: Path, classes: tuple[str, ...]) -> Path:
    """The template of blood cells, with the names of other classes."""
    path = tmp_path / 'mine.py'
    heads = f'model = dict(bbox_head=dict(num_classes={len(classes)}))'
    loaders = '\n'.join(f'{loader} = dict(dataset=dict(metainfo=metainfo))' for loader in LOADERS)
    path.write_text(f'_base_ = {str(BCCD)!r}\nmetainfo = dict(classes={classes!r})\n{loaders}\n{heads}\n')
    return path


def test_images_are_found_where_the_annotations_have_the_name_of_the_config(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        flat_voc(tmp_path / 'VOC2007', f'{split}1', year=split)
    assert command('prepare_data', 'voc', tmp_path).returncode == 0
    config = load_config(edited(tmp_path, ('person',)), tmp_path)
    check_datasets(config, *LOADERS)
    assert path_of(config.train_dataloader.dataset).images.resolve() == tmp_path.resolve()
    assert Path(config.val_evaluator.ann_file) == tmp_path / 'annotations/val.json'


@pytest.mark.parametrize('folders', [('', ''), ('images', 'annotations'), ('JPEGImages', 'Annotations')])
def test_flat_voc_is_split_at_random_and_always_alike(folders: tuple[str, str], tmp_path: Path) -> None:
    names = [f'n{n}' for n in range(10)]
    contents = []
    for copy in ('a', 'b'):
        root = flat_voc(tmp_path / copy, *names, images=folders[0], annotations=folders[1])
        done = command('prepare_data', 'voc', root)
        assert done.returncode == 1
        assert '--split 0.8' in done.stderr
        done = command('prepare_data', 'voc', root, '--split', 0.8)
        assert done.returncode == 0, done.stderr
        assert 'train (0.8 at random): 8 images, 8 boxes, 2 classes' in done.stdout
        contents.append([(root / f'annotations/{s}.json').read_text() for s in ('train', 'val')])
        config = load_config(COCO, root)
        check_datasets(config, *LOADERS)
        assert config.model.bbox_head.num_classes == 2
    assert contents[0] == contents[1]
    train, val = ({i['file_name'] for i in json.loads(text)['images']} for text in contents[0])
    assert len(train | val) == 10
    assert command('prepare_data', 'voc', tmp_path / 'a', '--split', 0.8).returncode == 1, 'is there already'


@pytest.mark.parametrize('split', ['0', '1', '-0.5', 'nan', '80', 'x'])
def test_a_split_is_a_part(split: str, tmp_path: Path) -> None:
    done = command('prepare_data', 'voc', flat_voc(tmp_path, 'a', 'b'), f'--split={split}')
    assert done.returncode == 2
    assert 'should be between 0 and 1' in done.stderr


def test_heads_that_count_things_are_fitted(tmp_path: Path) -> None:
    classes = 80
    config = load_config(COCO)
    config.model = Config(
        dict(
            model=dict(
                type='Mask2Former',
                panoptic_head=dict(
                    type='Mask2FormerHead',
                    num_things_classes=classes,
                    num_stuff_classes=0,
                    num_queries=100,
                    loss_cls=dict(type='CrossEntropyLoss', class_weight=[1.0] * classes + [0.1]),
                ),
                panoptic_fusion_head=dict(type='MaskFormerFusionHead', num_things_classes=classes, num_stuff_classes=0),
            )
        )
    ).model
    root = tiny_set(tmp_path / 'set')
    config.data_root = f'{root}/'
    said = fit_to_data(config, root)
    head = config.model.panoptic_head
    assert head.num_things_classes == config.model.panoptic_fusion_head.num_things_classes == 2
    assert list(head.loss_cls.class_weight) == [1.0, 1.0, 0.1]
    assert (head.num_queries, head.num_stuff_classes) == (100, 0)
    assert '2 classes (cell, dust)' in str(said)


@pytest.mark.parametrize('name', ['mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'])
def test_mask2former_of_mmdetection_is_fitted_and_builds(name: str, tmp_path: Path) -> None:
    import mmdet

    path = Path(mmdet.__file__).parent / '.mim/configs' / name
    if not path.is_file():
        pytest.skip('the wheel of MMDetection has no configs')
    config = load_config(path, tiny_set(tmp_path / 'set'))
    head = config.model.panoptic_head
    assert head.num_things_classes == 2
    assert len(head.loss_cls.class_weight) == 3


def test_types_that_are_classes_are_known_as_their_names_are(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set')
    config = load_config(COCO)
    for loader in LOADERS:
        config[loader].dataset.type = CocoDataset
    config.train_cfg = {'type': runner.EpochBasedTrainLoop, 'max_epochs': 1}
    config.val_cfg = {'type': runner.ValLoop}
    config.default_hooks.checkpoint = {'type': hooks.CheckpointHook, 'interval': 1}
    set_data_root(config, root)
    assert '2 classes' in str(fit_to_data(config, root))
    config.fold_eval = True
    config.model.backbone.init_cfg = None  # else torchvision is asked for
    prepare(config, tmp_path / 'work')
    for made, kind in (
        (config.train_cfg, loops.EpochBasedTrainLoop),
        (config.val_cfg, loops.FoldedValLoop),
        (config.default_hooks.checkpoint, saving.CheckpointHook),
    ):
        registry = HOOKS if kind is saving.CheckpointHook else LOOPS
        assert registry.get(made.type) is kind
    stock = stock_config(config)
    assert (stock.train_cfg.type, stock.default_hooks.checkpoint.type) == ('EpochBasedTrainLoop', 'CheckpointHook')
    assert stock.train_dataloader.dataset.type is CocoDataset
    (root / 'annotations/train.json').write_text('{"images": [')
    with pytest.raises(DataError, match='is not JSON'):
        check_datasets(config, 'train_dataloader')


@pytest.mark.parametrize('name', ['CocoDataset', 'mmdet.CocoDataset', 'mmdet.datasets.coco.CocoDataset', CocoDataset])
def test_a_type_has_one_name(name: object) -> None:
    assert kind_of(name) == 'CocoDataset'
    assert kind_of('mine.CocoDataset') != 'CocoDataset'
    assert kind_of(type('CocoDataset', (CocoDataset,), {'__module__': 'mine'})) != 'CocoDataset'
