"""Costs by site, against what is known of the attentions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.natives import C, SqueezeExcitation, batches, host
from helpers.plugged import ASR, CLASSIC, assert_untouched, snapshot, tiny

from asr_downstream import AsrError, describe, fold, plug
from asr_downstream.folding.analysis.cost import measure_costs, without_attention
from asr_downstream.measure import cost

X = torch.randn(2, 3, 16, 16)
DIA = dict(type='DIA', attention=dict(type='SE', reduction=4))


def plugged(spec: Any) -> Any:
    model = tiny()
    plug(model, spec)
    return randomise(model).eval()


def test_without_attention_is_the_stock_model() -> None:
    for spec in (ASR, CLASSIC, DIA, dict(type='ASR', attention=dict(type='DIALSTM', reduction=4))):
        bare, stock = without_attention(plugged(spec)), tiny().eval()
        assert [type(m) for m in bare.modules()] == [type(m) for m in stock.modules()]
        stock.load_state_dict(bare.state_dict(), strict=True)
        torch.testing.assert_close(bare(X), stock(X))


def test_an_se_costs_what_its_matrices_say() -> None:
    model = plugged(CLASSIC)
    before = snapshot(model)
    found = measure_costs('se', model, X, rounds=2)
    assert_untouched(model, before)
    for site, width in zip(found.sites, (32, 32, 64, 64, 128, 128), strict=True):
        hidden = width // 4
        assert site.parameters == 2 * width * hidden + width + hidden
        assert site.macs == 2 * width * hidden * len(X)
        assert site.launches > 0
        assert site.training_launches > 0
        assert site.saved_bytes > 0
    assert sum(site.parameters for site in found.sites) == found.model.parameters - found.stock.parameters
    assert sum(site.macs for site in found.sites) == found.model.macs - found.stock.macs
    assert sum(site.launches for site in found.sites) == found.model.launches - found.stock.launches
    assert sum(site.saved_bytes for site in found.sites) == found.model.saved_bytes - found.stock.saved_bytes
    assert (found.elsewhere.macs, found.elsewhere.launches, found.elsewhere.saved_bytes) == (0, 0, 0)
    assert found.model.step_launches > found.stock.step_launches
    assert found.stock.macs == pytest.approx(cost.gmacs(lambda: tiny().eval()(X)) * 1e9)
    json.dumps(found.as_dict(), allow_nan=False)
    assert 'whole model' in str(found)


def test_constant_gates_cost_no_multiply_adds_of_maps() -> None:
    found = measure_costs('asr', plugged(ASR), X, rounds=1)
    folded, _ = fold(plugged(ASR))
    assert found.stock.parameters == cost.parameters(folded)
    assert [site.macs for site in found.sites] == [0] * 6  # of vectors, before the first layer
    assert found.elsewhere.macs == found.model.macs - found.stock.macs
    assert found.model.macs > found.stock.macs
    assert found.model.launches > found.stock.launches


def test_a_shared_unit_counts_once() -> None:
    model = plugged(DIA)
    found = measure_costs('dia', model, X, rounds=1)
    shared = {unit.name: unit.parameters for unit in describe(model).shared}
    assert [site.parameters for site in found.sites] == [shared['layer1'], 0, shared['layer2'], 0, shared['layer3'], 0]


def test_attention_of_a_library() -> None:
    (x,) = batches(1)
    found = measure_costs('native', host(SqueezeExcitation()).eval(), x.float(), rounds=1)
    (site,) = found.sites
    assert site.parameters == 2 * 4 * C + 4 + C
    assert site.macs == 2 * 4 * C * len(x)


def test_a_model_without_attention() -> None:
    with pytest.raises(AsrError, match='has no gates'):
        measure_costs('stock', tiny().eval(), X)
