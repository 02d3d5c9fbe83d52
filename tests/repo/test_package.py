"""The package as such: what it imports, what it says without its extras, and its benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(blocked=blocked) + code
    return subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_core_works_without_its_extras() -> None:
    done = python(
        'import torch, asr_downstream as a\n'
        'from asr_downstream.models import resnet56\n'
        "m = resnet56().eval(); a.plug(m, dict(type='ASR', attention=dict(type='SE')))\n"
        'f, report = a.fold(m); print(report, a.verify(m, f, torch.randn(2, 3, 32, 32)).relative < 1e-5)\n',
        {'mmcv', 'mmdet', 'diffusers', 'accelerate', 'transformers', 'pycocotools', 'sklearn', 'torchvision', 'timm'},
    )
    assert done.stdout == 'folded 27 sites of ResNet True\n', done.stderr


def test_attention_is_replaced_and_pruned_without_the_extras() -> None:
    done = python(
        'import torch\n'
        'from asr_downstream import far\n'
        'layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)\n'
        'm = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()\n'
        "far.replace(m, dict(type='FAR')); far.cut(m, far.Budget('units', 0.5))\n"
        'print(m(torch.randn(1, 5, 16)).shape, sum(row.units for row in far.describe(m).rows))\n',
        {'mmcv', 'mmdet', 'diffusers', 'accelerate', 'transformers', 'matplotlib', 'sklearn', 'torchvision', 'timm'},
    )
    assert done.stdout == 'torch.Size([1, 5, 16]) 32\n', done.stderr


@pytest.mark.parametrize('missing', ['mmdet', pytest.param('mmcv', marks=pytest.mark.det)])
def test_a_missing_extra_prints_how_to_install_it(missing: str) -> None:
    done = python('import asr_downstream.detection', {missing})
    assert done.returncode != 0
    assert f"needs the extra det (No module named '{missing}')" in done.stderr
    assert "pip install -c constraints.txt -e '.[det]'" in done.stderr


@pytest.mark.slow
@pytest.mark.det
@pytest.mark.parametrize('first', ['asr_downstream.detection', 'mmdet.models.dense_heads'])
def test_mmdetection_is_mended_whoever_imports_it(first: str) -> None:
    pytest.importorskip('mmdet')
    done = python(
        f'import {first}, asr_downstream.detection\n'
        "print('mmdet' in sys.modules)\n"
        'from mmdet.models.dense_heads import SSDHead\n'
        'print(SSDHead.loss_cls)\n',
        {'nothing'},
    )
    assert done.stdout.splitlines()[-2:] == [str(first.startswith('mmdet')), 'None'], done.stderr


# What the extra det does not bring, and the others do.
ELSEWHERE = {
    'accelerate',
    'datasets',
    'diffusers',
    'onnx',
    'onnxruntime',
    'onnxscript',
    'pydantic',
    'torchmetrics',
    'transformers',
}


@pytest.mark.det
def test_detection_needs_its_own_extra_alone(tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    from asr_downstream.detection.data.digits import make_digits

    make_digits(tmp_path, sizes={'train': 8, 'val': 4})
    done = python(
        'import importlib, pkgutil\n'
        'import asr_downstream.detection as package\n'
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        '    importlib.import_module(module.name)\n'
        'from asr_downstream.commands.main import main\n'
        f"main(['train-det', 'retinanet_r18-w16-asr-se_fpn_digits', '--dry-run', '--data-root', {str(tmp_path)!r}])\n",
        ELSEWHERE,
    )
    assert done.returncode == 0, done.stderr
    assert 'backbone.layer3.1.bn2' in done.stdout


def test_importing_reaches_no_network() -> None:
    done = python(
        'import socket\n'
        'def refuse(*a, **k): raise AssertionError("network")\n'
        'socket.socket.connect = refuse\n'
        'import asr_downstream, asr_downstream.models\n',
        {'requests'},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_benchmark_measures_all_arms(tool: Callable[..., object], tmp_path: Path) -> None:
    done = tool('benchmark', 'plug', '--rounds', '1', '--case', '56', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    case = json.loads((tmp_path / 'plug.json').read_text())['cases'][0]
    assert max(case['agreement'].values()) < 1e-5
    saved = case['saved']  # counted, not timed: the same on every machine
    assert saved['ASR(SE)'] <= 1.005
    assert saved['SE'] <= 1.02
    assert saved['DIA r=4'] <= 1.02
    assert min(saved['ASR(SE), feature maps'], saved['SE, plain'], saved['DIA r=4, plain']) > 1.1
    assert set(case['inference']) == {*saved, 'folded'}
    assert 'feature maps' in done.stdout
    assert set(case['launches']) == set(case['inference'])
    over_stock = case['launches']['ASR(SE)']['training']['over_stock']
    assert f' {over_stock:.3f} / ' in done.stdout


@pytest.mark.slow
def test_benchmark_of_unets(tool: Callable[..., object], tmp_path: Path) -> None:
    done = tool('benchmark', 'unet', '--rounds', '1', '--case', 'attention', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    case = json.loads((tmp_path / 'unet.json').read_text())['cases'][0]
    assert max(case['agreement'].values()) < 1e-5
    saved = case['saved']
    assert saved['ASR(SE)'] <= 1.001
    assert max(saved['SE'], saved['DIA r=4']) <= 1.01
    assert min(saved['ASR(SE), feature maps'], saved['SE, plain'], saved['DIA r=4, plain']) > 1.1


@pytest.mark.slow
@pytest.mark.det
def test_parameters_by_depth() -> None:
    pytest.importorskip('mmdet')
    from bench.plug import depth_table

    text, counts = depth_table()
    assert {row['DIA r=4'] for row in counts.values()} == {13_959_040}
    assert {row['DIA r=20'] for row in counts.values()} == {2_801_020}
    assert counts['ResNet-50']['SE r=16'] < counts['ResNet-101']['SE r=16'] < counts['ResNet-152']['SE r=16']
    assert '+13,959,040' in text
