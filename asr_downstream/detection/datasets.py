"""Any data set in COCO format: its files are found in the folder, its classes are read, and a config is made to fit.

A config for COCO then trains on blood cells, on what an annotation tool exported, or on a converted PASCAL VOC, with
``--data-root DIR`` alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.config import Config

from asr_downstream.detection.coco import Split, evaluators, leaves, path_of, read_annotations
from asr_downstream.errors import DataError
from asr_downstream.sites import some

__all__ = ['find_splits', 'fit_to_data']

# Words in the name of an annotation file, or of its folder, that say what it is for, the best first.
WORDS = {'train': ('train', 'trainval'), 'val': ('val', 'valid', 'validation', 'test')}
LOADERS = {'train_dataloader': 'train', 'val_dataloader': 'val', 'test_dataloader': 'val'}
TREE = 'DIR/ { annotations/{train,val}.json  images/ } or DIR/{train,valid}/ { _annotations.coco.json  *.jpg }'
COCO_CLASSES = tuple(CocoDataset.METAINFO['classes'])


def fit_to_data(config: Config, root: Path) -> str | None:
    """Make a config fit the COCO-format data set in ``root``, in place.

    Files that the config names and that are there are taken; others are looked for. Classes come from the annotation
    file, unless the config names them: then data loaders get them, and heads their number.

    Returns:
        What was found, for a person; None if the config fits as it is, or is not about such data.

    Raises:
        DataError: files are missing or cannot be told apart, the splits have other classes, or the config has no heads
            to change.
    """
    loaders = {name: list(leaves(config[name].dataset)) for name in LOADERS if config.get(name)}
    every = [leaf for of_loader in loaders.values() for leaf in of_loader]
    if not every or any(leaf.get('type') != 'CocoDataset' for leaf in every):
        return None
    said: list[str] = []
    for loader, of_loader in loaders.items():
        missing = [leaf for leaf in of_loader if not path_of(leaf).annotations.is_file()]
        if missing:
            said += [s for s in find_files(config, root, loader, of_loader) if s not in said]
    if not any((leaf.get('metainfo') or {}).get('classes') for leaf in every):
        classes = classes_of({name: path_of(of_loader[0]) for name, of_loader in loaders.items()})
        if classes != COCO_CLASSES:
            heads = count_classes(config, len(COCO_CLASSES), len(classes))
            for leaf in every:
                leaf['metainfo'] = {'classes': classes}
            said.append(f'{len(classes)} classes ({some(list(classes), 5)}), set in {heads} places of the model')
    return '; '.join(said) or None


def find_files(config: Config, root: Path, loader: str, of_loader: list[Any]) -> list[str]:
    """Find the files of one loader and set them, also in its evaluator; a missing training set is left to training."""
    split = LOADERS[loader]
    if len(of_loader) > 1:
        names = [str(path_of(leaf).annotations) for leaf in of_loader]
        raise DataError(f'{config.filename}: {loader} has several data sets, and not all are there: {some(names)}')
    try:
        found = find_splits(root, (split,))[split]
    except DataError:
        if split == 'train':
            return []
        raise
    of_loader[0].update(data_root='', ann_file=str(found.annotations), data_prefix={'img': f'{found.images}/'})
    for evaluator in evaluators(config, loader):
        if 'ann_file' in evaluator:
            evaluator['ann_file'] = str(found.annotations)
    return [f'{split}: {found.annotations}']


def classes_of(files: dict[str, Split]) -> tuple[str, ...]:
    """Names of the classes, in the order of the annotation files, which MMDetection numbers labels by.

    Raises:
        DataError: the splits differ in it.
    """
    smaller = files.get('val_dataloader') or files.get('test_dataloader') or next(iter(files.values()))
    classes = tuple(c['name'] for c in read_annotations(smaller.annotations)['categories'])
    train = files.get('train_dataloader')
    if train is None or classes == COCO_CLASSES or not train.annotations.is_file():
        return classes
    trained = tuple(c['name'] for c in read_annotations(train.annotations)['categories'])
    if trained != classes:
        raise DataError(
            f'{train.annotations} has the categories {some(list(trained))}, {smaller.annotations} has '
            f'{some(list(classes))}: names and order must be the same, since labels are numbered by them'
        )
    return classes


def count_classes(config: Config, old: int, new: int) -> int:
    """Set ``num_classes`` in every head that has the old number; returns how many there were.

    Raises:
        DataError: no head has the old number.
    """

    def change(node: Any) -> int:
        if isinstance(node, dict):
            mine = node.get('num_classes') == old
            if mine:
                node['num_classes'] = new
            return mine + sum(change(value) for value in node.values())
        return sum(map(change, node)) if isinstance(node, list | tuple) else 0

    changed = change(config.model)
    if not changed:
        raise DataError(
            f'{config.filename}: the data have {new} classes, but the model has no num_classes={old} to change; set '
            f'num_classes and metainfo=dict(classes=...) in the config'
        )
    return changed


def find_splits(root: Path, wanted: tuple[str, ...] = ('train', 'val')) -> dict[str, Split]:
    """Find the annotation files and images of a COCO-format data set.

    Raises:
        DataError: with what is there, and what is expected.
    """
    files = sorted({*root.glob('*.json'), *root.glob('*/*.json')})
    splits = {}
    for name in wanted:
        annotations = best(files, root, WORDS[name])
        if annotations is None:
            there = [str(path.relative_to(root)) for path in files]
            raise DataError(
                f'{root}: no annotation file for {name}: none of {some(there)} has {" or ".join(WORDS[name])} in its '
                f'name or folder; expected {TREE}'
            )
        splits[name] = Split(annotations, images_of(annotations, root, WORDS[name]))
    return splits


def words(text: str) -> list[str]:
    """Words of a name: ``instances_val2017`` has instances and val; ``trainval`` is a word of its own."""
    return re.split('[^a-z]+', text.lower())


def best(files: list[Path], root: Path, wanted: tuple[str, ...]) -> Path | None:
    """Pick the file whose name has one of the words, or else whose folder has; of several, that of instances."""
    for word in wanted:
        found = [path for path in files if word in words(path.stem)]
        found = found or [path for path in files if word in words(str(path.parent.relative_to(root)))]
        if found:
            return min(found, key=lambda path: ('instances' not in path.name, 'annotations' not in str(path), path))
    return None


def images_of(annotations: Path, root: Path, wanted: tuple[str, ...]) -> Path:
    """Folder that holds the images of an annotation file; of several, the one named for the split.

    Raises:
        DataError: there is none, or several that cannot be told apart.
    """
    names = [image['file_name'] for image in read_annotations(annotations)['images']]
    if not names:
        raise DataError(f'{annotations}: has no images')
    probes = {names[0], names[len(names) // 2], names[-1]}
    folders = [annotations.parent, root, *(p for depth in ('*', '*/*') for p in sorted(root.glob(depth)) if p.is_dir())]
    found = [f for f in dict.fromkeys(folders) if all((f / probe).is_file() for probe in probes)]
    if not found:
        raise DataError(f'{root}: {names[0]}, the first image of {annotations.name}, is in none of its folders')
    named = [f for f in found if set(wanted) & {w for part in f.relative_to(root).parts for w in words(part)}]
    if len(found) > 1 and len(named) != 1 and annotations.parent not in found:
        raise DataError(
            f'{root}: the images of {annotations.name} are in {some([str(f.relative_to(root)) for f in found])}; name '
            f'the folder that is meant: --cfg-options val_dataloader.dataset.data_prefix.img=... and likewise'
        )
    return named[0] if len(named) == 1 else found[0]
