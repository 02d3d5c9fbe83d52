"""plug and fold on models of a framework that nobody has set up, and on models that are wrapped or sharded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from mmengine.model.utils import _BatchNormXd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.parallel import DistributedDataParallel

from asr_downstream import FoldError, PlugError, fold, plug
from asr_downstream.modules.check import SHARDED, WRAPPERS, names_of

ASR = dict(type='ASR', attention=dict(type='SE', reduction=2), sites=['*0', '*2'])

# Runs where nothing of the adapter was imported; what it prints is what the test looks at.
LIVE = """
import copy, pickle, sys
import torch
import asr_downstream
from asr_downstream import fold, plug, verify

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
assert not any(name.split('.')[0] in ('mmdet', 'mmcv') for name in sys.modules), 'the core imports a framework'
from mmdet.models.backbones import PyramidVisionTransformerV2, SwinTransformer
for build in (
    lambda: PyramidVisionTransformerV2(embed_dims=16, num_layers=[1, 1, 1, 1]),
    lambda: SwinTransformer(embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
):
    model = build()
    model.eval()
    stock = [type(m) for m in model.modules()]
    plug(model, ASR)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for name, p in again.named_parameters():
            if name.endswith('psi'):
                p.normal_()
    folded, report = fold(again)
    x = torch.randn(1, 3, 64, 64)
    found = verify(again, folded, x).relative
    assert found < 1e-4, found
    assert verify(model, folded, x).relative > 1e-4
    assert [type(m) for m in folded.modules()] == stock
    print(type(folded).__name__, len(report.sites), 'sites')
assert 'asr_downstream.detection' not in sys.modules, 'the adapter was imported'
"""


@pytest.mark.det
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_live_mmdet_model_plugs_and_folds_without_the_adapter() -> None:
    found = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', LIVE], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert found.returncode == 0, found.stderr
    assert 'PyramidVisionTransformerV2 4 sites' in found.stdout
    assert 'SwinTransformer 8 sites' in found.stdout


def test_a_layer_of_a_framework_joins_the_table_when_it_is_met() -> None:
    model = nn.Sequential(_BatchNormXd(4)).eval()
    plug(model, dict(ASR, sites=['0']))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again[0]) is type(model[0])
    assert isinstance(again[0], _BatchNormXd)
    assert again.state_dict().keys() == model.state_dict().keys()
    folded, _ = fold(again)
    assert type(folded[0]) is _BatchNormXd
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(folded(x), model(x), atol=1e-6)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def inner_of_ddp(model: nn.Module) -> nn.Module:
    global keep
    keep = DistributedDataParallel(model)
    return keep.module


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
    return model


def sharded_part(model: nn.Module) -> nn.Module:
    fully_shard(model[2], mesh=init_device_mesh('cpu', (1,)))  # type: ignore[index]
    return model


def wrapped_part(model: nn.Module) -> nn.Module:
    return nn.Sequential(DistributedDataParallel(model), nn.ReLU(), nn.Linear(8, 8))


def distributed_tensors(model: nn.Module) -> nn.Module:
    return distribute_module(model, init_device_mesh('cpu', (1,)))


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    'DistributedDataParallel': ddp,
    'inside of DistributedDataParallel': inner_of_ddp,
    'fully_shard': sharded,
    'fully_shard of a part': sharded_part,
    'DistributedDataParallel of a part': wrapped_part,
    'DTensor': distributed_tensors,
    'DataParallel': nn.DataParallel,
}


@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED)
@pytest.mark.usefixtures('group')
@pytest.mark.timeout(60)
def test_wrapped_models_are_refused_before_they_are_plugged(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(net())
    classes = [type(m) for m in model.modules()]
    with pytest.raises(PlugError, match='plug first, then wrap') as error:
        plug(model, ASR)
    assert '\n' not in str(error.value)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize('wrap', [v for k, v in WRAPPED.items() if 'inside' not in k])
@pytest.mark.usefixtures('group')
@pytest.mark.timeout(60)
def test_wrapped_models_are_refused_by_fold(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    plug(model, ASR)
    with pytest.raises(FoldError, match=r'(module|unwrapped|before)') as error:
        fold(wrap(model.eval()).eval())
    assert '\n' not in str(error.value)


@pytest.mark.usefixtures('group')
@pytest.mark.timeout(60)
def test_plugged_first_and_wrapped_then_folds_from_inside() -> None:
    model = net()
    plug(model, ASR)
    wrapped = DistributedDataParallel(model)
    wrapped(torch.randn(2, 4)).sum().backward()
    folded, _ = fold(wrapped.module.eval())
    assert type(folded[0]) is nn.Linear


def test_the_names_of_wrappers_are_those_of_torch() -> None:
    known = (
        DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel, FSDPModule, torch._dynamo.OptimizedModule,
        torch.jit.ScriptModule,
    )  # fmt: skip
    assert {names_of(cls)[0] for cls in known} == {name for name in WRAPPERS if name.startswith('torch.')}
    assert names_of(DTensor)[0] == SHARDED
