"""Testing detectors on two processes: the detections and numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.usefixtures('one_thread')]

from helpers.tiny_detection import as_file, tiny

from asr_downstream.console.processes import Processes
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.evaluation.evaluate import detect, own_batches
from asr_downstream.detection.evaluation.test import TestPlan, evaluate_checkpoint
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.errors import DataError

ASR = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
IMAGES = 5  # in batches of two: three batches, and MMEngine's sampler would test one image twice
TIMES = ('latency_ms', 'latency_ratio', 'versions')
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """Config of a tiny detector, its file, and a checkpoint with random weights, which finds some of the truth."""
    folder = tmp_path_factory.mktemp('processes')
    make_digits(folder / 'digits', sizes={'train': 2, 'val': IMAGES})
    options = {'test_dataloader.batch_size': 2, 'model.test_cfg.score_thr': 0.0}
    config = tiny(folder / 'digits', path=ASR, **options)
    torch.manual_seed(0)
    model = build_detector(config)
    randomise(model.backbone)
    path = folder / 'model.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    annotate(folder / 'digits' / 'annotations' / 'val.json', detect(config, model, 'truth')[1])
    return config, as_file(config, folder), path


def annotate(path: Path, found: dict[Any, Any]) -> None:
    """Make some of what a detector finds the truth, so that its AP is neither 0 nor 1."""
    content = json.loads(path.read_text())
    content['annotations'] = []
    for image, (boxes, _, labels) in found.items():
        large = ((boxes[:, 2:] - boxes[:, :2]) > 4).all(dim=1)
        pairs = list(zip(boxes[large].tolist(), labels[large].tolist(), strict=True))
        for (x, y, right, bottom), label in pairs[image % 3 :: 7][:8]:
            box = [x, y, right - x, bottom - y]
            about = {'id': len(content['annotations']) + 1, 'image_id': image, 'iscrowd': 0, 'area': box[2] * box[3]}
            content['annotations'].append({**about, 'bbox': box, 'category_id': content['categories'][label]['id']})
    path.write_text(json.dumps(content))


def run_test_det(start: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, '-W', 'ignore', *start, 'tools/test_det.py', *map(str, arguments)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)


def numbers(path: Path) -> Any:
    """Content of a ``test.json`` without times."""

    def cleared(value: Any) -> Any:
        return {k: cleared(v) for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value

    return cleared(json.loads(path.read_text()))


@pytest.mark.slow
def test_two_processes_find_what_one_does(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    config, file, checkpoint = trained
    text = evaluate_checkpoint(config, checkpoint, tmp_path / 'one' / 'test.json', TestPlan(folding='exact'))
    done = run_test_det(TORCHRUN, file, checkpoint, '--fold', '--work-dir', tmp_path / 'two', '--launcher', 'pytorch')
    assert done.returncode == 0, done.stderr
    found, expected = numbers(tmp_path / 'two' / 'test.json'), numbers(tmp_path / 'one' / 'test.json')
    assert found | {'config': ''} == expected | {'config': ''}
    assert 0 < found['unfolded']['AP'] < 1
    assert found['difference']['images'] == IMAGES
    assert found['difference']['pairs'] > 100
    assert done.stdout.count(f'{IMAGES} images') == text.count(f'{IMAGES} images') == 1


def test_batches_are_those_of_one_process(trained: tuple[Any, Path, Path]) -> None:
    config, _, _ = trained
    whole = [[s.img_id for s in batch['data_samples']] for batch in own_batches(config.test_dataloader, Processes())[0]]
    parts = []
    for index in range(2):
        loader, total = own_batches(config.test_dataloader, Processes(index, 2))
        assert total == len(whole) == 3
        parts.append([[s.img_id for s in batch['data_samples']] for batch in loader])
    assert parts == [whole[0::2], whole[1::2]]
    shuffled = {**config.test_dataloader, 'sampler': {'type': 'DefaultSampler', 'shuffle': True}}
    with pytest.raises(DataError, match='in the order of the set'):
        own_batches(shuffled, Processes(0, 2))


@pytest.mark.slow
def test_other_forms_of_a_test_are_shared_too(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    """Calibrated, with augmentation, classes and pictures, by the older launcher; and with another metric."""
    _, file, checkpoint = trained
    launch = ['-m', 'torch.distributed.launch', '--nproc_per_node=2', '--master_port=29731']
    words = (file, checkpoint, '--fold', 'calibrated', '--calibrate', 2, '--max-drop', 0.5, '--tta', '--per-class')
    pictures = []
    for name, start in (('one', []), ('two', launch)):
        out = tmp_path / name
        launcher = ('--launcher', 'pytorch') * bool(start)
        done = run_test_det(start, *words, '--work-dir', out, '--show-dir', out / 'pictures', *launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('AP by class') == 1
        pictures.append({path.name: path.read_bytes() for path in (out / 'pictures').iterdir()})
    assert numbers(tmp_path / 'two' / 'test.json') == numbers(tmp_path / 'one' / 'test.json')
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == IMAGES


@pytest.mark.slow
def test_a_launch_without_its_word_is_refused_by_each(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    _, file, checkpoint = trained
    done = run_test_det(TORCHRUN, file, checkpoint, '--work-dir', tmp_path)
    assert done.returncode == 1
    assert 'each would test alone: add --launcher pytorch' in done.stderr
    assert not (tmp_path / 'test.json').exists()
