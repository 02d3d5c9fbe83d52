"""Launches: what counts as one, and how many more than stock the plugs have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import launches as bench
from bench.forms import LOW, PLAIN, SE, SPEC, STOCK, plain_form, plugged_copy
from conftest import ROOT, command
from torch import Tensor, nn

from asr_downstream import fold
from asr_downstream.measure import launches as measure
from asr_downstream.measure.launches import Launches, count_step, declare, device_launches, extra
from asr_downstream.models import resnet56

SITES = 27  # of ResNet-56
# Launches over stock, in a training step and at inference: they may only fall.
RATIOS = {
    ('ResNet-56', 'ASR(SE)'): (1.093, 1.072),
    ('ResNet-56', 'ASR(ECA)'): (1.058, 1.048),
    ('ResNet-56', 'LayerScale'): (1.035, 1.024),
    ('ResNet-56', 'ASR(DIA)'): (2.43, 2.22),
    ('mmdet ResNet-50', 'ASR(SE)'): (1.15, 1.12),
    ('UNet for CIFAR-10', 'ASR(SE)'): (1.246, 1.21),
}
MORE_A_SITE = {'SE': 19, 'DIA': 39.5}


def count(call: Callable[[], Any]) -> Launches:
    with Launches() as launches:
        call()
    return launches


@pytest.fixture(scope='module')
def stock() -> nn.Module:
    torch.manual_seed(0)
    return resnet56().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize(
    ('number', 'call'),
    [
        (0, lambda a: a.view(6)),
        (0, lambda a: a.reshape(6)),
        (0, lambda a: a.t().expand(4, 3, 2).transpose(0, 1).unsqueeze(0).squeeze(0)),
        (0, lambda a: a[0, 1:].detach()),
        (0, lambda a: (a.unbind(), a.chunk(2), a.split(1), a.contiguous(), a.to(torch.float32))),
        (0, lambda a: a.detach().unsqueeze_(0).resize_(2)),
        (0, lambda a: torch.promote_types(a.dtype, torch.float64)),
        (0, lambda a: nn.Dropout().eval()(nn.Identity()(a))),
        (1, lambda a: a + a),
        (1, lambda a: a.add_(1)),
        (1, lambda a: torch.add(a, a, out=a)),
        (1, lambda a: a.t().reshape(6)),
        (1, lambda a: a.t().contiguous()),
        (1, lambda a: a.clone()),
        (1, lambda a: a.double()),
        (1, lambda a: a.copy_(a.t().expand(2, 3, 2)[0].t())),
        (1, lambda a: a.zero_()),
        (1, lambda a: torch.empty(3)),
        (1, lambda a: torch.zeros(3)),
        (1, lambda a: a[0, 0].item()),
        (1, lambda a: torch.equal(a, a)),
        (1, lambda a: torch.cat([a, a])),
        (3, lambda a: (a * 2).relu().sum()),
    ],
)
def test_views_launch_nothing_and_all_else_one(number: int, call: Callable[[Tensor], Any]) -> None:
    a = torch.arange(6.0).view(2, 3)
    assert count(lambda: call(a)).number == number


def test_a_backward_is_counted() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    found = count(lambda: (a * b).sum().backward())
    assert found.of == {'mul': 3, 'sum': 1, 'ones_like': 1}


def test_a_backward_selection_is_a_launch() -> None:
    """It fills and copies, as its name does not say."""
    a = torch.randn(2, 3, requires_grad=True)
    assert count(lambda: a[0].sum().backward()).of == {'sum': 1, 'ones_like': 1, 'select_backward': 1}
    assert count(lambda: a[:1].squeeze(0).sum().backward()).of['slice_backward'] == 1


def test_inference_mode_counts_as_no_grad() -> None:
    """Without autograd composed operators arrive whole: linear, batch norm, pooling."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = count(lambda: model(x))
    with torch.inference_mode():
        assert count(lambda: model(x)).of == expected.of
    assert {'convolution': 1, 'silu': 1, 'mean': 1, 'addmm': 1}.items() <= expected.of.items()


def test_what_has_a_kernel_of_its_own_is_not_taken_apart() -> None:
    a = torch.randn(3, requires_grad=True)
    assert count(lambda: nn.functional.silu(a).sum().backward()).of['silu_backward'] == 1


def lists(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ('number', 'one', 'other'),
    [
        (1, lists((2, 3), (4,), (5, 1)), lists((2, 3), (4,), (5, 1))),
        (3, lists((2, 3), (4,), (5, 2)), lists((2, 3), (4,), (5, 1))),  # broadcast
        (2, lists((2, 3), (4,)), [torch.ones(3, 2).t(), torch.ones(4)]),  # strides
        (2, lists((2,), (4,)), [*lists((2,)), *lists((4,), dtype=torch.float64)]),  # a dtype in a pair
        (2, [*lists((2,)), *lists((4,), dtype=torch.float64)], [*lists((2,)), *lists((4,), dtype=torch.float64)]),
    ],
)
def test_operators_over_lists_count_once_where_their_tensors_agree(
    number: int, one: list[Tensor], other: list[Tensor]
) -> None:
    assert count(lambda: torch._foreach_mul(one, other)).of == {'_foreach_mul': number}
    same = len({t.dtype for t in one}) == 1
    assert count(lambda: torch._foreach_mul(one, 2.0)).number == (1 if same else len(one))
    assert count(lambda: torch._foreach_neg_(one)).number == (1 if same else len(one))


@pytest.mark.parametrize(('option', 'name'), [('fused', '_fused_adam_'), ('foreach', '_foreach_lerp_')])
def test_optimisers_over_lists_count_once(option: str, name: str) -> None:
    parameters = [nn.Parameter(t) for t in lists((2, 3), (4,), (5, 1))]
    optimiser = torch.optim.Adam(parameters, **{option: True})
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert count(optimiser.step).of[name] == 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return (dy + dy).contiguous()


def test_an_autograd_function_counts_what_it_dispatches() -> None:
    x = torch.randn(3, requires_grad=True)
    assert count(lambda: Doubled.apply(x).sum().backward()).of == {'mul': 1, 'sum': 1, 'ones_like': 1, 'add': 1}


@torch.library.custom_op('launches_of_tests::two', mutates_args=())
def two(x: Tensor) -> Tensor:
    return (x.view(-1) + 1).view(x.shape) * 2


two.register_autograd(lambda ctx, dy: dy * 2)


@torch.library.custom_op('launches_of_tests::nested', mutates_args=())
def nested(x: Tensor) -> Tensor:
    return two(x) - 1


@torch.library.custom_op('launches_of_tests::own', mutates_args=())
def own(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


@torch.library.custom_op('launches_of_tests::filled', mutates_args=())
def filled(x: Tensor) -> Tensor:
    out, _ = torch.empty_like(x), torch.empty(3)
    out.numpy()[:] = x.numpy() * 2
    return out


@torch.library.custom_op('launches_of_tests::declared', mutates_args=())
def declared(x: Tensor, kernels: int) -> Tensor:
    return x + 1


def test_a_custom_operator_counts_the_kernels_that_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, 'DECLARED', {})
    x = torch.randn(2, 3)
    assert count(lambda: two(x)).of == {'launches_of_tests::two': 2}
    assert count(lambda: nested(x)).of == {'launches_of_tests::nested': 3}
    assert count(lambda: own(x)).of == {'launches_of_tests::own': 1}
    assert count(lambda: filled(x)).of == {'launches_of_tests::filled': 1}  # two allocations, and a loop of its own
    declare('launches_of_tests::own', 3)
    declare('launches_of_tests::declared', lambda x, kernels: kernels * 2)
    assert count(lambda: (own(x), declared(x, 5))).of == {
        'launches_of_tests::own': 3,
        'launches_of_tests::declared': 10,
    }
    x.requires_grad_()
    with Launches() as found:
        y = two(x)
        y.sum().backward()
    assert found.of == {'launches_of_tests::two': 2, 'sum': 1, 'ones_like': 1, 'mul': 1}
    assert torch.equal(y, (x + 1) * 2)
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_stock_resnet_56(stock: nn.Module, x: Tensor) -> None:
    step = count_step(stock, x)
    assert (step.training.number, step.inference.number) == (519, 255)
    assert (step.training.allocations, step.inference.allocations) == (57, 57)
    assert step.training.of['convolution'] == step.training.of['convolution_backward'] == 57


def test_two_runs_count_the_same_and_change_nothing(stock: nn.Module, x: Tensor) -> None:
    model = plugged_copy(stock, SE).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = count_step(model, x), count_step(model, x[:1])
    assert first.training.of == second.training.of
    assert first.inference.of == second.inference.of
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_more_kernel_is_noticed(stock: nn.Module, x: Tensor) -> None:
    slower = plugged_copy(stock, SPEC)
    base = count_step(slower, x)
    next(m for m in slower.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(
        lambda *given: given[2] + 0
    )
    found = count_step(slower, x)
    assert extra(found.training, base.training) == extra(found.inference, base.inference) == {'add': 1}
    assert extra(base.training, found.training) == {'add': -1}
    assert extra(base.training, base.training) == {}


def test_a_folded_model_launches_what_stock_does(stock: nn.Module, x: Tensor) -> None:
    folded, expected = count_step(fold(plugged_copy(stock, SPEC))[0], x), count_step(stock, x)
    assert folded.training.of == expected.training.of
    assert folded.inference.of == expected.inference.of


@pytest.mark.parametrize(
    ('name', 'arm'), [pytest.param(*key, marks=pytest.mark.det if 'mmdet' in key[0] else ()) for key in RATIOS]
)
def test_ratios_to_stock_only_fall(name: str, arm: str) -> None:
    case = next(case for case in bench.CASES if case.name == name)
    if case.missing:
        pytest.skip(f'needs {case.needs}')
    base = case.build()
    base.eval()
    found = bench.count_arms({STOCK: base, arm: plugged_copy(base, bench.ARMS[arm])}, torch.randn(case.shape))[arm]
    training, inference = RATIOS[name, arm]
    assert 1 <= found['training']['over_stock'] <= training
    assert 1 <= found['inference']['over_stock'] <= inference


@pytest.mark.parametrize('arm', MORE_A_SITE)
def test_what_gates_of_the_input_launch_a_site_only_falls(stock: nn.Module, x: Tensor, arm: str) -> None:
    base, model = count_step(stock, x), plugged_copy(stock, bench.ARMS[arm])
    assert 0 < sum(extra(count_step(model, x).training, base.training).values()) <= MORE_A_SITE[arm] * SITES


def test_forms_differ_where_they_should(stock: nn.Module, x: Tensor) -> None:
    fused = plugged_copy(stock, {**SE, 'memory': 'low'})
    arms = {STOCK: stock, 'SE': fused, 'SE' + PLAIN: plain_form(fused)}
    found = bench.count_arms(arms, x)
    assert found['SE' + PLAIN]['training']['extra'] != found['SE']['training']['extra']
    assert found[STOCK]['training']['extra'] == {}
    assert bench.cell(found[STOCK]) == '1.000 / 1.000'
    text = bench.extra_line('SE', found['SE'])
    assert text.startswith(f'SE: {sum(found["SE"]["training"]["extra"].values()):+,} in a training step: ')
    assert bench.extra_line('x', {'training': {'extra': dict(a=9, b=8, c=7, d=6, e=5, f=4, g=-1)}}) == (
        'x: +38 in a training step: a +9, b +8, c +7, d +6, e +5, others +3'
    )


@pytest.mark.slow
def test_the_command_writes_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docs/benchmarks.md` has the rows of today."""
    lost = bench.LaunchCase('ResNet-56 of nothing', resnet56, (4, 3, 32, 32), needs='no_such_library')
    monkeypatch.setattr(bench, 'CASES', (*bench.CASES, lost))
    done = command('benchmark', 'launches', '--case', 'ResNet-56', '--json', tmp_path / 'launches.json')
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'launches.json').read_text())
    assert 'torch' in report['versions']
    [case] = report['cases']
    assert (case['case'], case['input']) == ('ResNet-56', [4, 3, 32, 32])
    assert set(case['launches']) == {STOCK, *bench.ARMS, *(arm + PLAIN for arm in bench.ARMS), 'SE' + LOW, 'DIA' + LOW}
    training = case['launches']['ASR(SE)']['training']
    assert set(training) == {'launches', 'allocations', 'over_stock', 'extra', 'device'}
    assert sum(training['extra'].values()) == training['launches'] - 519
    assert 'ResNet-56 of nothing is left out: no_such_library is not installed' in done.stdout
    page = (ROOT / 'docs/benchmarks.md').read_text()
    rows = [row for row in done.stdout.splitlines() if row.startswith('│ ResNet-56')]
    assert len(rows) == 15
    for row in rows:
        cells = [cell.strip() for cell in row.strip('│').split('│')]
        assert any([c.strip() for c in line.strip('│').split('│')] == cells for line in page.splitlines()), (
            f'docs/benchmarks.md does not have {cells}: run python tools/benchmark.py launches'
        )


def test_the_trace_of_a_profiler_is_counted() -> None:
    """Of a CUDA device: here events as its profiler writes them, and a true trace of the CPU, which has none."""
    kernel = {'ph': 'X', 'cat': 'kernel', 'name': 'void at::native::vectorized_elementwise_kernel', 'dur': 2}
    events = [
        kernel,
        {**kernel, 'cat': 'gpu_memcpy', 'name': 'Memcpy DtoD (Device -> Device)'},
        {**kernel, 'cat': 'gpu_memset', 'name': 'Memset (Device)'},
        {**kernel, 'cat': 'cuda_runtime', 'name': 'cudaLaunchKernel'},
        {**kernel, 'cat': 'gpu_user_annotation', 'name': 'step'},
        {'ph': 's', 'cat': 'ac2g', 'name': 'ac2g'},
        {'ph': 'M', 'name': 'process_name'},
    ]
    assert measure.on_device(events) == 3
    if not torch.cuda.is_available():
        assert device_launches(lambda: torch.ones(3)) is None


@pytest.mark.gpu
def test_the_device_runs_what_is_counted(stock: nn.Module, x: Tensor) -> None:
    a = torch.ones(3, device='cuda')
    assert device_launches(lambda: (a + a) * a) == 2
    step = count_step(stock, x)
    assert step.device is not None
    assert step.device[0] >= step.training.number - step.training.allocations
