"""Gates over data, on models whose gates are known."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.analysis import C, images, numbered
from helpers.natives import SqueezeExcitation, batches, host
from helpers.plugged import ASR, CLASSIC, assert_untouched, snapshot, tiny
from torch import Tensor, nn

from asr_downstream import AsrError, FoldError, plug, record
from asr_downstream.folding.analysis.gates import CONSTANT, INPUT, NATIVE, Thinned, collect, per_image, places_of
from asr_downstream.folding.analysis.stripes import Metric, find_stripes, with_mean_gates
from asr_downstream.folding.constancy import Moments

MEANS = torch.linspace(0.2, 0.9, C, dtype=torch.float64)
DATA = [torch.randn(3, 3, 16, 16, dtype=torch.float64) for _ in range(3)]


def alternating(size: float) -> Any:
    """Gates ``MEANS + size`` of even images and ``MEANS - size`` of odd ones."""
    return lambda numbers: MEANS + size * (1 - 2 * (numbers.round() % 2))[:, None]


def plugged(spec: Any) -> Any:
    model = tiny()
    plug(model, spec)
    return randomise(model).double().eval()


def numbers(start: int, count: int = 4) -> Tensor:
    return images(torch.arange(start, start + count))


def test_deviation_and_ratio_are_those_that_the_gates_have() -> None:
    model = numbered(alternating(0.05), alternating(0.0))
    moving, still = collect(model, [numbers(0), numbers(4), numbers(8, 2)])
    torch.testing.assert_close(moving.mean, MEANS, rtol=1e-12, atol=0)
    torch.testing.assert_close(moving.std, torch.full_like(MEANS, 0.05), rtol=1e-12, atol=0)
    assert moving.constancy.ratio == pytest.approx(0.05 / float(MEANS.std(unbiased=False)), rel=1e-12)
    assert (moving.samples, moving.place.kind, moving.place.stage) == (10, INPUT, 'blocks')
    assert torch.equal(still.std, torch.zeros(C, dtype=torch.float64))  # exactly, not to rounding
    assert still.constancy.ratio == 0
    torch.testing.assert_close(moving.rows, alternating(0.05)(torch.arange(10)).double())


def test_what_is_measured_does_not_depend_on_the_batches() -> None:
    model = plugged(CLASSIC)
    whole = collect(model, [torch.cat(DATA)])
    for one, other in zip(whole, collect(model, DATA), strict=True):
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.std, other.std, rtol=1e-9, atol=1e-15)
    with record(model) as seen:
        model(torch.cat(DATA))
    for site in whole:
        torch.testing.assert_close(site.std, seen.gates[site.place.path][0].std(0, unbiased=False))


def test_moments_of_large_gates_that_hardly_move() -> None:
    """Sums of squares would lose them: 1e8 + {0, 1} has a deviation of a half."""
    moments = Moments()
    for values in ([1e8, 1e8 + 1], [1e8 + 1], [1e8]):
        moments.add(torch.tensor(values, dtype=torch.float64)[:, None])
    moments.add(torch.zeros(0, 1))
    assert float(moments.std) == 0.5
    assert float(moments.mean) == 1e8 + 0.5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_constant_gates_have_no_deviation(dtype: torch.dtype) -> None:
    for spec in (ASR, CLASSIC):
        model = plugged(spec).to(dtype)
        if spec is CLASSIC:
            for layer in model.modules():
                if hasattr(layer, 'dynamic'):
                    layer.dynamic[0].attention.start_constant()
        found = find_stripes('model', model, [x.to(dtype) for x in DATA])
        assert [site.constancy.ratio for site in found.sites] == [0.0] * len(found.sites)
        assert {site.place.kind for site in found.sites} == {CONSTANT if spec is ASR else INPUT}
        if spec is ASR:
            assert found.test is None
        else:
            assert found.test.change < (1e-6 if dtype == torch.float32 else 1e-14)


def test_the_functional_test_measures_what_the_means_cost() -> None:
    model = numbered(alternating(0.05))
    data = [numbers(1), numbers(5)]
    metric = Metric('sum', lambda m: float(sum(m(x).sum() for x in data)))
    before = snapshot(model)
    found = find_stripes('known', model, data, metric=metric)
    assert_untouched(model, before)
    x = torch.cat(data)[:, 0, 0, 0]
    assert found.test.before == pytest.approx(float((alternating(0.05)(x) * x[:, None]).sum() * 4))
    assert found.test.after == pytest.approx(float(MEANS.sum() * x.sum() * 4))
    assert found.test.before != pytest.approx(found.test.after)
    gates = alternating(0.05)(x)
    change = ((gates - MEANS) * x[:, None]).norm() / (gates * x[:, None]).norm()
    assert found.test.change == pytest.approx(float(change))
    assert 'sum' in str(found)
    still = find_stripes('known', numbered(alternating(0.0)), data, metric=metric)
    assert still.test.change < 1e-15
    assert still.test.before == pytest.approx(still.test.after, rel=1e-14)


def test_variance_between_groups_and_within() -> None:
    by_tens = lambda n: MEANS + 0.1 * (n.round() // 10 % 2)[:, None]  # noqa: E731
    model = numbered(by_tens, alternating(0.05), lambda n: by_tens(n) + alternating(0.05)(n), alternating(0.0))
    data = [torch.cat([numbers(0), numbers(10)]), torch.cat([numbers(4), numbers(14)])]
    groups, inside, both, none = collect(model, data, by=lambda batch: batch[:, 0, 0, 0] // 10)
    assert groups.explained == pytest.approx(1)
    assert inside.explained == pytest.approx(0, abs=1e-12)
    assert both.explained == pytest.approx(0.5)  # 0.05 of each kind
    assert none.explained == 0
    assert [g.value for g in groups.groups] == [0, 1]
    torch.testing.assert_close(groups.groups[1].mean, MEANS + 0.1)
    torch.testing.assert_close(inside.groups[1].std, torch.full_like(MEANS, 0.05))
    assert groups.shown == 0
    torch.testing.assert_close(groups.rows, MEANS.expand(8, -1))  # of the group that is shown, alone
    assert collect(model, data)[0].explained is None


def test_attention_of_a_library_is_seen() -> None:
    model: Any = randomise(host(SqueezeExcitation())).double().eval()
    data = batches()
    hooks = copy.copy(model.block.se._forward_hooks)
    found = find_stripes('native', model, data)
    assert model.block.se._forward_hooks == hooks
    (site,) = found.sites
    assert (site.place.path, site.place.kind, site.place.stage) == ('block.se', NATIVE, '')
    gates = []
    handle = model.block.se.scale_activation.register_forward_hook(lambda m, a, out: gates.append(out.flatten(1)))
    for x in data:
        model(x)
    handle.remove()
    torch.testing.assert_close(site.std, torch.cat(gates).std(0, unbiased=False))
    assert found.test.change > 1e-3


def test_a_block_that_is_not_what_it_is_known_for() -> None:
    class Odd(SqueezeExcitation):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = host(Odd()).double().eval()
    with pytest.raises(AsrError, match=r'block\.se: does not return its input times .* register_native'):
        collect(model, batches())


def test_spatial_gates_and_shared_units() -> None:
    model = plugged(dict(type='Attention', attention=dict(type='CBAM', reduction=4)))
    site = collect(model, DATA)[0]
    assert site.samples == 9 * 16 * 16  # images and positions
    assert site.rows.shape == (9, 32)
    shared = places_of(plugged(dict(type='DIA', attention=dict(type='SE', reduction=4))))
    assert {(place.stage, place.unit) for place in shared.values()} == {(f'layer{n}', f'layer{n}') for n in (1, 2, 3)}


def test_mean_gates_take_the_place_of_all_gates() -> None:
    model = plugged(dict(type='DIA', attention=dict(type='DIALSTM', reduction=4)))
    replaced = with_mean_gates(model, collect(model, DATA))
    with record(replaced) as seen:
        replaced(DATA[0])
    assert {tuple(g[0].shape) for g in seen.gates.values()} == {(1, 32), (1, 64), (1, 128)}


def test_rows_are_thinned_evenly_and_in_order() -> None:
    thinned = Thinned(8)
    for start in range(0, 1000, 7):
        thinned.add(torch.arange(start, min(1000, start + 7))[:, None])
    rows = thinned.rows()[:, 0]
    assert 8 <= len(rows) <= 16
    assert len(set(rows.diff().tolist())) == 1
    assert rows[0] == 0


def test_a_head_that_runs_on_several_levels() -> None:
    two = [torch.full((2, C), 0.2), torch.full((2, C), 0.4), torch.full((5, C), 9.0)]
    torch.testing.assert_close(per_image(two), torch.full((2, C), 0.3, dtype=torch.float64))


def test_what_cannot_be_measured_says_why() -> None:
    with pytest.raises(AsrError, match='has no gates to look at'):
        collect(tiny().eval(), DATA)
    model = plugged(CLASSIC)
    with pytest.raises(AsrError, match='no data'):
        collect(model, [])
    with pytest.raises(AsrError, match='cannot be called'):
        collect(model, [dict(wrong=1)])
    with torch.no_grad():
        model.layer1[0].bn3.dynamic[0].attention.fc1.weight.fill_(math.nan)
    with pytest.raises(AsrError, match=r'layer1\.0\.bn3: its gates are not finite'):
        collect(model, DATA)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = plugged(CLASSIC), plugged(CLASSIC)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises((AsrError, FoldError), match=r'idle\.layer1\.0\.bn3: was not reached'):
        collect(Two().eval(), DATA)


def test_the_report_is_plain_data() -> None:
    found = find_stripes('known', numbered(alternating(0.05), lambda n: torch.full((len(n), C), 0.5)), [numbers(0)])
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert content['sites'][0]['channel_deviations'] == [0.05] * C
    assert content['sites'][0]['relative_deviation'] == pytest.approx(float((0.05 / MEANS).mean()))
    assert content['sites'][1]['stripe_ratio'] == 0
    assert content['functional_test']['replaced'] == 2
