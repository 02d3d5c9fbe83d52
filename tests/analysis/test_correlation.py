"""Correlations of gates whose correlation is known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import randomise
from helpers.analysis import C, images, numbered
from helpers.plugged import ASR, CLASSIC, tiny
from torch import Tensor

from asr_downstream import AsrError, plug
from asr_downstream.folding.analysis.correlation import find_correlations, pearson

RAMP = torch.linspace(0.2, 0.9, C, dtype=torch.float64)
DATA = [images(torch.arange(4)), images(torch.arange(4, 7))]


def fixed(gates: Tensor):
    return lambda numbers: gates.expand(len(numbers), -1)


def test_is_numpys() -> None:
    gates = torch.rand(5, 4, 32, dtype=torch.float64)
    for found, rows in zip(pearson(gates), gates, strict=True):
        torch.testing.assert_close(found, torch.corrcoef(rows), rtol=1e-12, atol=1e-12)


def test_shared_constant_gates_correlate_by_one() -> None:
    (stage,) = find_correlations('same', numbered(fixed(RAMP), fixed(RAMP), fixed(0.5 * RAMP)), DATA).stages
    torch.testing.assert_close(stage.matrix, torch.ones(3, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    (stage,) = find_correlations('opposite', numbered(fixed(RAMP), fixed(1 - RAMP)), DATA).stages
    assert stage.mean == pytest.approx(-1)
    assert stage.magnitude == pytest.approx(1)


def test_independent_gates_do_not_correlate() -> None:
    """The mean is near 0, and the mean magnitude is what chance gives."""
    gates = torch.rand(2000, 2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pearson(gates)[:, 0, 1]
    assert abs(float(found.mean())) < 3 / math.sqrt(63 * 2000)
    assert float(found.abs().mean()) == pytest.approx(math.sqrt(2 / (math.pi * 64)), rel=0.05)
    table = torch.rand(2, 7, C, dtype=torch.float64)
    model = numbered(*(lambda n, t=t: t[n.round().long()] for t in table))
    (stage,) = find_correlations('independent', model, DATA).stages
    expected = [float(torch.corrcoef(table[:, n])[0, 1]) for n in range(7)]
    assert stage.mean == pytest.approx(sum(expected) / 7)
    assert stage.magnitude == pytest.approx(sum(map(abs, expected)) / 7)
    assert stage.images == 7
    assert stage.chance == pytest.approx(math.sqrt(2 / (math.pi * C)))


def test_images_of_batches_of_one_are_counted() -> None:
    model = numbered(lambda n: torch.rand(len(n), C), lambda n: torch.rand(len(n), C))
    (stage,) = find_correlations('one by one', model, [images(torch.arange(n, n + 1)) for n in range(5)]).stages
    assert stage.images == 5


def test_gates_that_do_not_differ_between_channels() -> None:
    """Two that are the same: 1. Others: no correlation, and no NaN in JSON."""
    half, third = torch.full((C,), 0.5), torch.full((C,), 1 / 3)
    run = find_correlations('flat', numbered(fixed(half), fixed(half), fixed(third), fixed(RAMP)), DATA)
    matrix = run.stages[0].matrix
    assert matrix[0, 1] == 1
    assert matrix[2, 2] == 1
    assert matrix[0, 2].isnan()
    assert matrix[0, 3].isnan()
    assert run.stages[0].pairs.tolist() == [1]
    content = json.loads(json.dumps(run.as_dict(), allow_nan=False))
    assert content['stages'][0]['matrix'][0][:3] == [1, 1, None]
    assert 'none' in str(find_correlations('none', numbered(fixed(half), fixed(RAMP)), DATA))


def test_an_image_without_a_correlation_is_left_out_of_the_mean() -> None:
    sometimes = lambda n: torch.where((n.round() == 0)[:, None], 0.5, RAMP)  # noqa: E731
    (stage,) = find_correlations('some', numbered(sometimes, fixed(RAMP)), DATA).stages
    assert stage.mean == pytest.approx(1)


def test_stages_are_those_of_the_model_and_say_what_is_shared() -> None:
    data = [torch.randn(3, 3, 16, 16, dtype=torch.float64)]
    for spec, shared in (
        (CLASSIC, False),
        (dict(type='DIA', attention=dict(type='SE', reduction=4)), True),
        (ASR, False),
    ):
        model = tiny()
        plug(model, spec)
        run = find_correlations('net', randomise(model).double().eval(), data)
        assert [s.stage for s in run.stages] == ['layer1', 'layer2', 'layer3']
        assert [bool(s.unit) for s in run.stages] == [shared] * 3
        assert [s.channels for s in run.stages] == [32, 64, 128]
        assert run.stages[0].images == (1 if spec is ASR else 3)
    with pytest.raises(AsrError, match='no stage has two sites'):
        find_correlations('one', numbered(fixed(RAMP)), DATA)
