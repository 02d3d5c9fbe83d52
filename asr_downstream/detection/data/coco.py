"""COCO data: the expected tree, a checker, and a reader that says what is wrong with an annotation file."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.progress import Progress

from asr_downstream.console.text import some
from asr_downstream.detection.data.headers import examine_files
from asr_downstream.detection.data.headers import missing as missing_files
from asr_downstream.detection.data.soundness import Finding, examine, per_class
from asr_downstream.detection.types import kind_of
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import cannot_write, writable_folder

__all__ = [
    'Split',
    'check_annotations',
    'check_datasets',
    'check_tree',
    'evaluators',
    'examine_set',
    'leaves',
    'named_sets',
    'path_of',
    'read_annotations',
    'summary',
    'unpack',
]

SPLITS = ('train2017', 'val2017')
ARCHIVES = ('train2017.zip', 'val2017.zip', 'annotations_trainval2017.zip')
FIELDS = {
    'images': ('id', 'file_name', 'width', 'height'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name'),
}
SAMPLE = 2000  # images whose headers are read before a training or a test; all of them takes minutes on a slow disk
TREE = 'COCO_ROOT/ { annotations/instances_{train2017,val2017}.json  train2017/*.jpg  val2017/*.jpg }'


@dataclass(frozen=True)
class Split:
    """An annotation file and the folder that its ``file_name`` entries start from."""

    annotations: Path
    images: Path


def leaves(dataset: Any) -> Iterator[Any]:
    """Configs of the data sets inside of wrappers that mix or repeat them."""
    if 'dataset' in dataset:
        yield from leaves(dataset['dataset'])
    elif 'datasets' in dataset:
        for inner in dataset['datasets']:
            yield from leaves(inner)
    else:
        yield dataset


def evaluators(config: Config, loader: str) -> list[Any]:
    """Configs of the metrics that belong to a loader."""
    found = config.get(loader.replace('_dataloader', '_evaluator')) or []
    return list(found) if isinstance(found, list | tuple) else [found]


def path_of(leaf: Any) -> Split:
    """Files of a data set's config."""
    root = Path(leaf.get('data_root') or '')
    return Split(root / leaf.get('ann_file', ''), root / (leaf.get('data_prefix') or {}).get('img', ''))


def named_sets(config: Config, loader: str) -> list[str]:
    """Annotation files of a loader, from the folder of the data set on: ``['bccd/annotations/train.json']``.

    No folder of a machine is in them: of a file that lies elsewhere, it is the name alone.
    """
    dataset = (config.get(loader) or {}).get('dataset')
    root = Path(config.get('data_root') or '')
    found = []
    for leaf in leaves(dataset) if dataset else ():
        if leaf.get('ann_file'):
            path = path_of(leaf).annotations
            if root.name and path.is_relative_to(root):
                path = root.name / path.relative_to(root)
            found.append(path.name if path.is_absolute() else path.as_posix())
    return found


def read_annotations(path: Path, annotated: bool = True) -> dict[str, Any]:
    """Read a COCO detection file.

    Args:
        path: the file.
        annotated: whether annotations are needed. If not, a file of a test set, ``image_info_test.json``, will do: it
            has images and categories, and is given an empty list of annotations.

    Raises:
        DataError: it is missing, not JSON, or not COCO detection annotations.
    """
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob('*.json')) if path.parent.is_dir() else []
        hint = f'there is {some(near)}' if near else 'give the folder of the data set with --data-root'
        raise DataError(f'{path}: no such annotation file; {hint}')
    try:
        content = json.loads(path.read_bytes().decode('utf-8'))  # what pycocotools reads; others it does not
    except ValueError as error:
        raise DataError(f'{path}: is not JSON in UTF-8 ({error}); give a COCO detection file') from error
    except RecursionError as error:
        raise DataError(f'{path}: is not JSON (nested too deeply); give a COCO detection file') from error
    if isinstance(content, dict) and 'annotations' not in content and {'images', 'categories'} <= content.keys():
        if annotated:
            raise DataError(
                f'{path}: has images and no annotations, as files of test sets: nothing can be trained on it or scored '
                f'with it; give another one, or have the detections written: test_evaluator.format_only=True '
                f'test_evaluator.outfile_prefix=found'
            )
        content['annotations'] = []
    missing = [k for k in FIELDS if not isinstance(content, dict) or not isinstance(content.get(k), list)]
    if missing:
        raise DataError(
            f'{path}: is not a COCO detection file: it has no {", ".join(missing)}; '
            f'expected images, annotations (with id, image_id, category_id, bbox, area) and categories'
        )
    for key, fields in FIELDS.items():
        needed = set(fields)
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or not needed <= entry.keys():
                absent = [f for f in fields if not isinstance(entry, dict) or f not in entry]
                raise DataError(f'{path}: {key}[{index}] has no {", ".join(absent)}')
    names = [category['name'] for category in content['categories']]
    if odd := [name for name in names if not isinstance(name, str)]:
        raise DataError(f'{path}: has a category whose name is no text: {odd[0]!r:.80}')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f'{path}: has several categories named {some(twice)}; remove or rename those without boxes')
    return content


def examine_set(
    path: Path,
    images: Path,
    most: int | None = None,
    turn: bool = True,
    scored: bool = False,
    masks: bool = False,
    annotated: bool = True,
) -> tuple[dict[str, Any], list[Finding]]:
    """Read a COCO file and find everything that is wrong with it and with its images.

    Args:
        path: the file.
        images: folder that its ``file_name`` entries start from.
        most: number of images whose headers are read; default: all. That they are there is looked at for all.
        turn: whether images are turned as EXIF says when they are read.
        scored: whether COCO scores are computed with it.
        masks: whether its masks are used.
        annotated: whether annotations are needed.

    Raises:
        DataError: it cannot be read as such a file.
    """
    content = read_annotations(path, annotated)
    entries = [image for image in content['images'] if isinstance(image['file_name'], str)]
    absent = set(missing_files([entry['file_name'] for entry in entries], images))
    lost = [entry['file_name'] for entry in entries if entry['file_name'] in absent]
    findings = []
    if lost:
        text = f'{len(lost)} of the {len(content["images"])} images of {path.name} are missing: {some(lost, 3)}'
        findings.append(Finding(f'{images}: {text}'))
    findings += examine(content, scored, masks)
    there = [entry for entry in entries if entry['file_name'] not in absent]
    sized = [entry for entry in there if all(isinstance(entry[side], int | float) for side in ('width', 'height'))]
    findings += examine_files(sized, images, most, turn)  # the others are found by `examine`
    return content, findings


def check_annotations(
    path: Path,
    images: Path,
    classes: Iterable[str] | None = None,
    most: int | None = SAMPLE,
    turn: bool = True,
    scored: bool = False,
    masks: bool = False,
    annotated: bool = True,
) -> str:
    """Check that a COCO file is sound, that its images are there, and that it has the classes of the config.

    What MMDetection deals with by itself, such as boxes outside of their image, is a warning.

    Args:
        path: the file.
        images: folder that its ``file_name`` entries start from.
        classes: names that the config gives.
        most: number of images whose headers are read.
        turn: whether images are turned as EXIF says when they are read.
        scored: whether COCO scores are computed with it.
        masks: whether its masks are used.
        annotated: whether annotations are needed.

    Returns:
        One line: pictures, boxes, classes.

    Raises:
        DataError: with what is wrong or missing, where, and how much of it.
    """
    content, findings = examine_set(path, images, most, turn, scored, masks, annotated)
    if wrong := [finding.text for finding in findings if finding.wrong]:
        where = '' if wrong[0].startswith(str(images)) else f'{path}: '
        raise DataError(
            f'{where}{"; ".join(wrong)}; mend the file, or leave these out of it ("tools/prepare_data.py check FOLDER" '
            f'lists everything)'
        )
    if os.environ.get('RANK', '0') == '0':  # once a launch
        for finding in findings:
            warnings.warn(f'{path}: {finding.text}', stacklevel=2)
    names = {c['name'] for c in content['categories']}
    unknown = [c for c in classes or () if c not in names]
    if unknown:
        raise DataError(
            f'{path}: has no category {some(unknown, 3)}; it has {some(sorted(names), 10)}. '
            f'Set metainfo=dict(classes=...) in the config to the names of the file'
        )
    if classes is not None:
        order = [c['name'] for c in content['categories'] if c['name'] in set(classes)]
        if order != list(classes):
            raise DataError(
                f'{path}: has the categories in the order {some(order, 10)}, the config in the order '
                f'{some(list(classes), 10)}; labels are numbered by the order of the file: use that in metainfo'
            )
    return summary(content)


def summary(content: dict[str, Any], named: bool = False) -> str:
    """One line about a COCO file, on request with the boxes of each class."""
    counts = per_class(content)
    line = f'{len(content["images"])} images, {len(content["annotations"])} boxes, {len(counts)} classes'
    return line + (': ' + ', '.join(f'{name} {count:,}' for name, count in counts.items()) if named and counts else '')


def check_datasets(config: Config, *loaders: str) -> None:
    """Check the annotation files behind the named data loaders of a config, before a model is built."""
    from mmdet.datasets import CocoDataset

    for loader in loaders:
        for dataset in leaves((config.get(loader) or {}).get('dataset') or {'datasets': []}):
            if kind_of(dataset.get('type')) == 'CocoDataset':
                files = path_of(dataset)
                named = (dataset.get('metainfo') or {}).get('classes')
                classes = named or CocoDataset.METAINFO['classes']  # which it has without a word
                check_annotations(
                    files.annotations,
                    files.images,
                    classes,
                    turn=turns(dataset),
                    scored=any(map(is_coco_score, evaluators(config, loader))),
                    masks=uses_masks(config, loader, dataset),
                    annotated=loader == 'train_dataloader' or any(map(scores, evaluators(config, loader))),
                )
        for evaluator in evaluators(config, loader):
            truth = evaluator.get('ann_file')
            if truth and not Path(truth).is_file():
                raise DataError(f'{truth}: no such annotation file, but the evaluator of {loader} names it')


def is_coco_score(metric: Any) -> bool:
    """Whether a metric's config gives an annotation file to pycocotools."""
    return 'CocoMetric' in str(metric.get('type')) and bool(metric.get('ann_file')) and not metric.get('format_only')


def scores(metric: Any) -> bool:
    """Whether a metric's config compares detections with annotations; else it only writes them."""
    return not metric.get('format_only')


def uses_masks(config: Config, loader: str, dataset: Any) -> bool:
    """Whether the pipeline of a data set's config loads masks, or a metric of its loader scores them."""
    loads = any(step.get('with_mask') for step in dataset.get('pipeline') or () if isinstance(step, dict))
    return loads or any('segm' in (metric.get('metric') or ()) for metric in evaluators(config, loader))


def turns(dataset: Any) -> bool:
    """Whether the pipeline of a data set's config turns images as EXIF says, which is its default."""
    steps = [step for step in dataset.get('pipeline') or () if 'LoadImageFromFile' in str(step.get('type'))]
    kind = steps[0].get('color_type', 'color') if steps else 'color'
    return kind in ('color', 'grayscale')


def check_tree(root: Path) -> list[str]:
    """Check a COCO 2017 tree.

    Returns:
        One line a split.

    Raises:
        DataError: with everything that is missing.
    """
    lines, problems = [], []
    for split in SPLITS:
        try:
            summary = check_annotations(root / 'annotations' / f'instances_{split}.json', root / split, most=None)
            lines.append(f'{split}: {summary}')
        except DataError as error:
            problems.append(str(error))
    if problems:
        archives = [a for a in ARCHIVES if not (root / a).exists()]
        hint = f'expected {TREE}'
        if len(archives) < len(ARCHIVES):
            hint += f'; the archives in {root} can be unpacked with --unpack'
        raise DataError(f'{"; ".join(problems)}; {hint}')
    return lines


def unpack(root: Path) -> None:
    """Unpack the three COCO 2017 archives that lie in ``root``, each into place once it is complete.

    Raises:
        DataError: an archive is missing or damaged.
    """
    targets = {'train2017.zip': 'train2017', 'val2017.zip': 'val2017', 'annotations_trainval2017.zip': 'annotations'}
    wanted = {a: t for a, t in targets.items() if not (root / t).exists()}
    missing = [a for a in wanted if not (root / a).is_file()]
    if missing:
        raise DataError(f'{root}: {", ".join(missing)} not found; download from cocodataset.org into this folder')
    with Progress() as progress:
        for archive, target in wanted.items():
            building = writable_folder(root / f'.{target}.tmp')
            try:
                with zipfile.ZipFile(root / archive) as file:
                    members = file.infolist()
                    bar = progress.add_task(archive, total=len(members))
                    for member in members:
                        file.extract(member, building)
                        progress.advance(bar)
                (building / target).rename(root / target)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise DataError(f'{root / archive}: cannot be unpacked ({error}); download it again') from error
            except FileNotFoundError as error:
                raise DataError(f'{root / archive}: has no folder {target}; download it again') from error
            except OSError as error:
                raise cannot_write(root / target, error, sum(m.file_size for m in members)) from error
            finally:
                shutil.rmtree(building, ignore_errors=True)
