"""Measuring on a device, and the benchmark of it; here on the CPU with a tiny model."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import device as bench
from bench.forms import FOLDED, STOCK, Case
from conftest import command
from torch import nn

from asr_downstream.measure import device as measure
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet

TINY = Case('tiny', lambda: ResNet(BasicBlock, 1, width=8), batch=2, side=8, dynamic={})
FEW = {name: bench.ARMS[name] for name in ('ASR(SE)', 'DIA')}


def variant(**changes: Any) -> bench.Variant:
    start = dict(kind='training', way='eager', precision='float32', layout='contiguous', batch=2)
    return bench.Variant(**{**start, **changes})


@pytest.fixture(scope='module')
def models() -> dict[str, nn.Module]:
    return bench.models_of(TINY, FEW)


def test_variants_are_all_combinations_and_what_compiles_comes_last() -> None:
    assert len(bench.VARIANTS) == len(set(bench.VARIANTS)) == 5 * 3 * 2 * 2
    ways = [v.way for v in bench.VARIANTS]
    assert ways == sorted(ways, key=['eager', 'CUDA graph', 'compile'].index)
    assert {v.batch for v in bench.VARIANTS} == {2, 32, 128}


@pytest.mark.parametrize('kind', ['training', 'inference'])
@pytest.mark.parametrize(
    'precision', [pytest.param(p, marks=[] if p == 'float32' else [pytest.mark.slow]) for p in bench.PRECISIONS]
)
def test_arms_are_timed(kind: str, precision: str, models: dict[str, nn.Module], device: torch.device) -> None:
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    asked = variant(kind=kind, precision=precision, layout='channels_last')
    found = bench.measure_variant(TINY, models, asked, device, 2)
    assert not found['failed']
    assert set(found['arms']) == {STOCK, *FEW, *([FOLDED] if kind == 'inference' else [])}
    for arm in found['arms'].values():
        assert arm['milliseconds'].median > 0
        assert (arm['peak_memory'] is None) == (device.type == 'cpu')
        assert device.type == 'cpu' or arm['peak_memory'] > 4 * sum(p.numel() for p in models[STOCK].parameters())
    assert found['arms'][STOCK]['over_stock'] == (1, 1, 1, 1)
    for name, model in models.items():  # copies were measured
        assert all(torch.equal(t, before[name][key]) for key, t in model.state_dict().items())


def test_what_fails_is_reported_and_the_rest_goes_on(models: dict[str, nn.Module], device: torch.device) -> None:
    class Broken(ResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate\nmore than there is')

    broken = {STOCK: models[STOCK], 'broken': Broken(BasicBlock, 1, width=8), FOLDED: models[FOLDED]}
    found = bench.measure_variant(TINY, broken, variant(kind='inference'), device, 1)
    assert found['failed'] == {'broken': 'OutOfMemoryError: CUDA out of memory. Tried to allocate'}
    assert set(found['arms']) == {STOCK, FOLDED}
    report = {'device': measure.card(device), 'rounds': 1, 'variants': [found], 'left_out': []}
    assert 'batch 2: broken failed: OutOfMemoryError' in bench.table(report)
    calls = iter([None, RuntimeError('later')])

    def late() -> None:
        if (error := next(calls)) is not None:
            raise error

    times, failed = measure.paired_device_times({'a': int, 'b': late}, device, 3, calls=1)
    assert (len(times['a']), set(times), failed) == (3, {'a'}, {'b': 'RuntimeError: later'})
    first = bench.measure_variant(
        TINY, {STOCK: broken['broken'], FOLDED: models[FOLDED]}, variant(kind='inference'), device, 1
    )
    assert first['arms'][FOLDED]['over_stock'] is None


def test_graphs_are_said_to_need_a_device(models: dict[str, nn.Module]) -> None:
    asked = variant(kind='inference', way='CUDA graph')
    found = bench.measure_variant(TINY, models, asked, torch.device('cpu'), 1)
    assert not found['arms']
    assert set(found['failed'].values()) == {'AsrError: CUDA graphs need a CUDA device, this is cpu'}


def test_candidates_of_one_class_are_compiled_apart() -> None:
    """More of them than compiled functions are kept for one code."""
    torch.compiler.reset()
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    layers = [nn.Linear(2, 2 + i) for i in range(10)]
    runs = [measure.compiled(layer, backend=backend) for layer in layers]
    for _ in range(2):
        for layer, run in zip(layers, runs, strict=True):
            assert torch.equal(run(torch.ones(1, 2)), layer(torch.ones(1, 2)))
    assert len(seen) == 10


@pytest.mark.slow
def test_a_report_is_saved_after_every_variant_and_time_may_run_out(device: torch.device) -> None:
    saved = []
    ways = [variant(kind='inference'), variant(kind='inference', layout='channels_last')]
    report = bench.measure([TINY], device, 1, ways, save=lambda found: saved.append(len(found['variants'])))
    assert saved == [1, 2]
    assert report['device']['name'] == measure.card(device)['name']
    late = bench.measure([TINY], device, 1, ways, minutes=-1)
    assert late['left_out'] == [f'tiny: {way.name}' for way in ways]
    assert not late['variants']
    assert 'no time left for 2 variants, the first tiny: inference, eager, float32, contiguous, batch 2' in bench.table(
        late
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_without_a_device_one_line_says_so(tmp_path: Path) -> None:
    done = command('benchmark', 'plug', 'unet', 'launches', '--device', 'cuda', '--out', tmp_path)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert 'sees no CUDA device; run the same command where' in done.stderr
    assert not list(tmp_path.iterdir())
    assert measure.card(torch.device('cpu'))['name'] == 'cpu'


@pytest.mark.gpu
def test_a_card_says_what_it_is() -> None:
    found = measure.card(torch.device('cuda'))
    assert found['name'] == torch.cuda.get_device_name()
    assert found['cuda']
    assert found['memory'] > 2**30
    held = measure.peak_memory(partial(torch.ones, 2**20, device='cuda'), torch.device('cuda'))
    assert held is not None
    assert held >= 2**22
    assert measure.milliseconds(partial(torch.cuda._sleep, 10_000_000), torch.device('cuda')) > 1
