"""Pruning of hidden units: regulariser, scores, budgets, masked and smaller models, saved models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.far import CASES, FAR, unet, vit
from torch import nn

from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.far import MultiHeadLSTM, describe, replace
from asr_downstream.far.export import load_far, save_far
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.prune.budgets import Budget, cut
from asr_downstream.far.prune.scores import group_norms, hoyer_square, mask_units, scores, shrink, units_above
from asr_downstream.measure import cost


def student(variant: str = 'M3', **kwargs: Any) -> Any:
    model = vit(width=24, heads=3, **kwargs)
    replace(model, {**FAR, 'variant': variant})
    return randomise(model).double().eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(pixel_values=CASES['ViT'].inputs()['pixel_values'].double()).logits


def test_norms_of_a_group_are_its_rows_and_its_column() -> None:
    mixer = MultiHeadLSTM(6, 2).double()
    found = group_norms(nn.Sequential(mixer))
    lstm = mixer.heads[1].both
    for back, end in ((False, '_l0'), (True, '_l0_reverse')):
        w_ih, w_hh = getattr(lstm, f'weight_ih{end}'), getattr(lstm, f'weight_hh{end}')
        for unit in range(3):
            own = torch.zeros_like(w_hh, dtype=torch.bool)
            own[unit::3] = True
            own[:, unit] = True
            wanted = (w_ih[unit::3].square().sum() + w_hh[own].square().sum()).sqrt()
            (norms,) = [v for (_, head, reverse), v in found.items() if head == 1 and reverse == back]
            assert norms[unit].item() == pytest.approx(wanted.item(), rel=1e-12)


def test_hoyer_square_counts_units() -> None:
    mixer = MultiHeadLSTM(4, 1).double()
    with torch.no_grad():
        for parameter in mixer.heads.parameters():
            parameter.fill_(1.0)
    assert hoyer_square(mixer).item() == pytest.approx(8, rel=1e-6)  # 4 equal norms in each of two directions
    mask_units(mixer, {unit: torch.tensor([True, False, False, False]) for unit in group_norms(mixer)})
    assert hoyer_square(mixer).item() == pytest.approx(2, rel=1e-6)
    hoyer_square(mixer).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


def random_units(model: nn.Module, seed: int = 0) -> Any:
    stream = torch.Generator().manual_seed(seed)
    kept = {unit: torch.rand(len(values), generator=stream) < 0.5 for unit, values in scores(model).items()}
    first = next(iter(kept))
    kept[first] = torch.zeros_like(kept[first])  # a direction without units
    path = first[0]
    for back in (False, True):
        kept[path, 1, back] = torch.zeros_like(kept[path, 1, back])  # a head without units
    return kept


@pytest.mark.parametrize('variant', ['M1', 'M2', 'M3'])
@pytest.mark.parametrize('execution', ['auto', 'dense', 'scan'])
def test_the_smaller_model_equals_the_masked_one(variant: str, execution: str) -> None:
    whole = student(variant)
    kept = random_units(whole)
    masked, smaller = copy.deepcopy(whole), copy.deepcopy(whole)
    mask_units(masked, kept)
    table = shrink(smaller, kept)
    for _, mixer in mixers(smaller):
        mixer.execution = execution
    assert torch.allclose(logits(smaller), logits(masked), rtol=1e-10, atol=1e-11)
    assert not torch.allclose(logits(smaller), logits(whole), atol=1e-3)
    assert cost.parameters(smaller) < cost.parameters(whole)
    assert sum(row.units for row in table.rows) == sum(int(stay.sum()) for stay in kept.values())
    pairs = [pair for row in table.rows for pair in row.widths]
    assert any(a != b for a, b in pairs)
    assert (0, 0) in pairs
    logits(smaller).sum().backward()  # trains on


def test_biases_of_removed_units_would_go_on_emitting() -> None:
    whole = student()
    kept = random_units(whole)
    masked = copy.deepcopy(whole)
    mask_units(masked, kept)
    weights_only = copy.deepcopy(whole)
    for (path, mixer), (_, other) in zip(mixers(weights_only), mixers(masked), strict=True):
        assert path
        for (name, value), (_, new) in zip(mixer.named_parameters(), other.named_parameters(), strict=True):
            if 'heads' in name and 'weight' in name:
                value.data.copy_(new)
    assert not torch.allclose(logits(weights_only), logits(masked), atol=1e-3)


def test_a_score_is_a_norm_and_not_a_signed_sum() -> None:
    mixer = MultiHeadLSTM(8, 1).double()
    with torch.no_grad():
        for parameter in mixer.heads.parameters():
            parameter.fill_(-1.0)  # sums are negative: the signed score would remove every unit
    assert all(stay.all() for stay in units_above(scores(mixer), 0.5).values())
    absolute = scores(mixer, relative=False)
    assert all(torch.allclose(v, group_norms(mixer)[unit]) for unit, v in absolute.items())


@pytest.mark.parametrize('share', [0.75, 0.5, 0.25])
def test_a_budget_of_units_or_parameters_is_met_closely(share: float) -> None:
    model = student()
    cut(model, Budget('units', share))
    units = sum(row.units for row in describe(model).rows)
    assert share * 96 - 1 <= units <= share * 96
    whole = student()
    smaller, again = copy.deepcopy(whole), copy.deepcopy(whole)
    wanted = round((0.8 + share / 5) * cost.parameters(whole))
    cut(smaller, Budget('parameters', wanted))
    unit = 4 * (8 + 8 + 2) + 8  # most that one unit can weigh
    assert wanted - unit <= cost.parameters(smaller) <= wanted
    cut(again, Budget('parameters', wanted / cost.parameters(whole)))
    assert cost.parameters(again) == cost.parameters(smaller)


def test_a_budget_of_latency_is_met_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from asr_downstream.far.prune import budgets

    def pretended(model: Any, whole: Any, example: Any) -> float:  # a clock that runs with the units: the test is exact
        one, other = (1.0 + sum(row.units for row in describe(m).rows) for m in (model, whole))
        return one / other

    monkeypatch.setattr(budgets, 'time_ratio', pretended)
    model = student()
    cut(model, Budget('latency', 0.5))
    assert sum(row.units for row in describe(model).rows) == 47  # (1 + 47) / (1 + 96) <= 0.5
    with pytest.raises(AsrError, match='cannot be met by removing hidden units'):
        cut(student(), Budget('latency', 0.001))
    monkeypatch.setattr(budgets, 'time_ratio', lambda model, whole, example: 1.1)  # a smaller model that is slower
    assert cut(student(), Budget('latency', 1.0)) == 0
    with pytest.raises(AsrError, match='cannot be met'):
        cut(student(), Budget('parameters', 100))


@pytest.mark.parametrize(('kind', 'value'), [('units', 0), ('units', 1.5), ('latency', 2), ('width', 0.5)])
def test_budgets_that_make_no_sense(kind: str, value: float) -> None:
    with pytest.raises(AsrError, match='budget'):
        Budget(kind, value)


def test_names_of_members() -> None:
    assert Budget('units', 0.5).name == 'FAR-50'
    assert Budget('parameters', 5000).name == 'FAR-parameters-5000'
    assert Budget('threshold', 0.3).name == 'FAR-threshold-0.3'


@pytest.mark.parametrize('build', [vit, unet], ids=['transformers', 'diffusers'])
def test_a_pruned_model_is_saved_and_read(build: Any, tmp_path: Path) -> None:
    model = build()
    stock = save_far(model, tmp_path / 'stock')
    assert type(model).from_pretrained(stock) is not None  # as its library reads it
    replace(model, FAR)
    cut(randomise(model).eval(), Budget('units', 0.5))
    save_far(model, tmp_path / 'far', {'name': 'FAR-50'})
    again = load_far(tmp_path / 'far')
    assert type(again) is type(model)
    assert again.replace_spec['widths'] == model.replace_spec['widths']
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    save_far(model, tmp_path / 'far')  # replaces
    assert not list(tmp_path.glob('.*'))
    content = json.loads((tmp_path / 'far' / 'far.json').read_text())
    assert content['replace']['type'] == 'FAR'


def test_other_folders_and_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    with pytest.raises(AsrError, match=r'exists and has no far\.json'):
        save_far(vit(), tmp_path / 'mine')
    with pytest.raises(AsrError, match='neither of transformers nor of diffusers'):
        save_far(nn.Linear(2, 2), tmp_path / 'linear')
    with pytest.raises(CheckpointError, match=r'has no far\.json'):
        load_far(tmp_path / 'mine')
    folder = save_far(vit(), tmp_path / 'vit')
    content = json.loads((folder / 'far.json').read_text())
    for change, message in (({'class': 'Trainer'}, "has no model 'Trainer'"), ({'library': 'os'}, 'is not known')):
        (folder / 'far.json').write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_far(folder)
