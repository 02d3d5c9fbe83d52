"""The picture of the README: its figures are counted again, and it shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
from conftest import ROOT

pytest.importorskip('diffusers')
pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from handbook import figures, overview

KEPT = json.loads((ROOT / 'docs/assets/overview.json').read_text())


@pytest.mark.parametrize(('number', 'count'), [(0, figures.detector), (1, figures.unet)], ids=['detector', 'unet'])
def test_the_figures_are_those_of_the_models(number: int, count: Callable[[], figures.Figures]) -> None:
    found = json.loads(json.dumps(asdict(count())))
    kept = json.loads(json.dumps(KEPT[number]))
    differences = {name: form.pop('difference') for name, form in found['forms'].items()}
    for form in kept['forms'].values():
        del form['difference']
    assert found == kept
    assert found['forms']['folded'] == found['forms']['stock']  # class, parameters, keys, multiply-adds, operators
    assert not found['forms']['plugged']['loads']
    assert found['forms']['plugged']['operators'] > found['forms']['stock']['operators']
    assert differences['plugged'] == 0
    assert differences['folded'] < 1e-5  # rounding in float32, other on other processors
    assert differences['stock'] > 0.1  # the gates do something


def test_the_pictures_show_the_figures() -> None:
    for name, side_by_side in (('overview.svg', True), ('overview-narrow.svg', False)):
        picture = (ROOT / 'docs/assets' / name).read_text()
        assert picture == overview.picture(KEPT, side_by_side), 'run: cd tools && python -m handbook.overview'
        for model in KEPT:
            for values in overview.rows(model['forms']).values():
                for value in values:
                    assert f'>{value}</text>' in picture


def test_numbers_read_well() -> None:
    assert [overview.number(value) for value in (0.0, 0.304, 1.24e-6)] == ['0', '0.30', '1.2 × 10⁻⁶']
