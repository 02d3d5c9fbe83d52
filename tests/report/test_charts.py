"""Charts, ticks and numbers of a report: where they stand, and that they can be read."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from helpers.reports import Page, check_is_one_file

from asr_downstream.commands.reports import charts, data
from asr_downstream.commands.reports.page import Arm, Arms, Chart, Curve, Section, Table, unique
from asr_downstream.commands.reports.render import html_of
from asr_downstream.console import ticks


@pytest.mark.parametrize('low', [0.003, 0.02, 0.34, 1.0, 3.1])
@pytest.mark.parametrize('factor', [1.3, 2.0, 4.0, 9.0, 60.0, 3000.0])
def test_ticks_of_losses_can_be_read(low: float, factor: float) -> None:
    axis = charts.axis([low, low * factor], 252, 12, log=True)
    texts = [text for _, text in axis.marks]
    assert 3 <= len(texts) <= 8
    assert len(set(texts)) == len(texts)
    assert all(re.fullmatch(r'[\d.]{1,6}k?', text) for text in texts), texts
    assert all(12 <= place <= 252 for place, _ in axis.positions)
    assert all(a > b for (a, _), (b, _) in pairwise(axis.positions)), 'up is more'


def test_ticks() -> None:
    assert ticks.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks.ticks(-0.024, 0.013) == [-0.02, -0.01, 0, 0.01]
    assert ticks.ticks(0, 1233) == [0, 250, 500, 750, 1000]
    assert ticks.log_ticks(0.34, 1.8) == [0.5, 0.7, 1, 1.5]
    assert ticks.log_ticks(0.01, 100) == [0.01, 0.1, 1, 10, 100]
    assert ticks.log_ticks(2.0, 2.3) == [2.0, 2.1, 2.2, 2.3]
    assert ticks.labels([0.0, 0.25, 0.5]) == ['0.00', '0.25', '0.50']
    assert ticks.labels([0, 20000, 40000]) == ['0', '20k', '40k']
    assert ticks.labels([-0.02, 0.0]) == ['-0.02', '0.00']
    assert ticks.labels([1e-6, 2e-6]) == ['1e-06', '2e-06']


@pytest.mark.parametrize('values', [[0.5], [0.5, 0.5], [0.0, 0.0], [-1.0, 2.0], [0.0, 1e-9], [1e12, 2e12]])
@pytest.mark.parametrize('log', [False, True])
def test_curves_stay_within_their_chart(values: list[float], log: bool) -> None:
    chart = Chart('t', 'x', 'y', [Curve('a', list(enumerate(values))), Curve('empty', [])], log)
    drawing = charts.drawn(chart)
    assert drawing is not None
    [line] = drawing['lines']
    for point in line['path'].split():
        x, y = map(float, point.split(','))
        assert drawing['left'] <= x <= drawing['right']
        assert drawing['top'] <= y <= drawing['bottom']
    check_is_one_file(html_of([Section('s', charts=[chart])], 'Title', 'about'))


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors() -> None:
    values = [1.0, 10.0, 100.0]
    for log in (True, False):
        drawing = charts.drawn(Chart('t', 'x', 'y', [Curve('a', list(enumerate(values)))], log))
        assert drawing is not None
        a, b, c = (float(point.split(',')[1]) for point in drawing['lines'][0]['path'].split())
        assert drawing['log'] == log == (abs((a - b) - (b - c)) < 0.2)
    linear = charts.axis([0.0, 1.0], 0, 100)
    assert linear.at(0) > 2, 'a line does not run along the edge'
    assert linear.at(1) < 98


def test_nothing_to_draw_draws_nothing() -> None:
    empty = Arms('t', 'x', [Arm('a', [], None, None, False, 'no verdict')])
    assert charts.drawn(Chart('t', 'x', 'y', [Curve('a', [])])) is None
    assert charts.drawn_arms(empty) is None
    page = check_is_one_file(html_of([Section('s', arms=[empty], charts=[Chart('t', 'x', 'y', [])])], 'Title', 'about'))
    assert not page.all('svg')


def test_differences_are_where_they_should_be() -> None:
    arm = Arm('ASR(SE)', [('seed 0', -0.01), ('seed 1', -0.017)], -0.0135, (-0.022, -0.005), True, 'sentence')
    drawing = charts.drawn_arms(Arms('t', 'x', [arm, Arm('one', [('seed 1', 0.004)], 0.004, None, False, 'other')]))
    assert drawing is not None
    first, second = drawing['rows']
    low, high = first['ends']
    assert low < first['points'][1][0] < first['middle'] < first['points'][0][0] < high < drawing['zero']
    assert second['points'][0][0] > drawing['zero']
    assert second['points'][0][1] == first['points'][1][1] != first['points'][0][1], 'a seed has one marker'
    text = html_of([Section('s', arms=[Arms('t', 'x', [arm])])], 'Title', 'about')
    assert 'class="arm sure"' in text


def test_ten_seeds_have_ten_markers() -> None:
    points = [(f'seed {n}', 0.1 * n) for n in range(10)]
    drawing = charts.drawn_arms(Arms('', '', [Arm('a', points, 0.0, None, False, '')]))
    assert drawing is not None
    assert (
        len({kind for _, kind, _ in drawing['rows'][0]['points']}) == len({kind for _, kind in drawing['names']}) == 10
    )


def test_numbers_are_text() -> None:
    assert data.aligned([0.6584, 0.57981, None, 'x']) == ['0.6584', '0.5798', '', '']
    assert data.aligned([142026, None]) == ['142,026', '']
    assert data.aligned([0.0087, 0.0114]) == ['0.00870', '0.01140']
    assert data.aligned([12.25, 3.5]) == ['12.25', '3.50']
    assert data.aligned([]) == []
    assert data.spread_text(0.467, 0.0099999) == '0.467 ± 0.010'
    assert data.spread_text(0.467, None) == '0.467'
    assert data.spread_text(float('nan'), 1) == ''
    assert data.text_of({'a': 1000, 'b': [True, None, 'x'], 'c': 1e-5}) == 'a 1,000, b yes, none, x, c 1e-05'
    assert unique(['a', 'b', 'a']) == ['a (1)', 'b', 'a (2)']
    assert data.mean_of([(n, float(n)) for n in range(10)], 5) == [(1, 0.5), (3, 2.5), (5, 4.5), (7, 6.5), (9, 8.5)]


def test_empty_columns_are_left_out() -> None:
    table = Table('t', ['', 'a', 'b'], [['x', '', '1'], ['', '', '2']])
    page = Page(html_of([Section('s', tables=[table])], 'Title', 'about'))
    assert [each.get('scope') for each in page.all('th')] == ['col', 'col', 'row', 'row']
