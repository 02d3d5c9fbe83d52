"""Results print as their tables: str, repr, and HTML for notebooks; no dataclass and no tensor is dumped."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.shared import DIA, images, plugged
from torch import nn

import asr_downstream
from asr_downstream import describe, far, fold, fold_calibrated, record, save_gates, verify
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.results import result_of
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.commands.exporting.receipt import Entry, Receipt
from asr_downstream.console.text import Printed
from asr_downstream.folding.analysis.bound import BlockGrowth, Growth
from asr_downstream.folding.analysis.correlation import find_correlations
from asr_downstream.folding.analysis.cost import measure_costs
from asr_downstream.folding.analysis.noise import Curve, NoiseCurves
from asr_downstream.folding.analysis.stripes import find_stripes
from asr_downstream.folding.native.report import NativeBlock, NativeReport
from asr_downstream.plugging.describe import Description
from asr_downstream.plugging.learning.choose import choose

SE = dict(type='Attention', attention=dict(type='SE', reduction=4))
ASR = dict(type='ASR', attention=dict(type='SE'))
DATA = [images(2)]


def calibrated() -> Any:
    return fold_calibrated(plugged(SE, training=False), DATA, check=DATA)[1]


def recorded(spec: Any) -> Any:
    model = plugged(spec, training=False)
    with record(model) as seen:
        model(DATA[0])
        model(DATA[0])
    return seen


def replaced() -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return far.replace(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), dict(type='FAR'))


def evaluation(name: str = 'folded') -> Any:
    from asr_downstream.detection.evaluation.evaluate import Evaluation, Seen

    found = (torch.zeros(1, 4), torch.ones(1), torch.ones(1))
    seen = {1: Seen(name, torch.ones(1, 2, 2))}
    return Evaluation(name, {'AP': 0.25}, {1: found}, 1234, 0.5, 7.0, {'cat': {'AP': 0.25}}, seen)


def comparison() -> Any:
    from asr_downstream.detection.evaluation.compare import Comparison, Differences

    return Comparison(evaluation('unfolded'), evaluation(), Differences(1e-5, 1e-6, 0, 1, 12), 1.0)


def receipt() -> Any:
    entries = [Entry('torch', latency_ms=2.0), Entry('model.onnx', 1e-6, 1_500_000, 'ab', 1.0, 0.5, {'AP': 0.25})]
    varies = {'image': {'0': 'batch'}}
    return Receipt('ResNet', 'classifier', '4 images', entries, varies, {'model.safetensors': 'cd'}, threads=1)


def predictions() -> Any:
    from asr_downstream.detection.prediction.write import Predictions

    return Predictions(Path('found/predictions.json'), 2, {'cat': 1234}, 0.3, 2, ['b.png: is none'])


def learning() -> Any:
    return choose(plugged(ASR), 'gates')


def adapter() -> Any:
    model = plugged({**ASR, 'preserve': True}, training=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('.gate.' in name)
    with TemporaryDirectory() as folder:
        return save_gates(model, Path(folder) / 'night.safetensors')


def removed() -> Any:
    block = NativeBlock('layer.1.se', 'SELayer', 16, 0.25, 'layer.1.conv', 'outputs', 1e-16)
    return NativeReport((block,), calibrated().calibration, verify(*[nn.Linear(4, 4).eval()] * 2, torch.ones(1, 4)))


def ablation() -> Any:
    values = {'stock': (0.5, 0.25, 0.75), 'se': (0.625, 0.25, 0.875)}
    records = [Record(arm, seed, {'AP': ap}) for arm, found in values.items() for seed, ap in enumerate(found)]
    return result_of('detection', 'AP', Metric('AP'), records)


RESULTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    'describe': (lambda: describe(plugged([ASR, SE])), ['layer2.1.bn3', 'ASR(SE) + Attention(SE)']),
    'describe, shared': (lambda: describe(plugged(DIA)), ['shared DIALSTM', '3 sites']),
    'describe, stock': (lambda: describe(nn.Sequential(nn.ReLU())), ['no plugged sites']),
    'far.describe': (replaced, ['layers.0.self_attn', 'auto on cpu']),
    'fold': (lambda: fold(plugged(ASR, training=False))[1], ['folded 9 sites of Net']),
    'fold_calibrated': (calibrated, ['layer2.1.bn3', 'stripe ratio', 'folded 9 sites of Net']),
    'calibration': (lambda: calibrated().calibration, ['layer2.1.bn3', 'outputs change by']),
    'verify': (lambda: verify(*[randomise(nn.Linear(4, 4)).eval()] * 2, torch.ones(1, 4)), ['(1, 4)', '0.00e+00']),
    'record': (lambda: recorded(SE), ['layer2.1.bn3', '(2, 64)']),
    'record, states': (lambda: recorded(DIA), ['layer2.1.bn3', 'states']),
    'learning': (learning, ['learns gates', 'numbers']),
    'adapter': (adapter, ['night.safetensors', 'layer2.1.bn3']),
    'removed attention': (removed, ['layer.1.se', 'SELayer', '0.25']),
    'stripes': (lambda: find_stripes('SE', plugged(SE, training=False), DATA), ['layer2.1.bn3', 'outputs change by']),
    'correlations': (lambda: find_correlations('SE', plugged(SE, training=False), DATA), ['layer2', 'own']),
    'costs': (lambda: measure_costs('SE', plugged(SE, training=False), DATA[0], rounds=1), ['layer2.1.bn3', 'latency']),
    'noise': (
        lambda: NoiseCurves('AP', (Curve('stock', 'gaussian', (0.0, 0.1), (0.5, 0.25)),)),
        ['0.2500', 'gaussian'],
    ),
    'growth': (lambda: Growth('stock', 'gaussian', (BlockGrowth('layer1.0', 1.5, 1.75),)), ['layer1.0', '1.750']),
    'ablation': (ablation, ['SE', '0.583', '95% interval']),
    'receipt': (receipt, ['model.onnx', '1.0e-06', '1.5 MB', 'may vary: image 0: batch']),
    'evaluation': (evaluation, ['folded', '1,234']),
    'comparison': (comparison, ['unfolded', 'x 1.000']),
    'predictions': (predictions, ['1,234', 'left out: b.png']),
}
OF_DETECTION = ('evaluation', 'comparison', 'predictions')
PARAMETERS = [pytest.param(*v, id=k, marks=pytest.mark.det if k in OF_DETECTION else ()) for k, v in RESULTS.items()]


@pytest.mark.parametrize(('make', 'words'), PARAMETERS)
def test_a_result_prints_as_its_table(make: Callable[[], Any], words: list[str]) -> None:
    result = make()
    assert is_dataclass(result)
    assert repr(result) == str(result)
    shown = result._repr_html_()
    assert shown.count('<table>') == sum(not isinstance(part, str) for part in result.parts())
    for text in (repr(result), shown):
        assert 'tensor(' not in text
        assert f'{type(result).__name__}(' not in text
    for word in words:
        assert word in repr(result)
        assert word in shown


@pytest.mark.det
def test_every_result_that_is_printed_is_tested_here() -> None:
    for module in pkgutil.walk_packages(asr_downstream.__path__, 'asr_downstream.'):
        if not module.name.endswith('__main__'):
            importlib.import_module(module.name)
    assert {type(make()) for make, _ in RESULTS.values()} == set(Printed.__subclasses__())


def test_names_are_text_in_html_too() -> None:
    shown = Description('<b>Net</b>', (), candidates=('<i>',))._repr_html_()
    assert '<b>' not in shown
    assert '&lt;b&gt;Net&lt;/b&gt;' in shown


def test_gates_of_a_site_are_no_dump_in_the_rows_either() -> None:
    assert 'tensor(' not in repr(calibrated().calibration.sites)
