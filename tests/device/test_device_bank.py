"""The bank of gates on a device: what sites compute by themselves, also computed again, compiled and in CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr_downstream import AsrError, plug
from asr_downstream.measure.device import compiled, graphed
from asr_downstream.measure.launches import Launches
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet
from asr_downstream.plugging.bank import hooks as bank

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
SPECS: dict[str, Any] = {
    'ASR(SE)': ASR,
    'ASR(ECA)': dict(type='ASR', attention=dict(type='ECA')),
    'ASR(DIA)': dict(type='ASR', attention=dict(type='DIALSTM')),
    'shared': {**ASR, 'share': 'stage'},
    'DIA': dict(type='DIA', attention=dict(type='DIALSTM')),
    'composed': [ASR, dict(type='DIA', attention=dict(type='DIALSTM'))],
}
BANKED = ['ASR(SE)', 'ASR(ECA)', 'ASR(DIA)', 'shared', 'composed']
every_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)


class Net(ResNet):
    """Blocks may be computed again in the backward pass."""

    again = False

    def __init__(self) -> None:
        super().__init__(BasicBlock, 2, width=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return self.fc(x.mean((2, 3)))


def plugged(spec: Any, device: torch.device, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = Net().to(dtype)
    plug(model, spec)
    return randomise(model).to(device)


def images(device: torch.device, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(3, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Of a copy; of a second step, as the first may plan."""
    model = copy.deepcopy(model).eval()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], bar: float = 1e-9) -> None:
    for name, value in expected.items():
        other = found[name]
        assert (value is None) == (other is None), name
        assert value is None or torch.allclose(other, value, bar, bar), name  # type: ignore[arg-type]


@pytest.mark.parametrize('name', BANKED)
def test_gates_are_those_that_sites_compute_by_themselves(name: str, device: torch.device) -> None:
    model = plugged(SPECS[name], device).eval()
    x = images(device)
    found = gradients(model, x)
    with Launches() as together:
        model(x)
    served = vars(model)[bank.BANK].ready(model)
    assert len(served) == 6
    assert {ready.v.device.type for ready in served.values()} == {device.type}
    with bank.off(model):
        expected = gradients(model, x)
        with Launches() as alone:
            model(x)
    assert_same(found, expected)
    assert together.number < alone.number


@every_spec
def test_blocks_are_computed_again_with_the_same_gates(spec: Any, device: torch.device) -> None:
    """On a CUDA device in a thread of its own."""
    model = plugged(spec, device)
    x = images(device)
    expected = gradients(model, x)
    model.again = True
    assert_same(gradients(model, x), expected)


@every_spec
def test_a_backward_pass_is_counted(spec: Any, device: torch.device) -> None:
    """Also where autograd computes it in another thread."""
    model = plugged(spec, device)
    loss = model(images(device)).square().mean()
    with Launches() as launches:
        loss.backward()
    assert launches.of['convolution_backward'] >= 15


@pytest.mark.slow
@pytest.mark.parametrize('spec', [SPECS[name] for name in ('ASR(SE)', 'ASR(DIA)', 'composed')])
@pytest.mark.parametrize('training', [False, True])
def test_compiled_models_compute_the_same(spec: Any, training: bool, device: torch.device) -> None:
    """By the compiler for CUDA there, and by its tracing alone on the CPU."""
    model = plugged(spec, device, torch.float32).train(training)
    x = images(device, torch.float32)
    other = copy.deepcopy(model)
    torch.compiler.reset()
    run = compiled(other, backend='inductor' if device.type == 'cuda' else 'aot_eager')
    results = []
    for network, call in ((model, model), (other, run)):
        y = call(x)
        y.square().mean().backward()
        results.append({'y': y, **{name: p.grad for name, p in network.named_parameters()}})
    for name, value in results[0].items():
        found = results[1][name]
        assert (value is None) == (found is None), name
        assert value is None or (found - value).norm() <= 1e-3 * value.norm() + 1e-5, name


def training_step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


@pytest.mark.gpu
@every_spec
def test_an_inference_is_recorded_as_a_cuda_graph(spec: Any) -> None:
    device = torch.device('cuda')
    model = plugged(spec, device).eval()
    x = images(device)
    with torch.no_grad():
        replay = graphed(lambda: model(x), device)
        for seed in (1, 2):  # the graph reads the tensor again
            x.copy_(images(device, seed=seed))
            assert torch.allclose(replay(), model(x), 1e-9, 1e-9)
        for p in model.parameters():  # and the weights: gates are not those of the recording
            p.mul_(1.1)
        assert torch.allclose(replay(), model(x), 1e-9, 1e-9)


@pytest.mark.gpu
@every_spec
@pytest.mark.parametrize('again', [False, True])
def test_a_training_step_is_recorded_as_a_cuda_graph(spec: Any, again: bool) -> None:
    device = torch.device('cuda')
    model = plugged(spec, device).train()
    model.again = again
    x = images(device)
    replay = graphed(training_step(model, x), device)
    other = copy.deepcopy(model)  # where the warm-up has left it; the recording itself computes nothing
    step = training_step(other, x)
    step()  # this makes the momentum, which the other has already
    model.load_state_dict(other.state_dict())
    first, second = [], []
    for _ in range(3):
        first.append(float(replay()))
        second.append(float(step()))
    assert all(torch.isfinite(torch.tensor(first)))
    assert len(set(first)) == 3  # weights move, and gates with them
    assert first[0] == pytest.approx(second[0], rel=1e-9)  # before the momenta, which differ, come in


def test_graphs_need_a_cuda_device() -> None:
    with pytest.raises(AsrError, match='CUDA graphs need a CUDA device, this is cpu'):
        graphed(lambda: None, torch.device('cpu'))
