"""Plugs on a device: what they compute on the CPU, folded, in low precision, in parallel."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

from asr_downstream import fold, plug, rebind, record, verify
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet
from asr_downstream.plugging.layers import Plugged

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
DIA = dict(type='DIA', attention=dict(type='DIALSTM'))
SPECS: dict[str, Any] = {
    'ASR(SE)': ASR,
    'ASR(ECA), twice': dict(type='ASR', attention=dict(type='ECA'), repeat=2),
    'ASR(DIA)': dict(type='ASR', attention=dict(type='DIALSTM')),
    'SE': dict(type='Attention', attention=dict(type='SE', reduction=4)),
    'CBAM': dict(type='Attention', attention=dict(type='CBAM', reduction=4)),
    'DIA': DIA,
    'composed': [ASR, DIA],
}
CONSTANT = ['ASR(SE)', 'ASR(ECA), twice', 'ASR(DIA)']
every_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """No TF32: the bars are those of float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


class Tokens(nn.Module):
    """Convolutions before group norms, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(2, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.a(x).relu())).relu()
        return self.last(x.flatten(2).transpose(1, 2))


def plugged(spec: Any, kind: str = 'resnet', dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model: Any = ResNet(BasicBlock, 2, width=8) if kind == 'resnet' else Tokens()
    plug(model.to(dtype), spec if kind == 'resnet' else {**spec, 'sites': ['b', 'last']})
    return randomise(model)


def images(device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output, gradients and buffers of a training step of a copy, on the CPU."""
    model = copy.deepcopy(model).train()
    y = model(x)
    y.square().mean().backward()
    found = {f'gradient of {name}': p.grad for name, p in model.named_parameters()}
    found = {'y': y.detach(), **found, **dict(model.named_buffers())}
    return {name: None if t is None else t.cpu() for name, t in found.items()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or torch.allclose(found[name], value, tolerance, tolerance), name


@every_spec
def test_a_step_is_that_of_the_cpu(spec: Any, device: torch.device) -> None:
    model = plugged(spec)
    expected = step(model, images(torch.device('cpu')))
    assert_same(step(model.to(device), images(device)), expected)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@every_spec
def test_memory_layouts_give_the_same(spec: Any, layout: torch.memory_format, device: torch.device) -> None:
    model = plugged(spec).to(device)
    expected = step(model, images(device))
    moved = copy.deepcopy(model).to(memory_format=layout)
    found = step(moved, images(device).to(memory_format=layout))
    assert_same(found, expected)


def test_layers_keep_the_layout(device: torch.device) -> None:
    model = plugged(SPECS['composed'], dtype=torch.float32).to(device, memory_format=torch.channels_last)
    seen = []
    model.layer3[0].bn2.register_forward_hook(lambda m, i, y: seen.append(y))
    model(images(device, torch.float32).to(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('name', CONSTANT)
@pytest.mark.parametrize(('dtype', 'bar'), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_folding_is_exact(name: str, dtype: torch.dtype, bar: float, device: torch.device) -> None:
    model = plugged(SPECS[name], dtype=dtype).to(device).eval()
    x = images(device, dtype)
    plain = copy.deepcopy(fold(model)[0])
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    folded, _ = fold(model, check=x)
    assert not any(isinstance(m, Plugged) for m in folded.modules())
    assert {p.device.type for p in folded.parameters()} == {device.type}
    assert verify(model, folded, x).relative < bar
    assert verify(model, plain, x).relative > 1e-2  # without the gates it is another function


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@every_spec
def test_automatic_mixed_precision(spec: Any, dtype: torch.dtype, device: torch.device) -> None:
    """With a scaler of gradients for float16; what gates multiply is in the low precision, gates and states are not."""
    torch.manual_seed(0)
    model: Any = ResNet(BasicBlock, 2, width=8)
    stock = set(model.state_dict())
    plug(model, spec)
    model.to(device).train()
    x = images(device, torch.float32)
    expected = step(model, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=dtype == torch.float16)
    with torch.autocast(device.type, dtype):
        y = model(x)
        loss = y.float().square().mean()
    assert y.dtype == dtype
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    pairs = [(p.grad, expected[f'gradient of {name}']) for name, p in model.named_parameters()]
    assert all((found is None) == (grad is None) for found, grad in pairs)
    assert {found.dtype for found, grad in pairs if grad is not None} == {torch.float32}
    found, grad = (torch.cat([t.cpu().flatten() for t in side if t is not None]) for side in zip(*pairs, strict=True))
    assert float((found - grad).norm() / grad.norm()) < 0.3
    scaler.step(optimiser)
    scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in stock)


def test_states_keep_full_precision_under_autocast(device: torch.device) -> None:
    model = plugged(DIA, dtype=torch.float32).to(device)
    with torch.autocast(device.type, torch.bfloat16), record(model) as seen:
        model(images(device, torch.float32))
    assert len(seen.states) == 6
    assert {t.dtype for left in seen.states.values() for t in left[0]} == {torch.float32}


@pytest.mark.parametrize('kind', ['resnet', 'tokens'])
@pytest.mark.parametrize('attention', ['SE', 'DIALSTM'])
def test_low_memory_computes_what_the_plain_form_does(attention: str, kind: str, device: torch.device) -> None:
    """After batch norms on the CPU and after convolutions everywhere; elsewhere it is the plain form."""
    form = 'DIA' if attention == 'DIALSTM' else 'Attention'
    spec = dict(type=form, attention=dict(type=attention))
    found, expected = (
        step(plugged({**spec, 'memory': memory}, kind).to(device), images(device)) for memory in ('low', 'plain')
    )
    assert_same(found, expected)


@every_spec
def test_data_parallel_training_with_synchronised_norms(spec: Any, device: torch.device, tmp_path: Path) -> None:
    """Of one process: NCCL on a CUDA device, else gloo, where SyncBN has no training and norms stay as they are."""
    model = plugged(spec).to(device)
    expected = step(model, images(device))
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(0)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        rebind(model)
    torch.distributed.init_process_group(
        'nccl' if cuda else 'gloo', init_method=f'file://{tmp_path / "store"}', rank=0, world_size=1
    )
    try:
        places = [0] if cuda else None
        parallel = nn.parallel.DistributedDataParallel(model, device_ids=places)
        y = parallel(images(device))
        y.square().mean().backward()
        for name, p in model.named_parameters():
            grad = expected[f'gradient of {name}']
            assert (grad is None) == (p.grad is None), name
            assert grad is None or torch.allclose(p.grad.cpu(), grad, 1e-9, 1e-9), name
        assert torch.allclose(y.detach().cpu(), expected['y'], 1e-9, 1e-9)
    finally:
        torch.distributed.destroy_process_group()
