"""Any data set in COCO format: its files are found in the folder, its classes are read, and a config is made to fit.

A config for COCO then trains on blood cells, on what an annotation tool exported, or on a converted PASCAL VOC, with
``--data-root DIR`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.config import Config

from asr_downstream.detection.coco import Split, leaves, path_of, read_annotations
from asr_downstream.errors import DataError
from asr_downstream.sites import some

__all__ = ['find_splits', 'fit_to_data']

# Words that say what an annotation file is for, the best first.
WORDS = {'train': ('train',), 'val': ('val', 'valid', 'validation', 'test')}
LOADERS = {'train_dataloader': 'train', 'val_dataloader': 'val', 'test_dataloader': 'val'}
TREE = 'DIR/ { annotations/{train,val}.json  images/ } or DIR/{train,valid}/ { _annotations.coco.json  *.jpg }'


def fit_to_data(config: Config, root: Path) -> str | None:
    """Make a config fit the COCO-format data set in ``root``, in place.

    Files that the config names and that are there are taken; others are looked for. Classes come from the annotation
    file, unless the config names them: then data loaders get them, and heads their number.

    Returns:
        What was found, for a person; None if the config fits as it is, or is not about such data.

    Raises:
        DataError: files are missing, or the config has no heads to change.
    """
    found: dict[str, list[Any]] = {}
    for loader, split in LOADERS.items():
        for leaf in leaves((config.get(loader) or {}).get('dataset') or {'datasets': []}):
            if leaf.get('type') != 'CocoDataset':
                return None
            found.setdefault(split, []).append(leaf)
    if not found:
        return None
    said = []
    named = [path_of(leaf) for of_split in found.values() for leaf in of_split]
    if not all(split.annotations.is_file() for split in named):
        splits = find_splits(root, tuple(found))
        for name, of_split in found.items():
            for leaf in of_split:
                leaf['data_root'] = ''
                leaf['ann_file'] = str(splits[name].annotations)
                leaf['data_prefix'] = {'img': f'{splits[name].images}/'}
            said.append(f'{name}: {splits[name].annotations}')
        for key in ('val_evaluator', 'test_evaluator'):
            if isinstance(config.get(key), dict) and 'val' in splits:
                config[key]['ann_file'] = str(splits['val'].annotations)
    every = [leaf for of_split in found.values() for leaf in of_split]
    if not any((leaf.get('metainfo') or {}).get('classes') for leaf in every):
        small = (found.get('val') or found['train'])[0]  # the smaller file
        classes = tuple(c['name'] for c in read_annotations(path_of(small).annotations)['categories'])
        if classes != tuple(CocoDataset.METAINFO['classes']):
            heads = count_classes(config, len(CocoDataset.METAINFO['classes']), len(classes))
            for leaf in every:
                leaf['metainfo'] = {'classes': classes}
            said.append(f'{len(classes)} classes ({some(list(classes), 5)}), set in {heads} places of the model')
    return '; '.join(said) or None


def count_classes(config: Config, old: int, new: int) -> int:
    """Set ``num_classes`` in every head that has the old number; returns how many there were.

    Raises:
        DataError: none.
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
        splits[name] = Split(annotations, images_of(annotations, root))
    return splits


def best(files: list[Path], root: Path, words: tuple[str, ...]) -> Path | None:
    """Pick the file whose name or folder has one of ``words``; of several, that of instances."""
    for word in words:
        found = [path for path in files if word in str(path.relative_to(root)).lower()]
        if found:
            return min(found, key=lambda path: ('instances' not in path.name, 'annotations' not in str(path), path))
    return None


def images_of(annotations: Path, root: Path) -> Path:
    """Folder from which the first image of an annotation file is found.

    Raises:
        DataError: there is none.
    """
    images = read_annotations(annotations)['images']
    if not images:
        raise DataError(f'{annotations}: has no images')
    first = images[0]['file_name']
    folders = [annotations.parent, root, *sorted(p for p in root.glob('*') if p.is_dir())]
    folders += sorted(p for p in root.glob('*/*') if p.is_dir())
    for folder in folders:
        if (folder / first).is_file():
            return folder
    raise DataError(f'{root}: {first}, the first image of {annotations.name}, is in none of its folders')
