"""fold(calibrate=...): means, constancy, budgets, refined batch norms; and record."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.plugged import assert_untouched, snapshot
from helpers.shared import ASR_DIA, DIA, Net, images, plugged
from torch import Tensor, nn

from asr_downstream import FoldError, describe, fold, fold_calibrated, plug, record, verify
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.plugging.layers import Plugged

SE = dict(type='Attention', attention=dict(type='SE', reduction=4))
CBAM = dict(type='Attention', attention=dict(type='CBAM', reduction=4))
SPECS = {
    'SE': SE,
    'CBAM': CBAM,
    'CBAM-channel': dict(type='Attention', attention=dict(type='CBAM', spatial=False)),
    'SRM': dict(type='Attention', attention=dict(type='SRM')),
    'DIA': DIA,
    'DIA-SE': dict(type='DIA', attention=dict(type='SE')),
    'ASR+SE': [dict(type='ASR', attention=dict(type='SE')), SE],
    'SE+ECA': [SE, dict(type='Attention', attention=dict(type='ECA'))],
    'preserved': dict(SE, preserve=True),
}
DATA = [images(4) for _ in range(3)]


def flat(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, Plugged)]


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_folds_to_the_stock_model_with_the_mean_of_the_gates(spec: Any) -> None:
    model = plugged(spec, training=False)
    before = snapshot(model)
    with record(model) as seen:
        old = torch.cat([model(x) for x in DATA])
    folded, report = fold(model, calibrate=DATA)
    assert_untouched(model, before)
    stock = Net().double().eval()
    assert [type(m) for m in folded.modules()] == [type(m) for m in stock.modules()]
    stock.load_state_dict(folded.state_dict(), strict=True)
    layer, new = model.layer2[1].bn3, folded.layer2[1].bn3
    gates = torch.cat(seen.gates['layer2.1.bn3'])
    mean = gates.flatten(2).mean((0, 2)) if gates.dim() > 2 else gates.mean(0)
    if layer.gate is not None:
        mean = mean * layer.gate[0]()
    torch.testing.assert_close(new.weight, layer.weight * mean)
    torch.testing.assert_close(new.bias, layer.bias * mean)
    found = report.calibration
    change = torch.cat([folded(x) for x in DATA]) - old
    assert found.change == pytest.approx(float((change.norm() / old.norm()).detach()))
    assert found.change > 1e-3  # these gates do move
    assert len(found.sites) == 9
    assert not found.kept
    row = next(s for s in found.sites if s.path == 'layer2.1.bn3')
    rows = gates.flatten(2).movedim(1, -1).flatten(0, -2) if gates.dim() > 2 else gates
    assert row.over_samples == pytest.approx(float(rows.std(0, unbiased=False).mean()))
    assert row.over_channels == pytest.approx(float(rows.mean(0).std(unbiased=False)))
    assert row.ratio == pytest.approx(row.over_samples / row.over_channels)
    assert row.samples == len(rows)
    assert 'stripe ratio' in str(report)


def test_gates_that_are_constant_fold_without_a_change() -> None:
    model = plugged(SE, training=False)
    for layer in flat(model):
        layer.dynamic[0].attention.start_constant()
    folded, report = fold(model, calibrate=DATA)
    assert all(s.ratio < 1e-6 for s in report.calibration.sites)
    assert report.calibration.change < 1e-12
    assert verify(model, folded, DATA[0]).relative < 1e-10


def test_constant_gates_need_no_data() -> None:
    model = plugged(ASR_DIA, training=False)
    folded, report = fold(model, calibrate=DATA)
    assert report.calibration is None
    assert verify(model, folded, DATA[0]).relative < 1e-10


def uneven(spec: Any = SE) -> nn.Module:
    """Stage 3 has constant gates, stage 1 the least constant ones."""
    model = plugged(spec, training=False)
    with torch.no_grad():
        for stage, factor in ((model.layer1, 8.0), (model.layer2, 0.5), (model.layer3, 0.0)):
            for layer in flat(stage):
                layer.dynamic[0].attention.fc2.weight.mul_(factor)
    return model


def test_the_budget_keeps_the_least_constant_sites_and_no_more() -> None:
    model = uneven()
    everything = fold(model, calibrate=DATA)[1].calibration
    budget = everything.change / 3
    folded, report = fold(model, calibrate=DATA, max_drop=budget)
    found = report.calibration
    assert found.change <= budget
    assert 0 < len(found.kept) < 9
    assert set(found.kept) == {s.path for s in found.sites[-len(found.kept) :]}
    assert {row.path for row in describe(folded).sites} == set(found.kept)
    assert set(found.kept) <= {f'layer{s}.{b}.bn3' for s in (1, 2) for b in range(3)}
    fewer = [t for t in found.trials if t.kept == len(found.kept) - 1]
    assert fewer[0].drop > budget  # one less would have been too few
    assert 'kept' in str(report)
    none, report = fold(model, calibrate=DATA, max_drop=-1.0)
    assert len(report.calibration.kept) == 9
    assert verify(none, model, DATA[0]).relative < 1e-12


def test_a_metric_and_its_budget() -> None:
    model = uneven()
    x = DATA[0]
    truth = model(x).argmax(1)

    def accuracy(candidate: nn.Module) -> float:
        return float((candidate(x).argmax(1) == truth).double().mean())

    report = fold(model, calibrate=DATA, metric=accuracy, max_drop=0.0)[1].calibration
    assert report.metric_before == report.metric_after == 1
    loose = fold(model, calibrate=DATA, metric=accuracy, max_drop=1.0)[1].calibration
    assert not loose.kept
    assert 'metric: 1.0000 before' in str(loose)


def test_a_recurrent_unit_folds_as_a_whole_or_not_at_all() -> None:
    model = plugged(DIA, training=False)
    everything = fold(model, calibrate=DATA)[1].calibration.change
    folded, report = fold(model, calibrate=DATA, max_drop=everything * 0.9)
    kept = report.calibration.kept
    assert len(kept) in (3, 6)
    assert sorted(folded.shared_attention) == sorted({path.split('.')[0] for path in kept})
    assert verify(copy.deepcopy(folded), folded, DATA[0]).absolute == 0
    assert float((torch.cat([folded(x) - model(x) for x in DATA])).norm()) > 0


def test_refined_batch_norms_have_the_statistics_of_the_folded_model() -> None:
    model = plugged(SE, training=False)
    plain, _ = fold(model, calibrate=DATA)
    folded, report = fold(model, calibrate=DATA, refine_norms=True)
    assert report.calibration.refined
    assert torch.equal(folded.layer1[0].bn3.weight, plain.layer1[0].bn3.weight)
    inputs: list[Tensor] = []
    folded.bn1.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    for x in DATA:
        folded(x)
    torch.testing.assert_close(folded.bn1.running_mean, torch.stack([i.mean((0, 2, 3)) for i in inputs]).mean(0))
    assert folded.bn1.momentum == 0.1
    assert not any(m.training for m in folded.modules())


def test_other_ways_to_call_a_model() -> None:
    model = plugged(SE, training=False)
    pairs = [[x, torch.zeros(len(x))] for x in DATA]
    with pytest.raises(FoldError, match=r'cannot be called with this list.*step=lambda'):
        fold(model, calibrate=pairs)
    folded, report = fold(model, calibrate=pairs, step=lambda m, batch: m(batch[0]))
    expected, other = fold(model, calibrate=DATA)
    assert report.calibration.change == other.calibration.change
    assert verify(folded, expected, DATA[0]).absolute == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(calibrate=[]), 'there was no data'),
        (dict(calibrate=iter(DATA)), 'give a list or a DataLoader'),
        (dict(max_drop=0.1), r'belong to calibrate'),
        (dict(dynamic='drop'), "use 'error' or 'keep'"),
        (dict(dynamic='keep', calibrate=DATA), r"dynamic='keep' leaves gates .* and calibrate=... folds them"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    model = plugged(SE, training=False)
    with pytest.raises(FoldError, match=message):
        fold(model, **change)
    with pytest.raises(FoldError, match='training mode'):
        fold(model.train(), calibrate=DATA)


def test_diverged_gates_and_unreached_sites_are_refused() -> None:
    model = plugged(SE, training=False)
    model.unused = nn.Linear(2, 2).double()
    plug(model, dict(SE, sites=['unused']))
    with pytest.raises(FoldError, match=r'unused: was not reached'):
        fold(model.eval(), calibrate=DATA)
    model = plugged(SE, training=False)
    with torch.no_grad():
        model.layer1[0].bn3.dynamic[0].attention.fc2.bias.fill_(math.nan)
    with pytest.raises(FoldError, match=r'layer1.0.bn3: its gates are not finite'):
        fold(model, calibrate=DATA)


def test_a_shuffling_loader_compares_the_same_images() -> None:
    model = plugged(SE, training=False)
    for layer in flat(model):
        layer.dynamic[0].attention.start_constant()
    loader = torch.utils.data.DataLoader(torch.cat(DATA), batch_size=4, shuffle=True)
    assert fold(model, calibrate=loader)[1].calibration.change < 1e-12


def test_refining_leaves_alone_what_it_does_not_reach() -> None:
    model = plugged(dict(type='Attention', attention=dict(type='SRM')), training=False)
    nn.init.constant_(model.bn1.running_mean, 3.0)
    step = lambda m, x: m.layer1(x)  # noqa: E731
    data = [torch.randn(1, 8, 6, 6, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(FoldError, match=r'layer2.0.bn3: was not reached'):
        fold(model, calibrate=data, step=step)
    model = Net().double().eval()
    plug(model, dict(type='Attention', attention=dict(type='SRM'), sites=['layer1.*.bn3']))
    randomise(model).eval()
    nn.init.constant_(model.bn1.running_mean, 3.0)
    folded, report = fold(model, calibrate=data, step=step, refine_norms=True, max_drop=10.0)
    assert report.calibration.refined
    assert torch.equal(folded.bn1.running_mean, model.bn1.running_mean)
    assert not torch.equal(folded.layer1[0].bn1.running_mean, model.layer1[0].bn1.running_mean)


def test_refining_leaves_the_gates_that_are_kept_alone() -> None:
    model = plugged(dict(type='Attention', attention=dict(type='SRM')), training=False)
    ones = [images(1) for _ in range(3)]  # the batch norms of SRM could not train on one sample
    everything = fold(model, calibrate=ones, refine_norms=True)[1].calibration.change
    folded, report = fold(model, calibrate=ones, refine_norms=True, max_drop=everything * 0.5)
    kept = report.calibration.kept
    assert kept
    norms = [folded.get_submodule(path).dynamic[0].attention.norm for path in kept]
    olds = [model.get_submodule(path).dynamic[0].attention.norm for path in kept]
    assert all(torch.equal(a.running_mean, b.running_mean) for a, b in zip(norms, olds, strict=True))


def test_a_budget_that_nothing_meets_changes_nothing() -> None:
    model = plugged(SE, training=False)
    folded, report = fold(model, calibrate=DATA, refine_norms=True, max_drop=0.0)
    assert len(report.calibration.kept) == 9
    assert not report.calibration.refined
    assert verify(folded, model, DATA[0]).absolute == 0


def test_numbers_that_are_none_are_refused() -> None:
    model = plugged(SE, training=False)
    with pytest.raises(FoldError, match='the metric is nan'):
        fold(model, calibrate=DATA, metric=lambda m: math.nan, max_drop=0.0)
    with pytest.raises(FoldError, match='outputs are not finite'):
        fold(model, calibrate=DATA, step=lambda m, x: m(x).log(), max_drop=0.0)


def test_options_of_calibration_are_not_dropped_silently() -> None:
    with pytest.warns(UserWarning, match='are not used'):
        fold(plugged(ASR_DIA, training=False), calibrate=DATA, refine_norms=True)


def test_the_short_form_is_fold_calibrated() -> None:
    model = plugged([dict(type='ASR', attention=dict(type='SE')), SE], training=False)
    options: dict[str, Any] = dict(refine_norms=True, max_drop=0.05, check=DATA[:1])
    (folded, report), (short, other) = fold_calibrated(model, DATA, **options), fold(model, calibrate=DATA, **options)
    assert report.calibration.kept
    assert report.checked.absolute < 1e-9
    assert str(report) == str(other)
    assert verify(folded, short, DATA[0]).absolute == 0


@pytest.mark.parametrize(
    'call',
    [
        lambda: fold(Net().eval()),
        lambda: fold_exactly(Net().eval()),
        lambda: fold_calibrated(Net().eval(), DATA),
        lambda: fold(Net().eval(), calibrate=DATA),
    ],
)
def test_a_warning_names_the_line_that_folded(call: Any) -> None:
    with pytest.warns(UserWarning, match='has no plugged sites') as seen:
        call()
    assert [w.filename for w in seen] == [__file__]


def test_record_shows_gates_and_states() -> None:
    model = plugged(DIA, training=False)
    with record(model) as seen, torch.no_grad():
        model(DATA[0])
        model(DATA[1][:1])
    assert [g.shape for g in seen.gates['layer1.2.bn3']] == [(4, 32), (1, 32)]
    assert seen.gates.keys() == seen.states.keys()
    h, c = seen.states['layer1.2.bn3'][0]
    assert torch.equal(h, seen.gates['layer1.2.bn3'][0])
    assert c.shape == h.shape
    model(DATA[0])
    assert len(seen.gates['layer1.2.bn3']) == 2  # nothing is recorded outside
    constant = randomise(plugged(ASR_DIA, training=False))
    with record(constant) as seen, torch.no_grad():
        constant(DATA[0])
    torch.testing.assert_close(seen.gates['layer3.1.bn3'][0][0], constant.layer3[1].bn3.constant())
