"""Figures: both formats, readable without colour, the same file each time."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

pytest.importorskip('matplotlib')

from helpers.analysis import C, images, numbered
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from asr_downstream.errors import AsrError
from asr_downstream.folding.analysis.correlation import find_correlations
from asr_downstream.folding.analysis.cost import measure_costs
from asr_downstream.folding.analysis.figures.base import COLOURS, MAP, figure, label_ends, spread, styles
from asr_downstream.folding.analysis.figures.correlation import draw_correlations
from asr_downstream.folding.analysis.figures.cost import draw_costs
from asr_downstream.folding.analysis.figures.noise import draw_noise
from asr_downstream.folding.analysis.figures.stripes import draw_gates, draw_groups, draw_ratios
from asr_downstream.folding.analysis.figures.training import draw_training
from asr_downstream.folding.analysis.noise import Curve, NoiseCurves
from asr_downstream.folding.analysis.stripes import find_stripes
from asr_downstream.folding.analysis.suite import Job

RAMP = torch.linspace(0.2, 0.9, C, dtype=torch.float64)
DATA = [images(torch.arange(6))]
# Shares of light of the colours as people see them (ITU-R BT.709).
LIGHT = np.array([0.2126, 0.7152, 0.0722])


def model():
    return numbered(*(lambda n, k=k: RAMP.roll(k) + 0.05 * (n % 2)[:, None] for k in range(3)))


def check(path: Path) -> bytes:
    """Both files are there and are pictures."""
    svg = path.with_name(f'{path.name}.svg')
    assert ElementTree.parse(svg).getroot().tag.endswith('svg')
    with Image.open(path.with_name(f'{path.name}.png')) as picture:
        assert min(picture.size) > 100
        assert np.asarray(picture.convert('L')).std() > 5
    return svg.read_bytes()


@pytest.mark.slow
def test_all_figures(tmp_path: Path) -> None:
    found = find_stripes('a $ name', model(), DATA, by=lambda batch: batch[:, 0, 0, 0] // 3, grouped='third')
    draw_gates(tmp_path / 'gates', found)
    first = check(tmp_path / 'gates')
    draw_gates(tmp_path / 'gates', found)
    assert check(tmp_path / 'gates') == first
    draw_groups(tmp_path / 'groups', found)
    draw_ratios(tmp_path / 'ratios', [found, find_stripes('other', model(), DATA)])
    draw_correlations(tmp_path / 'correlation', [find_correlations('one', model(), DATA)])
    draw_costs(tmp_path / 'cost', [measure_costs('one', model(), DATA[0], rounds=1)])
    curves = [
        Curve(arm, kind, (0.0, 0.1), (0.5, 0.3)) for arm in 'ab' for kind in ('gaussian', 'fgsm', 'constant', 'x')
    ]
    draw_noise(tmp_path / 'noise', NoiseCurves('accuracy', tuple(curves)))
    rows = [
        {'step': step, 'sites': {'one': {'channel_means': [0.1, 0.2], 'stripe_ratio': r}}}
        for step, r in ((1, None), (5, 0.2))
    ]
    draw_training(tmp_path / 'training', 'run', rows)
    for name in ('groups', 'ratios', 'correlation', 'cost', 'noise', 'training'):
        check(tmp_path / name)
    assert not list(tmp_path.glob('.*'))


def test_dark_is_low_and_light_is_high_for_every_eye() -> None:
    light = colormaps[MAP](np.linspace(0, 1, 64))[:, :3] @ LIGHT
    assert (np.diff(light) > 0).all()


def test_lines_differ_without_colour() -> None:
    looks = list(styles([str(n) for n in range(6)]).values())
    assert len({look['marker'] for look in looks}) == 6
    assert len({str(look['linestyle']) for look in looks}) == 6
    assert len({to_rgb(colour) for colour in COLOURS}) == len(COLOURS)
    assert len(styles([str(n) for n in range(20)])) == 20


def test_labels_do_not_lie_over_each_other(tmp_path: Path) -> None:
    with figure(tmp_path / 'x', 1, 1, (4, 3)) as axes:
        axis = axes[0, 0]
        axis.plot([0, 1], [0, 1])
        label_ends(axis, dict.fromkeys('abc', (1, 0.5)), styles('abc'), gap=0.1)
        heights = sorted(text.get_position()[1] for text in axis.texts)
        assert len(axis.lines) == 4  # a marker beside each name
    assert np.diff(heights).min() >= 0.1 - 1e-9


def test_a_figure_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), figure(tmp_path / 'x', 1, 1, (4, 3)):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_spread_has_the_first_and_the_last() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


def test_runs_whose_figures_would_have_one_name_are_refused(tmp_path: Path) -> None:
    """The second would write over those of the first."""
    runs = {'ASR(SE)': tmp_path, 'ASR-SE': tmp_path}
    with pytest.raises(AsrError, match=r'ASR\(SE\) and ASR-SE: their figures would have one name'):
        next(Job(runs, tmp_path / 'out').opened())
