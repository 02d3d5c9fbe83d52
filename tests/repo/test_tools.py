"""The command line tools on real data: good input in processes of their own, bad input in this one.

A tool imports for longer than it needs to refuse something.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from asr_downstream.detection.data.coco import check_annotations
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.errors import DataError
from asr_downstream.files.weights import read_checkpoint

PLUGGED = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
STOCK = 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
SHORT = ('train_cfg.max_epochs=1', 'train_dataloader.batch_size=4', 'default_hooks.checkpoint.interval=1')
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py') if path.stem not in ('setup_env', 'stock_only'))
Tool = Callable[..., object]


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, sizes={'train': 16, 'val': 6})
    return root


@pytest.fixture(scope='module')
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of one epoch, trained once through the tool."""
    import subprocess
    import sys

    work = tmp_path_factory.mktemp('work')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', 'tools/train_det.py', PLUGGED, '--data-root', str(digits), '--work-dir',
         str(work), '--cfg-options', *SHORT],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'backbone.layer1.0.bn2' in done.stdout + done.stderr
    checkpoint = work / 'epoch_1.pth'
    assert f'last checkpoint: {checkpoint}' in done.stdout
    return checkpoint


@pytest.mark.slow
def test_test_det_compares_unfolded_and_folded(tool: Tool, digits: Path, trained: Path, tmp_path: Path) -> None:
    done = tool('test_det', PLUGGED, trained, '--fold', '--data-root', digits, '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ('AP50', 'APl', 'parameters', 'GMACs', 'median latency', 'boxes, px', 'scores'):
        assert row in done.stdout
    found = json.loads((tmp_path / 'test.json').read_text())
    assert found['difference']['images'] == 6
    assert found['difference']['unmatched'] == 0
    assert found['difference']['boxes_px'] < 0.01
    assert found['folded']['parameters'] == found['unfolded']['parameters'] - 1806
    for name in ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'):
        assert found['folded'][name] == found['unfolded'][name]


@pytest.mark.parametrize('suffix', [pytest.param('.pth', marks=pytest.mark.slow), '.safetensors'])
def test_fold_ships_what_plain_mmdetection_loads(
    tool: Tool, digits: Path, trained: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f'detector{suffix}'
    done = command('fold', PLUGGED, trained, out)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'fold_report.json').read_text())
    assert len(report['sites']) == 6
    assert report['feature_map_difference']['float64']['relative'] < 1e-10
    assert report['feature_map_difference']['float32']['relative'] < 1e-4
    assert report['versions']['torch'].startswith(torch.__version__.split('+')[0])
    assert len(report['folded']['sha256']) == 64
    assert 'asr_downstream' not in out.with_suffix('.py').read_text()
    loaded = tool('test_stock', out.with_suffix('.py'), out)
    assert loaded.returncode == 0, loaded.stderr
    assert 'loaded strictly into mmdet.models.detectors.retinanet.RetinaNet' in loaded.stdout
    # Negative control: a checkpoint with gates does not load there.
    if suffix == '.pth':
        gated = tmp_path / 'gated' / 'detector.pth'
        gated.parent.mkdir()
        torch.save({'state_dict': read_checkpoint(trained)['state_dict']}, gated)
        refused = tool('test_stock', out.with_suffix('.py'), gated)
        assert refused.returncode != 0
        assert 'Unexpected key' in refused.stderr
        shutil.rmtree(gated.parent)
        names = ['README.md', 'detector.pth', 'detector.py', 'fold_report.json']
        assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.slow
def test_training_resumes(tool: Tool, digits: Path, trained: Path, tmp_path: Path) -> None:
    work = tmp_path / 'work'
    shutil.copytree(trained.parent, work)
    (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
    options = ('--cfg-options', 'train_cfg.max_epochs=2', *SHORT[1:])
    done = tool('train_det', PLUGGED, '--data-root', digits, '--work-dir', work, '--resume', *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (work / 'epoch_2.pth').exists()
    assert 'resumed epoch: 1' in done.stdout + done.stderr


def test_dry_run_says_what_would_happen(digits: Path, tmp_path: Path) -> None:
    done = command('train_det', PLUGGED, '--data-root', digits, '--work-dir', tmp_path / 'w', '--dry-run')
    assert done.returncode == 0, done.stderr
    for text in ('backbone.layer3.1.bn2', '1,806 fold away', '16 images', '10 epochs of 2 steps'):
        assert text in done.stdout
    assert not (tmp_path / 'w').exists()


def test_digits_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        make_digits(tmp_path / name, seed, sizes={'train': 3, 'val': 3})
    files = {n: {p.name: p.read_bytes() for p in (tmp_path / n).rglob('*.*')} for n in 'abc'}
    assert files['a'] == files['b']
    assert len(files['a']) == 5  # three names of pictures, shared by the splits, and two annotation files
    assert files['a']['000000.png'] != files['c']['000000.png']
    done = command('prepare_data', 'digits', tmp_path / 'd')
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / 'd/annotations/train.json').read_text())
    assert len(content['images']) == 480
    for a in content['annotations']:
        x, y, w, h = a['bbox']
        assert min(x, y) >= 0
        assert max(x + w, y + h) <= 160
        assert min(w, h) >= 3


def coco_tree(root: Path) -> Path:
    image = {'id': 1, 'file_name': '1.jpg', 'width': 8, 'height': 8}
    box = {'id': 1, 'image_id': 1, 'category_id': 1, 'bbox': [1, 1, 3, 3], 'area': 9, 'iscrowd': 0}
    content = {'images': [image], 'annotations': [box], 'categories': [{'id': 1, 'name': 'cat'}]}
    for split in ('train2017', 'val2017'):
        (root / split).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(root / split / '1.jpg')
        (root / 'annotations').mkdir(exist_ok=True)
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(content))
    return root


def test_coco_is_checked_and_unpacked(tmp_path: Path) -> None:
    root = coco_tree(tmp_path / 'coco')
    nested = json.loads((root / 'annotations/instances_val2017.json').read_text())
    nested['images'][0]['file_name'] = 'sub/1.jpg'
    (root / 'nested').mkdir()
    (root / 'nested/1.jpg').touch()
    (root / 'nested.json').write_text(json.dumps(nested))
    with pytest.raises(DataError, match='sub/1.jpg'):
        check_annotations(root / 'nested.json', root / 'nested')
    (root / 'nested/sub').mkdir()
    Image.new('RGB', (8, 8)).save(root / 'nested/sub/1.jpg')
    assert check_annotations(root / 'nested.json', root / 'nested') == '1 images, 1 boxes, 1 classes'
    done = command('prepare_data', 'coco', root)
    assert done.returncode == 0, done.stderr
    assert 'val2017: 1 images, 1 boxes, 1 classes' in done.stdout

    packed = tmp_path / 'packed'
    packed.mkdir()
    for name, folder in (
        ('train2017', 'train2017'),
        ('val2017', 'val2017'),
        ('annotations_trainval2017', 'annotations'),
    ):
        shutil.make_archive(str(packed / name), 'zip', root, folder)
    hint = command('prepare_data', 'coco', packed)
    assert hint.returncode == 1
    assert '--unpack' in hint.stderr
    assert command('prepare_data', 'coco', packed, '--unpack').returncode == 0

    (root / 'val2017/1.jpg').unlink()
    done = command('prepare_data', 'coco', root)
    assert done.returncode == 1
    assert '1 of the 1 images of instances_val2017.json are missing: 1.jpg' in done.stderr


def check_one_line(done: object, *texts: str) -> None:
    """The contract for bad input: exit code 1, one line on stderr, naming what, where and what to do."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert 'Traceback' not in done.stderr
    for text in texts:
        assert text in lines[0], lines[0]


class TestBadInput:
    def test_missing_checkpoint(self, tmp_path: Path, digits: Path) -> None:
        out = tmp_path / 'a.pth'
        check_one_line(command('fold', PLUGGED, tmp_path / 'none.pth', out), 'none.pth: no such checkpoint')
        assert not list(tmp_path.iterdir())

    def test_truncated_checkpoint(self, tmp_path: Path, trained: Path) -> None:
        broken = tmp_path / 'broken.pth'
        broken.write_bytes(trained.read_bytes()[:5000])
        check_one_line(
            command('fold', PLUGGED, broken, tmp_path / 'out/a.pth'), 'broken.pth: is damaged', 'train it again'
        )
        assert not (tmp_path / 'out').exists()

    def test_checkpoint_of_another_architecture(self, tmp_path: Path, trained: Path) -> None:
        config = 'det_configs/retinanet/retinanet_r18-asr-se-c3-c5_fpn_1x_coco.py'
        check_one_line(command('fold', config, trained, tmp_path / 'a.pth'), 'made for another model', 'use the config')

    def test_folded_checkpoint(self, tmp_path: Path, trained: Path, digits: Path) -> None:
        out = tmp_path / 'a.pth'
        assert command('fold', PLUGGED, trained, out).returncode == 0
        check_one_line(command('fold', PLUGGED, out, tmp_path / 'b.pth'), 'was folded already', 'stock config')
        assert not (tmp_path / 'b.pth').exists()
        again = command('fold', STOCK, out, tmp_path / 'b.pth')
        assert again.returncode == 0, again.stderr
        assert 'nothing to fold' in again.stdout

    def test_fold_overwrites_neither_checkpoint_nor_config(self, tmp_path: Path, trained: Path, digits: Path) -> None:
        check_one_line(command('fold', PLUGGED, trained, trained), 'would overwrite', 'another name')
        config = tmp_path / 'mine.py'
        text = f"_base_ = '{(ROOT / PLUGGED).as_posix()}'"
        config.write_text(text)
        check_one_line(command('fold', config, trained, tmp_path / 'mine.pth'), 'would overwrite', 'mine.py')
        assert config.read_text() == text
        # Folding reads no data: a data root that is not there is no obstacle.
        done = command('fold', config, trained, tmp_path / 'out/a.pth', ASR_DATA_ROOT=str(tmp_path / 'none'))
        assert done.returncode == 0, done.stderr

    def test_unsafe_pretrained_weights(self, tmp_path: Path, digits: Path) -> None:
        path = tmp_path / 'unsafe.pth'
        torch.save({'state_dict': {'w': torch.ones(1)}, 'extra': Path('x')}, path)
        options = ('--cfg-options', f'model.backbone.init_cfg.checkpoint={path}')
        check_one_line(command('train_det', PLUGGED, '--data-root', digits, *options), 'do not fit', 'init_cfg')
        config = tmp_path / 'mine.py'
        init_cfg = dict(type='Pretrained', checkpoint=str(path), _delete_=True)
        config.write_text(f"_base_ = '{(ROOT / PLUGGED).as_posix()}'\nmodel = dict(backbone=dict(init_cfg={init_cfg}))")
        done = command('train_det', config, '--data-root', digits, '--work-dir', tmp_path / 'w')
        check_one_line(done, 'can run code', '--trust')

    def test_unsafe_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / 'unsafe.pth'
        torch.save({'state_dict': {'w': torch.ones(1)}, 'extra': Path('x')}, path)
        check_one_line(command('fold', PLUGGED, path, tmp_path / 'a.pth'), 'can run code', '--trust')

    @pytest.mark.parametrize('content', ['{"images": []}', 'not json', '[1]'])
    def test_annotations_that_are_not_coco(self, tmp_path: Path, digits: Path, content: str) -> None:
        root = tmp_path / 'digits'
        shutil.copytree(digits, root)
        (root / 'annotations/train.json').write_text(content)
        done = command('train_det', PLUGGED, '--data-root', root, '--work-dir', tmp_path / 'w')
        check_one_line(done, 'train.json: is not')
        assert not (tmp_path / 'w').exists()

    def test_other_classes(self, tmp_path: Path, digits: Path) -> None:
        root = tmp_path / 'digits'
        shutil.copytree(digits, root)
        path = root / 'annotations/train.json'
        path.write_text(path.read_text().replace('"name": "7"', '"name": "seven"'))
        check_one_line(command('train_det', PLUGGED, '--data-root', root, '--dry-run'), 'no category 7', 'metainfo')

    def test_unreadable_image(self, tmp_path: Path, digits: Path, trained: Path) -> None:
        root = tmp_path / 'digits'
        shutil.copytree(digits, root)
        (root / 'val/000002.png').write_bytes(b'this is no picture')
        done = command('test_det', PLUGGED, trained, '--data-root', root, '--work-dir', tmp_path / 'w')
        check_one_line(done, '000002.png: cannot be read as an image')
        assert not (tmp_path / 'w').exists()

    def test_misspelt_attention(self, digits: Path, tmp_path: Path) -> None:
        options = ('--cfg-options', 'model.backbone.plug.attention.type=SEE')
        done = command('train_det', PLUGGED, '--data-root', digits, '--work-dir', tmp_path / 'w', *options)
        check_one_line(done, "unknown attention 'SEE'", "did you mean 'SE'")

    def test_no_permission(self, tmp_path: Path, trained: Path, digits: Path) -> None:
        """A file where the folder should be: root may write anywhere else."""
        (tmp_path / 'file').touch()
        check_one_line(command('fold', PLUGGED, trained, tmp_path / 'file/a.pth'), 'cannot be written')
        done = command('train_det', PLUGGED, '--data-root', digits, '--work-dir', tmp_path / 'file/w')
        check_one_line(done, 'cannot be written')

    def test_missing_data_config_and_resume(self, tmp_path: Path, digits: Path) -> None:
        check_one_line(command('train_det', PLUGGED, '--data-root', tmp_path / 'none'), 'none: no such data folder')
        check_one_line(command('train_det', 'none.py'), 'none.py: no such config')
        done = command('train_det', PLUGGED, '--data-root', digits, '--work-dir', tmp_path, '--resume')
        check_one_line(done, 'has no checkpoint to resume from')


@pytest.mark.parametrize('name', TOOLS)
def test_help_teaches(tool: Tool, name: str) -> None:
    stock = name.endswith('_stock')  # these refuse this package wherever they are imported
    done = tool(name, '--help') if stock else command(name, '--help')
    assert done.returncode == 0
    assert f'python tools/{name}.py' in done.stdout
