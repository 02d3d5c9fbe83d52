"""`Start`: the affine at every site scaled once, and nothing else; alone, before gates, saved, loaded, folded."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.cases import LAYER_CASES, LayerCase
from helpers.far import noisy, unet
from helpers.plugged import ASR, CLASSIC, X, assert_untouched, snapshot, tiny
from torch import nn

from asr_downstream import PlugError, describe, fold, load_plugged, plug, record, verify
from asr_downstream.plugging.plugs.start import scaled_again

HALF = dict(type='Start', value=0.5)


def changed(model: nn.Module, before: nn.Module) -> set[str]:
    now, old = model.state_dict(), before.state_dict()
    return {name for name in {**now, **old} if not torch.equal(now[name], old[name])}


@pytest.mark.parametrize('case', LAYER_CASES, ids=lambda case: case.name)
def test_the_output_of_every_layer_is_scaled_and_the_layer_stays_the_stock_one(case: LayerCase) -> None:
    layer = randomise(case.build()).double().eval()
    model = nn.Sequential(copy.deepcopy(layer))
    plug(model, dict(HALF, value=0.25, sites=['0']))
    x = case.input()
    torch.testing.assert_close(model(x), 0.25 * layer(x), rtol=1e-12, atol=1e-12)
    assert type(model[0]) is type(layer)
    assert list(model.state_dict()) == [f'0.{name}' for name in layer.state_dict()]


def test_only_the_affines_of_the_sites_change() -> None:
    stock = randomise(tiny())
    model = copy.deepcopy(stock)
    names = [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters())
    plug(model, dict(HALF, skip=['layer1.*']))
    ends = {f'layer{s}.{b}.bn3.{kind}' for s in (2, 3) for b in (0, 1) for kind in ('weight', 'bias')}
    assert changed(model, stock) == ends
    for name in ends:
        assert torch.equal(model.get_parameter(name), 0.5 * stock.get_parameter(name))
        assert model.get_parameter(name) is parameters[name]
        assert model.get_parameter(name).requires_grad
    assert [name for name, _ in model.named_modules()] == names
    assert not model._forward_pre_hooks


def test_sites_by_pattern_and_zero() -> None:
    model = randomise(tiny())
    plug(model, dict(HALF, value=0, sites=['layer3.1.bn3', 'fc']))
    assert not model.fc.weight.any()
    assert not model.layer3[1].bn3.bias.any()
    assert model.layer3[0].bn3.weight.any()


def test_zero_is_a_start_that_learns() -> None:
    model = tiny()
    plug(model, dict(HALF, value=0))
    model(torch.randn(X)).square().mean().backward()
    assert all(model.get_submodule(row.path).weight.grad.any() for row in describe(model).starts)


def test_describe_lists_it_and_stock_models_have_none() -> None:
    model = tiny()
    found = plug(model, HALF)
    assert found == describe(model)
    assert not found.sites
    assert found.parameters == 0
    assert [(row.path, row.layer, row.channels, row.value) for row in found.starts][0] == (
        'layer1.0.bn3', 'BatchNorm2d', 32, 0.5,
    )  # fmt: skip
    assert len(found.starts) == 6
    assert 'Start(0.5)' in str(found)
    assert 'ResNet: 6 sites, 0 parameters added' in str(found)
    assert not describe(tiny()).starts


def test_before_gates_it_halves_and_they_work_as_ever() -> None:
    alone = randomise(tiny()).double().eval()
    both = copy.deepcopy(alone)
    torch.manual_seed(1)
    plug(alone, [dict(ASR), CLASSIC])
    torch.manual_seed(1)
    rows = plug(both, [HALF, dict(ASR), CLASSIC]).sites
    assert rows[0].plug == 'Start(0.5) + ASR(SE) + Attention(SE)'
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    a, b = alone.layer1[0].bn3, both.layer1[0].bn3
    assert torch.equal(b.weight, a.weight / 2)
    y = nn.BatchNorm2d.forward(a, x) * a.gate[0]().view(1, -1, 1, 1) / 2
    torch.testing.assert_close(b(x), y * b.dynamic[0].attention(y)[..., None, None], rtol=1e-10, atol=1e-10)
    with record(both) as seen:
        both(torch.randn(X, dtype=torch.float64))
    assert 'layer1.0.bn3' in seen.gates


def test_with_preserve_the_gates_start_from_the_halved_model() -> None:
    halved = randomise(tiny()).double().eval()
    both = copy.deepcopy(halved)
    plug(halved, HALF)
    plug(both, [HALF, dict(ASR, preserve=True)])
    assert verify(both, halved, torch.randn(X, dtype=torch.float64)).absolute == 0


def test_folding_gives_the_model_as_it_is_without_a_warning() -> None:
    model = randomise(tiny()).eval()
    plug(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        folded, report = fold(model)
    assert not changed(folded, model)
    assert not report.sites
    assert 'have no gates' in report.message
    assert not describe(folded).starts
    assert 'plug_spec' not in vars(folded)
    plug(folded, HALF)  # a stock model again
    assert changed(folded, model)


def test_folding_it_with_gates_is_exact() -> None:
    model = randomise(tiny()).double().eval()
    plug(model, [dict(HALF, sites=['layer1.*.bn3']), dict(ASR, sites=['layer[12].*.bn3'])])
    folded, report = fold(model)
    assert len(report.sites) == 4
    assert verify(folded, model, torch.randn(X, dtype=torch.float64)).relative < 1e-12
    assert type(folded.layer1[0].bn3) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(type='Start'), "needs 'value'"),
        (dict(HALF, value=-0.5), 'value=-0.5 should be a finite number of at least 0'),
        (dict(HALF, value=float('nan')), 'value=nan should be a number that is finite'),
        (dict(HALF, value=float('inf')), 'value=inf should be a number that is finite'),
        (dict(HALF, value=True), 'value=True should be a number'),
        (dict(HALF, value='0.5'), "value='0.5' should be a number"),
        (dict(HALF, preserve=True), "takes no 'preserve'"),
        (dict(HALF, attention=dict(type='SE')), "takes no 'attention'"),
        (dict(HALF, sites=[]), r'sites=\[\] is empty'),
        (dict(HALF, skip=['nothing']), "skip: 'nothing' matches none"),
        (
            [ASR, HALF],
            r'layer1.0.bn3: Start scales .* put it first in the list, \[Start, ASR\]',
        ),
        ([HALF, dict(HALF, sites=['layer2.0.bn3'])], 'layer2.0.bn3: is scaled by 0.5 already'),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_touched(spec: Any, message: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(PlugError, match=message):
        plug(model, spec)
    assert_untouched(model, before)


def test_a_second_start_is_refused_wherever_the_first_one_was_plugged() -> None:
    model = tiny()
    plug(model.layer1, dict(HALF, sites=['*.bn3']))
    before = snapshot(model)
    with pytest.raises(PlugError, match='layer1.0.bn3: is scaled by 0.5 already, and would be scaled twice'):
        plug(model, HALF)
    assert_untouched(model, before)
    plug(model, dict(HALF, skip=['layer1.*']))
    assert len(describe(model).starts) == 6
    plug(model, dict(ASR))  # gates may come later


def test_weights_that_are_loaded_later_stay_as_they_are() -> None:
    trained, model = randomise(tiny()).eval(), tiny().eval()
    plug(model, HALF)
    model.load_state_dict(trained.state_dict())  # as a resumed training, or an evaluation does
    assert not changed(model, trained)
    assert verify(model, trained, torch.randn(X)).absolute == 0


def test_copies_and_pickles_know_it() -> None:
    model = tiny()
    plug(model, HALF)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert describe(again).starts == describe(model).starts
        with pytest.raises(PlugError, match='already'):
            plug(again, HALF)


def test_a_library_saves_it_as_the_stock_model_that_it_is(tmp_path: Path) -> None:
    model = randomise(unet()).eval()
    plug(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, local_files_only=True)
    assert not changed(again, model)


def test_with_gates_it_is_saved_with_the_spec_and_not_scaled_again(tmp_path: Path) -> None:
    model = unet()
    plug(model, [HALF, dict(ASR)])
    randomise(model).eval()
    with pytest.warns(UserWarning, match='load_plugged'):
        model.save_pretrained(tmp_path)
    again = load_plugged(tmp_path)
    assert not changed(again, model)
    assert [row.plug for row in describe(again).sites] == [row.plug for row in describe(model).sites]
    assert all(row.plug.startswith('Start(0.5) + ') for row in describe(again).sites)
    with torch.no_grad():
        assert torch.equal(model(**noisy())[0], again(**noisy())[0])


def test_it_warns_where_it_changes_nothing() -> None:
    model = tiny()
    for path in ('layer1.0.bn3', 'layer2.1.bn3', 'layer3.0.bn3'):
        nn.init.zeros_(model.get_submodule(path).weight)
    nn.init.ones_(model.layer3[0].bn3.bias)  # only its weight is zero: that bias is halved
    with pytest.warns(UserWarning, match=r'Start\(0.5\) changes nothing at 2 of 6 .*: layer1.0.bn3, layer2.1.bn3\. '):
        plug(model, [HALF, dict(ASR)])
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plug(model, HALF)
    with (
        pytest.warns(UserWarning, match=r'at 1 of 6 sites: weight and bias are zero there: layer1.0.bn3'),
        scaled_again(model),
    ):
        nn.init.zeros_(model.layer1[0].bn3.weight)


def test_a_start_at_zero_has_what_it_asks_for() -> None:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plug(model, dict(HALF, value=0))
        with scaled_again(model):
            pass


def test_what_an_initialisation_sets_anew_is_scaled_and_what_it_leaves_is_not() -> None:
    model = tiny()
    plug(model, dict(HALF, sites=['layer1.0.bn3', 'layer1.1.bn3', 'fc']))
    fc = model.fc.weight.detach().clone()
    with scaled_again(model):
        nn.init.constant_(model.layer1[0].bn3.weight, 3.0)
        nn.init.constant_(model.fc.bias, 1.0)
    assert torch.equal(model.layer1[0].bn3.weight, torch.full((32,), 1.5))
    assert torch.equal(model.layer1[1].bn3.weight, torch.full((32,), 0.5))
    assert torch.equal(model.fc.bias, torch.full((10,), 0.5))
    assert torch.equal(model.fc.weight, fc)
    with scaled_again(model):  # as init_weights() of MMEngine does when it is called again
        pass
    assert torch.equal(model.layer1[0].bn3.weight, torch.full((32,), 1.5))
