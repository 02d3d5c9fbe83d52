"""Verdicts, by simulation: how often they are false, and how often they speak."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from asr_downstream.commands.ablation import statistics
from asr_downstream.commands.ablation.statistics import (
    LEVEL,
    Comparison,
    Metric,
    compare,
    holm,
    overall,
    paired_t,
    t_quantile,
    two_sided,
)

AP = Metric('AP', step=1e-3)
FID = Metric('FID', higher=False)
DRAWS = 1000


def simulate(
    seeds: int, arms: int, effect: float = 0.0, step: float = 0.0, scale: float = 1.0, draws: int = DRAWS
) -> np.ndarray:
    """Draw differences ``(draws, arms, seeds)`` of arms to one reference, whose noise they share.

    The first arm has a true effect, in standard deviations of the paired difference.
    """
    values = np.random.default_rng(arms).normal(size=(draws, arms + 1, seeds)) * scale
    values[:, 1] += effect * math.sqrt(2) * scale
    if step:
        values = (values / step).round() * step
    return values[:, 1:] - values[:, :1]


def significant(differences: np.ndarray, step: float = 0.0) -> np.ndarray:
    return holm(paired_t(differences, step)[1]) < LEVEL


@pytest.mark.parametrize('seeds', [3, 5])
@pytest.mark.parametrize('arms', [1, 5, 8])
def test_false_verdicts_are_at_most_six_in_a_hundred(seeds: int, arms: int) -> None:
    wrong = significant(simulate(seeds, arms, draws=20 * DRAWS)).any(-1)
    assert wrong[:DRAWS].mean() <= 0.06
    assert 0.03 < wrong.mean() <= 0.053, 'the chance is five in a hundred, or less; 20,000 draws say it within 0.003'
    if arms > 1:  # without the correction they are more
        assert (paired_t(simulate(seeds, arms))[1] < LEVEL).any(-1).mean() > 0.1


@pytest.mark.parametrize('arms', [1, 5, 8])
def test_a_true_effect_of_three_deviations_is_seen_with_five_seeds(arms: int) -> None:
    found = significant(simulate(5, arms, effect=3))
    assert found[:, 0].mean() >= 0.8
    assert found[:, 1:].any(-1).mean() <= 0.06  # and says nothing of the others


@pytest.mark.parametrize('seeds', [3, 5])
@pytest.mark.parametrize('scale', [3e-4, 1e-3, 1e-2])
def test_rounded_values_make_no_verdicts(seeds: int, scale: float) -> None:
    """AP has three digits."""
    differences = simulate(seeds, 1, step=1e-3, scale=scale, draws=20 * DRAWS)
    assert significant(differences, step=1e-3).mean() <= 0.053


@pytest.mark.parametrize('seeds', [3, 5])
def test_what_users_call_is_what_was_simulated(seeds: int) -> None:
    differences = simulate(seeds, 4, effect=3)[:60]
    p = paired_t(differences)[1]
    for each, alone, corrected in zip(differences, p, holm(p), strict=True):
        values = {'stock': dict.fromkeys(range(seeds), 0.0)}
        values |= {f'arm {n}': dict(enumerate(row.tolist())) for n, row in enumerate(each)}
        found = compare(values, 'stock', Metric('AP'))
        assert [c.p for c in found.values()] == pytest.approx(alone, rel=1e-9)
        assert [c.corrected for c in found.values()] == pytest.approx(corrected, rel=1e-9)
        for c in found.values():
            assert (c.outcome in ('better', 'worse')) == (c.corrected < LEVEL)
            assert (c.low > 0 or c.high < 0) == (c.p < LEVEL)  # the interval is the test


def test_t_is_that_of_the_tables() -> None:
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 29: 2.045}
    for freedom, value in tables.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=6e-4)
        assert two_sided(value, freedom) == pytest.approx(0.05, abs=1e-4)
        ordered = [float(two_sided(t, freedom)) for t in (0, 0.5, 2, 8, 1e3)]
        assert ordered[0] == 1
        assert all(a > b for a, b in pairwise(ordered))


def test_t_is_that_of_scipy() -> None:
    scipy = pytest.importorskip('scipy.stats')
    t = np.linspace(0, 20, 41)
    for freedom in range(1, 31):
        assert np.abs(two_sided(t, freedom) - 2 * scipy.t.sf(t, freedom)).max() < 1e-12
        assert t_quantile(freedom, 0.01) == pytest.approx(scipy.t.ppf(0.995, freedom), rel=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0]
    assert holm([0.02]).tolist() == [0.02]
    assert holm([]).tolist() == []


def one(differences: list[float], metric: Metric = AP, base: float = 0.45) -> Comparison:
    values = {
        'stock': dict.fromkeys(range(len(differences)), base),
        'asr-se': {seed: base + d for seed, d in enumerate(differences)},
    }
    return compare(values, 'stock', metric, {'asr-se': 'ASR(SE)'})['asr-se']


def test_sentences() -> None:
    worse = one([-0.012, -0.017, -0.010, -0.013, -0.013])
    assert str(worse) == 'ASR(SE) - stock: -0.013 AP, 95% interval [-0.016, -0.010]: do not use it here'
    better = one([-0.3, -0.31, -0.28, -0.32, -0.29], FID)
    assert str(better) == (
        'ASR(SE) - stock: -0.300 FID (lower is better), 95% interval [-0.320, -0.280]: it helps here'
    )
    undecided = one([0.01, -0.01, 0.004])
    assert str(undecided).endswith(': undecided (p = 0.84)')
    percent = one([0.03, 0.035, 0.028], Metric('accuracy', form='.1f', scale=100))
    assert str(percent) == 'ASR(SE) - stock: +3.1 accuracy, 95% interval [+2.2, +4.0]: it helps here'
    assert AP.text(-0.0001, True) == '+0.000'
    assert AP.text(-0.0001) == '0.000'


def test_alone_it_would_count() -> None:
    values = {'stock': dict.fromkeys(range(3), 0.45), 'a': {0: 0.44, 1: 0.438, 2: 0.433}}
    noise = np.random.default_rng(0).normal(scale=0.02, size=(4, 3))
    values |= {f'n{i}': dict(enumerate((0.45 + row).tolist())) for i, row in enumerate(noise)}
    found = compare(values, 'stock', AP)['a']
    assert found.p < LEVEL < found.corrected
    assert found.outcome == 'undecided'
    assert str(found).endswith(f': undecided (p = {found.p:.2g}, but {found.corrected:.2g} as one of 5 arms)')


def test_fewer_than_three_seeds_have_no_verdict() -> None:
    assert str(one([0.2])) == 'ASR(SE) - stock: +0.200 AP over one seed: no verdict, 3 seeds are the least'
    assert str(one([0.2, 0.2001])) == 'ASR(SE) - stock: +0.200 AP over 2 seeds: no verdict, 3 seeds are the least'
    values = {'stock': {0: 0.4, 1: 0.5}, 'a': {2: 0.4, 3: 0.5}}
    assert str(compare(values, 'stock', AP)['a']) == 'a - stock: no verdict, no seed has both'
    assert {c.outcome for c in (one([0.2]), one([0.2, 0.2001]))} == {'none'}
    assert overall([one([0.2, 0.2001])]) == 'No verdict: 2 seeds in common, 3 are the least.'


def test_only_seeds_that_both_have_are_paired_and_missing_arms_are_not_corrected_for() -> None:
    values = {
        'stock': {0: 0.40, 1: 0.45, 2: 0.50, 7: 0.1},
        'a': {0: 0.41, 1: 0.462, 2: 0.511, 5: 0.9},
        'short': {0: 0.3},
    }
    found = compare(values, 'stock', AP)
    assert found['a'].seeds == (0, 1, 2)
    assert found['a'].differences == pytest.approx((0.01, 0.012, 0.011))
    assert (found['a'].arms, found['a'].outcome, found['a'].corrected) == (1, 'better', found['a'].p)
    assert found['short'].outcome == 'none'


def test_ties() -> None:
    equal = one([0.0, 0.0, 0.0])
    assert (equal.outcome, str(equal)) == ('equal', 'ASR(SE) - stock: no difference in AP in any of 3 seeds')
    rounding = one([1e-15, 0.0, -1e-15, 1e-15], Metric('FID', higher=False), base=7.0)
    assert rounding.outcome == 'equal'
    same = one([0.1 + 1e-16, 0.1, 0.1], Metric('accuracy'))
    assert same.outcome == 'none', 'nothing is known of the spread'
    assert str(same) == 'ASR(SE) - stock: +0.100 accuracy in each of 3 seeds: no verdict, their spread is not known'
    last_digit = one([0.001, 0.001, 0.001])
    assert last_digit.outcome == 'undecided', 'one in the last digit of AP'
    assert one([0.01, 0.01, 0.01]).outcome == 'better', 'ten in the last digit are more than rounding'


def test_the_answer_in_one_line() -> None:
    good, bad, unclear = one([0.02, 0.021, 0.019]), one([-0.02, -0.021, -0.019]), one([0.01, -0.01, 0.004])
    assert overall([bad, good, unclear]) == 'ASR(SE) is better than stock here.'
    assert overall([bad, unclear]) == 'Keep stock here: no arm is shown to be better.'
    assert overall([bad]) == 'Keep stock here: ASR(SE) is worse.'
    assert overall([bad, bad]) == 'Keep stock here: every other arm is worse.'
    alone = one([0.4])
    assert overall([bad, alone]) == 'Keep stock here: ASR(SE) is worse.', 'of an arm with one seed nothing is known'
    assert overall([bad, bad, alone]) == 'Keep stock here: ASR(SE) and ASR(SE) are worse.'
    assert overall([]) == 'No verdict: there is one arm only.'
    assert overall([one([0.1, 0.1, 0.1], Metric('x'))]) == 'No verdict: the spread over seeds is not known.'


def test_the_module_needs_no_framework() -> None:
    text = Path(statistics.__file__).read_text()
    assert 'torch' not in text
    assert 'scipy' not in text
