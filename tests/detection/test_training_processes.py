"""Training of detectors in two processes: the weights of one, and a stop of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from asr_downstream.detection.data.digits import make_digits
from asr_downstream.files.weights import read_checkpoint

ASR = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, sizes={'train': 24, 'val': 4})
    return root


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)['state_dict']


def fcos(tmp_path: Path) -> Path:
    """A config of a small FCOS on the digits. It has no batch statistics and no augmentation, and sums its normalisers
    over processes: two processes are one, but for rounding.
    """
    path = tmp_path / 'fcos.py'
    path.write_text(f"""
_base_ = '{ROOT / ASR}'
model = dict(
    type='FCOS',
    backbone=dict(norm_eval=True),
    bbox_head=dict(
        _delete_=True, type='FCOSHead', num_classes=10, in_channels=48, feat_channels=32, stacked_convs=1,
        strides=[8, 16], regress_ranges=((-1, 32), (32, 1e8)), norm_cfg=dict(type='GN', num_groups=4),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='IoULoss', loss_weight=1.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(_delete_=True),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9))
param_scheduler = []
val_dataloader = None
val_evaluator = None
val_cfg = None
""")
    return path


@pytest.mark.slow
@pytest.mark.parametrize('spec', ['ASR', 'DIA'])
def test_two_processes_give_the_weights_of_one_with_the_same_global_batch(
    digits: Path, tmp_path: Path, spec: str
) -> None:
    config = fcos(tmp_path)
    options = ['train_cfg.max_epochs=2', 'default_hooks.checkpoint.interval=2', 'train_dataloader.num_workers=0']
    options += ['train_dataloader.persistent_workers=False', 'log_level=ERROR']
    if spec == 'DIA':
        options += ['model.backbone.plug.type=DIA', 'model.backbone.plug.attention.type=DIALSTM']
        options += ['model.backbone.plug.attention.reduction=4']
    found = {}
    for processes, batch in ((1, 8), (2, 4)):
        work = tmp_path / str(processes)
        command = ['tools/dist_train.sh', config, processes, '--data-root', digits, '--work-dir', work]
        command += ['--cfg-options', *options, f'train_dataloader.batch_size={batch}']
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = weights(work / 'epoch_2.pth')
    start = {k: v for k, v in found[1].items() if v.is_floating_point()}
    for key, value in start.items():
        torch.testing.assert_close(found[2][key], value, atol=1e-5, rtol=1e-4, msg=key)
    assert any('gate' in key or 'shared_attention' in key for key in start)


@pytest.mark.slow
def test_ctrl_c_of_two_processes_leaves_a_run_that_resumes(digits: Path, tmp_path: Path) -> None:
    options = ['train_cfg.max_epochs=40', 'train_dataloader.batch_size=4', 'train_dataloader.num_workers=0']
    options += ['train_dataloader.persistent_workers=False', 'default_hooks.checkpoint.interval=50']
    command = ['tools/dist_train.sh', ASR, '2', '--data-root', str(digits), '--work-dir', str(tmp_path)]
    env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    log = tmp_path / 'out.txt'
    with log.open('w') as out:
        process = subprocess.Popen(
            [*command, '--cfg-options', *options], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while 'Epoch(train)' not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
    stopped = tmp_path / (tmp_path / 'last_checkpoint').read_text()
    assert stopped.name.startswith('stopped_iter_'), log.read_text()[-2000:]
    step = int(stopped.stem.rpartition('_')[2])
    done = subprocess.run(
        [*command, '--resume', '--cfg-options', f'train_cfg.max_epochs={step // 3 + 2}', *options[1:]],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
