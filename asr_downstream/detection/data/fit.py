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

from asr_downstream.console.text import some
from asr_downstream.detection.data.coco import Split, evaluators, leaves, path_of, read_annotations
from asr_downstream.detection.types import kind_of
from asr_downstream.errors import DataError

__all__ = ['find_splits', 'fit_to_data']

# Words in the name of an annotation file, or of its folder, that say what it is for, the best first.
WORDS = {'train': ('train', 'trainval'), 'val': ('val', 'valid', 'validation', 'test')}
# What heads call the number of classes.
COUNTS = ('num_classes', 'num_things_classes')
LARGE = 64_000_000  # bytes of an annotation file that takes seconds to read
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
    if not every or any(kind_of(leaf.get('type')) != 'CocoDataset' for leaf in every):
        return None
    said: list[str] = []
    for loader, of_loader in loaders.items():
        missing = [leaf for leaf in of_loader if not path_of(leaf).annotations.is_file()]
        if missing:
            said += [s for s in find_files(config, root, loader, of_loader) if s not in said]
        elif len(of_loader) == 1 and not has_images(path_of(of_loader[0])):
            said += [s for s in find_images(root, loader, of_loader[0]) if s not in said]
    if not any((leaf.get('metainfo') or {}).get('classes') for leaf in every):
        classes = classes_of({name: path_of(of_loader[0]) for name, of_loader in loaders.items()})
        if classes != COCO_CLASSES:
            heads = count_classes(config, len(COCO_CLASSES), len(classes))
            for leaf in every:
                leaf['metainfo'] = {'classes': classes}
            said.append(f'{len(classes)} classes ({some(list(classes), 5)}), set in {heads} places of the model')
    return '; '.join(said) or None


def has_images(files: Split) -> bool:
    """Whether the images of an annotation file are where a config has them, as far as that is known in no time."""
    if not files.images.is_dir():
        return False
    if files.annotations.stat().st_size > LARGE:
        return True
    try:
        return all((files.images / name).is_file() for name in probes(files.annotations))
    except DataError:  # is said where the file is used
        return True


def find_images(root: Path, loader: str, leaf: Any) -> list[str]:
    """Find the images of an annotation file that is where the config has it; what is not found is said later."""
    annotations = path_of(leaf).annotations
    try:
        images = images_of(annotations, root, WORDS[LOADERS[loader]])
    except DataError:
        return []
    leaf.update(data_root='', ann_file=str(annotations), data_prefix={'img': f'{images}/'})
    return [f'{LOADERS[loader]}: images in {images}']


def find_files(config: Config, root: Path, loader: str, of_loader: list[Any]) -> list[str]:
    """Find the files of one loader and set them, also in its evaluator.

    A training set that is missing or unsound is left to training, which says so: a test does not need it.
    """
    split = LOADERS[loader]
    if len(of_loader) > 1:
        names = [str(path_of(leaf).annotations) for leaf in of_loader]
        raise DataError(f'{config.filename}: {loader} has several data sets, and not all are there: {some(names)}')
    try:
        found = find_splits(root, (split,))[split]
    except DataError:
        annotations = best(annotation_files(root), root, WORDS[split])
        if split != 'train':
            raise
        if annotations is None:
            return []
        found = Split(annotations, path_of(of_loader[0]).images)
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
    classes = tuple(c['name'] for c in read_annotations(smaller.annotations, annotated=False)['categories'])
    train = files.get('train_dataloader')
    if train is None or classes == COCO_CLASSES or not train.annotations.is_file():
        return classes
    trained = tuple(c['name'] for c in read_annotations(train.annotations, annotated=False)['categories'])
    if trained != classes:
        raise DataError(
            f'{train.annotations} has the categories {some(list(trained))}, {smaller.annotations} has '
            f'{some(list(classes))}: names and order must be the same, since labels are numbered by them'
        )
    return classes


def count_classes(config: Config, old: int, new: int) -> int:
    """Set the number of classes in every head that has the old number, and weights of classes; returns how many heads.

    Raises:
        DataError: no head has the old number.
    """

    def change(node: Any, within: bool = False) -> int:
        if isinstance(node, list | tuple):
            return sum(change(value, within) for value in node)
        if not isinstance(node, dict):
            return 0
        mine = [key for key in COUNTS if node.get(key) == old]
        for key in mine:
            node[key] = new
        within = within or bool(mine)
        weights = node.get('class_weight')
        if within and isinstance(weights, list | tuple) and len(weights) >= old:  # stuff and no object come last
            node['class_weight'] = [*weights[:1] * new, *weights[old:]]
        return bool(mine) + sum(change(value, within) for value in node.values())

    changed = change(config.model)
    if not changed:
        raise DataError(
            f'{config.filename}: the data have {new} classes, but the model has no {" or ".join(COUNTS)} of {old} to '
            f'change; set it and metainfo=dict(classes=...) in the config'
        )
    return changed


def annotation_files(root: Path) -> list[Path]:
    """JSON files in a folder and in the folders in it."""
    return sorted({*root.glob('*.json'), *root.glob('*/*.json')})


def find_splits(root: Path, wanted: tuple[str, ...] = ('train', 'val')) -> dict[str, Split]:
    """Find the annotation files and images of a COCO-format data set.

    Raises:
        DataError: with what is there, and what is expected.
    """
    files = annotation_files(root)
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


def probes(annotations: Path) -> list[str]:
    """First, middle and last image of an annotation file.

    Raises:
        DataError: it has none.
    """
    names = [image['file_name'] for image in read_annotations(annotations, annotated=False)['images']]
    if not names:
        raise DataError(f'{annotations}: has no images')
    if odd := [name for name in names if not isinstance(name, str)]:
        raise DataError(f'{annotations}: has an image whose file_name is no text: {odd[0]!r:.80}')
    return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))


def images_of(annotations: Path, root: Path, wanted: tuple[str, ...]) -> Path:
    """Folder that holds the images of an annotation file; of several, the one named for the split.

    Raises:
        DataError: there is none, or several that cannot be told apart.
    """
    names = probes(annotations)
    folders = [annotations.parent, root, *(p for depth in ('*', '*/*') for p in sorted(root.glob(depth)) if p.is_dir())]
    found = [f for f in dict.fromkeys(folders) if all((f / name).is_file() for name in names)]
    if not found:
        raise DataError(f'{root}: {names[0]}, the first image of {annotations.name}, is in none of its folders')
    named = [f for f in found if set(wanted) & {w for part in f.relative_to(root).parts for w in words(part)}]
    if len(found) > 1 and len(named) != 1 and annotations.parent not in found:
        raise DataError(
            f'{root}: the images of {annotations.name} are in {some([str(f.relative_to(root)) for f in found])}; name '
            f'the folder that is meant: --cfg-options val_dataloader.dataset.data_prefix.img=... and likewise'
        )
    return named[0] if len(named) == 1 else found[0]
