"""fold and verify: contracts, refusals, and a model that stays as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import randomise
from helpers.cases import ATTENTIONS
from helpers.plugged import ASR, CLASSIC, X, assert_untouched, snapshot, tiny
from torch import nn

from asr_downstream import AsrError, FoldError, describe, fold, plug, verify
from asr_downstream.plugging.layers import Plugged


def plugged(spec: object = ASR) -> nn.Module:
    model = randomise(tiny().double()).eval()
    plug(model, spec)
    return randomise(model)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_folded_is_the_stock_model_with_stock_keys(attention: str) -> None:
    model = plugged(dict(type='ASR', attention=dict(type=attention)))
    before = snapshot(model)
    folded, report = fold(model)
    assert_untouched(model, before)
    stock = tiny().double().eval()
    assert [type(m) for m in folded.modules()] == [type(m) for m in stock.modules()]
    assert vars(folded).keys() == vars(stock).keys()
    stock.load_state_dict(folded.state_dict(), strict=True)
    x = torch.randn(X, dtype=torch.float64)
    assert verify(model, folded, x).relative < 1e-10
    assert verify(folded, stock, x).absolute == 0
    assert len(report.sites) == 6
    assert report.message == 'folded 6 sites of ResNet'
    # Negative control: the same weights without their gates compute something else.
    bare = tiny().double().eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if '.gate.' not in k})
    assert verify(model, bare, x).relative > 1e-3


def test_folded_in_single_precision() -> None:
    model = plugged().float()
    assert verify(model, fold(model)[0], torch.randn(X)).relative < 1e-5


def test_preserve_folds_too() -> None:
    model = randomise(tiny().double()).eval()
    stock = copy.deepcopy(model)
    plug(model, dict(ASR, preserve=True))
    x = torch.randn(X, dtype=torch.float64)
    assert verify(fold(model)[0], stock, x).relative < 1e-12
    for layer in [m for m in model.modules() if isinstance(m, Plugged)]:
        nn.init.normal_(layer.gate[0].psi)
    assert verify(fold(model)[0], model, x).relative < 1e-10
    assert verify(fold(model)[0], stock, x).relative > 1e-3


def test_a_classic_layer_scale_folds() -> None:
    model = plugged(dict(type='Attention', attention=dict(type='LayerScale')))
    assert verify(model, fold(model)[0], torch.randn(X, dtype=torch.float64)).relative < 1e-10


def test_folding_twice_is_a_no_op_that_says_so() -> None:
    folded, _ = fold(plugged())
    with pytest.warns(UserWarning, match='was folded before'):
        again, report = fold(folded)
    assert report.already_stock
    assert again is not folded
    assert verify(again, folded, torch.randn(X, dtype=torch.float64)).absolute == 0


def test_input_dependent_gates_are_an_error_or_are_kept() -> None:
    model = plugged([dict(ASR, repeat=2), CLASSIC])
    with pytest.raises(FoldError, match=r"SE at layer1.0.bn3.*depend on the input.*dynamic='keep'"):
        fold(model)
    kept, report = fold(model, dynamic='keep')
    assert all(site.kept for site in report.sites)
    assert {row.plug for row in describe(kept).sites} == {'Attention(SE)'}
    assert 'still plugged' in report.message
    again, nothing = fold(kept, dynamic='keep')
    assert nothing.sites == ()
    assert nothing.message.startswith('folded 0 sites')
    assert verify(model, kept, torch.randn(X, dtype=torch.float64)).relative < 1e-10


def train_layer(model: nn.Module) -> None:
    model.layer2[0].bn3.train()


def poison(value: float, where: str) -> object:
    def damage(model: nn.Module) -> None:
        layer = model.layer2[1].bn3
        tensor = {'gate': layer.gate[0].attention.fc2.bias, 'weight': layer.weight, 'bias': layer.bias}[where]
        tensor.data[0] = value

    return damage


REFUSALS = [
    (lambda m: m.train(), 'training mode: call model.eval'),
    (train_layer, 'layer2.0.bn3 is in training mode'),
    (poison(float('nan'), 'gate'), r'layer2.1.bn3: 1 of 64 gates are not finite'),
    (poison(float('inf'), 'weight'), 'layer2.1.bn3: the folded weight is not finite'),
    (poison(float('nan'), 'bias'), 'layer2.1.bn3: the folded bias is not finite'),
]


@pytest.mark.parametrize(('damage', 'message'), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals_name_the_site_and_leave_the_model_alone(damage: object, message: str) -> None:
    model = plugged()
    damage(model)
    layer = model.layer2[1].bn3
    bits = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(FoldError, match=message):
        fold(model)
    assert isinstance(layer, Plugged)
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, bits[name], rtol=0, atol=0, equal_nan=True)


def test_unknown_dynamic() -> None:
    with pytest.raises(FoldError, match="'error' or 'keep'"):
        fold(plugged(), dynamic='drop')


def test_folding_does_not_share_memory_with_the_plugged_model() -> None:
    model = plugged()
    folded, _ = fold(model)
    ours = {t.data_ptr() for t in model.state_dict().values()}
    assert not ours & {t.data_ptr() for t in folded.state_dict().values()}


def test_a_perturbed_fold_is_seen_by_verify() -> None:
    model = plugged()
    folded, _ = fold(model)
    with torch.no_grad():
        folded.layer3[1].bn3.weight[3] *= 1.01
    assert verify(model, folded, torch.randn(X, dtype=torch.float64)).relative > 1e-6


class Outputs(nn.Module):
    def __init__(self, **outputs: object) -> None:
        super().__init__()
        self.outputs = outputs
        self.eval()

    def forward(self, scale: torch.Tensor) -> object:
        return {k: [scale * t for t in v] for k, v in self.outputs.items()}


def test_verify_reports_output_by_output() -> None:
    a = Outputs(maps=[torch.ones(2), torch.full((3,), 4.0)])
    b = Outputs(maps=[torch.ones(2), torch.full((3,), 5.0)])
    found = verify(a, b, [torch.tensor(1.0), dict(scale=torch.tensor(2.0)), (torch.tensor(1.0),)])
    assert [d.output for d in found.outputs] == ['output.maps[0]', 'output.maps[1]']
    assert found.absolute == 2
    assert found.relative == pytest.approx(0.2)
    assert 'maps[1]' in str(found)


@pytest.mark.parametrize(
    ('outputs', 'message'),
    [
        (dict(maps=[torch.ones(3)]), 'shapes'),
        (dict(other=[torch.ones(2)]), 'different outputs'),
    ],
)
def test_verify_refuses_what_does_not_correspond(outputs: dict, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        verify(Outputs(maps=[torch.ones(2)]), Outputs(**outputs), torch.tensor(1.0))
    with pytest.raises(AsrError, match='no tensors'):
        verify(Outputs(), Outputs(), torch.tensor(1.0))


@pytest.mark.parametrize('a_is_nan', [True, False])
def test_verify_counts_nan_as_infinitely_far(a_is_nan: bool) -> None:
    nan, one = torch.tensor([float('nan'), 1.0]), torch.ones(2)
    a, b = (nan, one) if a_is_nan else (one, nan)
    found = verify(Outputs(z=[one], m=[a]), Outputs(z=[one], m=[b]), torch.tensor(1.0))
    assert found.absolute == float('inf')
    assert found.relative == float('inf')


def test_verify_refuses_training_mode() -> None:
    with pytest.raises(AsrError, match='training mode'):
        verify(plugged().train(), plugged(), torch.randn(X, dtype=torch.float64))


def test_folding_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        _, report = fold(plugged())
    assert len(report.sites) == 6
