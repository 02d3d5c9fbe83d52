"""Hostile inputs of detection: seeded mutations of annotation files, images, VOC and checkpoints.

Each ends in a result, or in one line that names the file; what is accepted, MMDetection's own data set can read.
"""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.detsets import HEIGHT, WIDTH, coco, tiny_set
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(60)]

from mmdet.datasets import CocoDataset

from asr_downstream.detection.data.coco import check_annotations
from asr_downstream.detection.data.convert.voc import convert_voc
from asr_downstream.detection.data.fit import find_splits
from asr_downstream.detection.data.headers import read_header
from asr_downstream.errors import AsrError

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, 10**400, float('nan'), float('inf'), '', 'x', '1', '\0', '../a', [], [1], {},
    [[[]]], {'a': 1}, [None] * 4, ['1'] * 4, [1, 2], [1e38] * 4,
)  # fmt: skip
VOC = (
    '<annotation><filename>a.jpg</filename><size><width>64</width><height>48</height></size><object><name>cat</name>'
    '<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>'
    '</annotation>'
)
BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + ''.join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip('abcdefgh', 'bcdefghi', strict=True))
    + ']><annotation><object><name>&i;</name></object></annotation>'
)


def mutated(draw: random.Random) -> Any:
    """A COCO file in which one value, somewhere, is replaced, removed or repeated."""
    content: Any = coco('train')
    node, key = content, draw.choice(list(content))
    for _ in range(draw.randrange(4)):
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        node, key = inner, draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    kind = draw.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = draw.choice(VALUES)
    return content


def ends(path: Path, act: Any) -> str | None:
    """Do something with a hostile file: what is refused is one line that names the file, or its folder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            act()
    except AsrError as error:
        return str(error)
    return None


@pytest.mark.parametrize('seed', range(40))
def test_mutated_annotations(seed: int, tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set')
    path = root / 'annotations/train.json'
    draw = random.Random(seed)
    for _ in range(5):
        content = mutated(draw)
        path.write_text(json.dumps(content))
        for act in (lambda: check_annotations(path, root / 'images'), lambda: find_splits(root)):
            said = ends(path, act)
            assert said is None or ('\n' not in said and str(root) in said), content
        if ends(path, lambda: check_annotations(path, root / 'images')) is None:
            dataset = CocoDataset(
                ann_file=str(path), data_prefix={'img': f'{root}/images/'}, lazy_init=True, pipeline=[],
                metainfo={'classes': tuple(c['name'] for c in content['categories'])},
            )  # fmt: skip
            assert all('img_path' in entry for entry in dataset.load_data_list())


@pytest.mark.parametrize(
    'data',
    [
        b'', b'\0', b'null', b'[]', b'{}', b'1', b'"x"', b'\xff\xfe{', b'{"images": 1}', b'[' * 50_000,
        b'{"a":' * 50_000,
        b'{"images": [], "annotations": [], "categories": [', b'{"images": {}, "annotations": {}, "categories": {}}',
        b'{"images": [1], "annotations": [], "categories": []}', b'9' * 10_000,
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": []}]}',
    ],
)  # fmt: skip
def test_files_that_are_no_annotations(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / 'train.json'
    path.write_bytes(data)
    said = ends(path, lambda: check_annotations(path, tmp_path))
    assert said is not None
    assert said.startswith(f'{path}: ')
    assert '\n' not in said


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'bmp', 'tiff', 'gif'])
def test_mutated_images(suffix: str, tmp_path: Path) -> None:
    """A header is read or is a problem; nothing else is raised, nothing is allocated."""
    path = tmp_path / f'a.{suffix}'
    Image.effect_noise((WIDTH, HEIGHT), 50).save(path)
    whole, draw = path.read_bytes(), random.Random(0)
    assert read_header(path).size == (WIDTH, HEIGHT)
    found = set()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(min(len(data), 200))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), 3, 30))])
        found.add(bool(read_header(path).problem))
    assert True in found


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('>1<', '>nan<'), ('>1<', '>inf<'), ('>1<', '>1e300<'), ('>1<', '><'), ('>1<', '>x<'), ('>9<', '>\ud7ff<'),
        ('>64<', '>640<'), ('>48<', '>-48<'), ('>64<', '>nan<'), ('>48<', '>inf<'), ('>cat<', '><'),
        ('<name>', '<nam>'),
        ('>0<', '>2.5<'), ('</annotation>', ''), (VOC, ''), (VOC, BOMB), (VOC, '<a>' * 5000),
        ('<annotation>', '<?xml version="1.0" encoding="nonsense"?><annotation>'),
        ('<annotation>', '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;'),
    ],
)  # fmt: skip
def test_hostile_voc(old: str, new: str, tmp_path: Path) -> None:
    for name in ('a', 'b'):
        Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / f'{name}.jpg')
        (tmp_path / f'{name}.xml').write_text(VOC if name == 'b' else VOC.replace(old, new))
    said = ends(tmp_path / 'a.xml', lambda: convert_voc(tmp_path, split=0.5))
    assert said is not None
    assert said.startswith(f'{tmp_path}/a.xml: ')
    assert '\n' not in said
    assert not (tmp_path / 'annotations').exists()


@pytest.mark.parametrize('name', ['/etc/passwd', '../outside.jpg', 'none.jpg', '.', ''])
def test_voc_names_no_file_outside(name: str, tmp_path: Path) -> None:
    root = tmp_path / 'set'
    root.mkdir()
    for path in (root / 'b.jpg', tmp_path / 'outside.jpg'):
        Image.new('RGB', (WIDTH, HEIGHT)).save(path)
    (root / 'a.xml').write_text(VOC.replace('a.jpg', name))
    (root / 'b.xml').write_text(VOC)
    said = ends(root / 'a.xml', lambda: convert_voc(root, split=0.5))
    assert said is not None
    assert 'no such image' in said
