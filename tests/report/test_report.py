"""`report`: one file about runs that loads nothing, runs nothing, and escapes every name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from helpers.reports import (
    Page,
    analyses,
    check_is_one_file,
    classification_run,
    demo,
    detection_run,
    diffusion_run,
    far_run,
    picture,
    put,
)

from asr_downstream.commands.reports import data
from asr_downstream.commands.reports.find import sections_of
from asr_downstream.commands.reports.page import Verdict
from asr_downstream.commands.reports.pictures import embed
from asr_downstream.commands.reports.render import html_of, write
from asr_downstream.errors import AsrError, DataError

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&{{ 7*7 }}\'`'
BROWSER = next(filter(None, map(shutil.which, ('chromium-headless-shell', 'chromium', 'google-chrome'))), None)
STORED = ROOT / 'det_configs/results/bccd.jsonl'
RUNS = {
    'Classification': classification_run,
    'Detection': detection_run,
    'Diffusion': diffusion_run,
    'FAR: far': far_run,
}
MADE = {'det': detection_run, 'unet': diffusion_run, 'far': far_run, 'demo': demo, 'cls': classification_run}


@pytest.fixture(scope='module')
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ablation of the blood cells, from its stored runs."""
    out = tmp_path_factory.mktemp('ablation') / 'blood'
    assert command('ablate', '--runs', STORED, '--out', out).returncode == 0
    return out


@pytest.fixture(scope='module')
def everything(tmp_path_factory: pytest.TempPathFactory, ablation: Path) -> Path:
    """Runs of all kinds."""
    folder = tmp_path_factory.mktemp('everything')
    for name, make in MADE.items():
        make(folder / name)
    shutil.copytree(ablation, folder / 'blood')
    analyses(folder / 'gates')
    picture(folder / 'gates/se-gates.png')
    return folder


def page_of(*paths: Path, **kwargs: Any) -> Page:
    return Page(html_of(sections_of(paths), 'Title', 'about', **kwargs))


def test_all_kinds_in_one_page(everything: Path, tmp_path: Path) -> None:
    out = tmp_path / 'report.html'
    done = command('report', everything, '--out', out, '--title', 'All kinds')
    assert done.returncode == 0, done.stderr
    assert 'Keep stock here: no arm is shown to be better.' in done.stdout
    page = check_is_one_file(out.read_text())
    heads = [text for text in page.texts if text.strip()]
    for title in (
        'Ablation of detection: blood',
        'Analysis: stripes of the gates, correlation of the gates, noise, cost of attention',
        'FAR: far',
        'Classification',
        'Detection',
        'Diffusion',
    ):
        assert heads.count(title) == 3, title  # in the menu, in the summary, as a head
    said = page.text
    assert said.index('Verdict') < said.index('no arm is shown to be better') < said.index('Training loss')
    for words in (
        'ASR(SE) - stock: -0.013 AP, 95% interval [-0.022, -0.005]: undecided (p = 0.022, but 0.11 as one of 5 arms)',
        'det: the folded detector is the trained one: AP 0.457 unfolded, 0.457 folded; boxes move by at most 1.2e-05',
        'unet: the folded model draws the same images: grey levels differ by at most 0.01 of 255; FID 4.25 unfolded',
        'se: gates of 8 sites replaced by their mean: outputs change by 1.25%; AP 0.45 before, 0.44 after.',
        'Noise: gaussian',
        'cls: accuracy 0.64.',
        'FAR-50 is 2.0 points behind its teacher: accuracy 0.9500, 0.9700',
        'Holds: folded AP equals unfolded AP; same detections',
        'Does not hold: both learn',
        'Folded against unfolded: boxes differ by at most 2e-05 px, scores by 1e-06, on 120 pictures',
        'hash of the weights ' + 'cd' * 32,
        'seed 5',
    ):
        assert words in said, words
    assert sum('unet' in text for text in page.texts if 'training' in text.lower()) == 0
    assert len(page.all('img')) == 7
    assert len(out.read_bytes()) < 5_000_000


def test_the_trainings_of_the_demo_are_parts_of_its_sections(tmp_path: Path) -> None:
    sections = sections_of([demo(tmp_path / 'demo')])
    assert [section.title.partition(':')[0] for section in sections] == ['Detection', 'Diffusion', 'FAR']
    assert [[chart.title for chart in section.charts] for section in sections] == [
        ['Training loss'],
        ['Training loss'],
        ['Training loss by stage', 'Accuracy by stage'],
    ]
    assert [len(section.pictures) for section in sections] == [1, 1, 1]
    assert [curve.name for curve in sections[0].charts[0].curves] == ['retinanet']


@pytest.mark.parametrize('title', RUNS)
def test_a_run_alone(title: str, tmp_path: Path) -> None:
    make: Callable[[Path], Path] = RUNS[title]
    folder = make(tmp_path / 'far')
    [section] = sections_of([folder])
    assert section.title == title
    assert section.verdicts
    assert section.tables
    assert section.charts
    assert section.pictures or title == 'Classification'
    check_is_one_file(html_of([section], 'Title', 'about'))


def test_several_runs_of_a_kind_share_a_section(tmp_path: Path) -> None:
    a, b = (detection_run(tmp_path / name / 'run', seed) for seed, name in enumerate('ab'))
    [section] = sections_of([a, b, tmp_path / 'a'])
    assert [curve.name for curve in section.charts[0].curves] == ['run (1)', 'run (2)']
    assert ('run (2): seed', '1') in section.facts
    assert [curve.name for curve in section.charts[1].curves] == ['run (1)', 'run (2)'], 'AP by epoch'
    assert section.charts[1].curves[0].points == [(1, 0.1), (2, 0.2)]


def test_folding_that_changes_something_is_said(tmp_path: Path) -> None:
    folder = detection_run(tmp_path / 'run')
    tested = json.loads((folder / 'test.json').read_text())
    tested['folded'] = {**tested['folded'], 'AP': 0.3}
    put(folder / 'test.json', tested)
    [verdict] = sections_of([folder])[0].verdicts
    assert (verdict.tone, verdict.text) == ('bad', 'run: folding changes it: AP 0.457 unfolded, 0.3 folded.')
    put(folder / 'test.json', {**tested, 'calibration': {'sites': []}})
    [verdict] = sections_of([folder])[0].verdicts
    assert (verdict.tone, verdict.text) == ('plain', 'run: folded by calibration: AP 0.457 unfolded, 0.3 folded.')


def test_diffusion_numbers_that_were_measured_differently_have_tables_of_their_own(tmp_path: Path) -> None:
    folder = diffusion_run(tmp_path / 'run')
    rows = json.loads((folder / 'evaluation.json').read_text())
    rows[1]['provenance'] = {**rows[1]['provenance'], 'images': 500}
    put(folder / 'evaluation.json', rows)
    [section] = sections_of([folder])
    assert [table.note for table in section.tables] == ['images 1,000, sampler DDIM', 'images 500, sampler DDIM']
    assert section.verdicts == [Verdict('run: FID 4.25 at step 200.')], 'no folded number of the same measurement'


# Hostile folders ------------------------------------------------------------------------------------------------------


def test_names_and_texts_are_escaped(tmp_path: Path, ablation: Path) -> None:
    name = HOSTILE.replace('/', '∕')
    folder = detection_run(tmp_path / name)
    put(folder / 'mine.py', f'data_root = {HOSTILE!r}\nrandomness = dict(seed={HOSTILE!r})\n')
    tested = json.loads((folder / 'test.json').read_text())
    tested['unfolded'] |= {'classes': {HOSTILE: {'AP': 0.1}}, 'AP': HOSTILE}
    put(folder / 'test.json', {**tested, 'sha256': HOSTILE, 'versions': {HOSTILE: HOSTILE}})
    (folder / 'pictures/a.png').rename(folder / f'pictures/{name}.png')
    found = json.loads((ablation / 'ablation.json').read_text())
    found['verdict'] = found['arms'][0]['label'] = found['comparisons'][0]['sentence'] = HOSTILE
    found['metric']['name'] = HOSTILE
    put(tmp_path / 'blood/ablation.json', found)
    diffusion_run(tmp_path / 'u' / name)
    text = html_of(sections_of([tmp_path]), HOSTILE, HOSTILE)
    page = check_is_one_file(text)
    assert HOSTILE in ''.join(page.texts)
    assert '{{ 7*7 }}' in page.text, 'and is no template'


def test_nothing_in_a_run_is_executed(tmp_path: Path) -> None:
    folder = diffusion_run(tmp_path / 'run')
    touched = tmp_path / 'touched'
    with (folder / 'config.py').open('a') as file:
        file.write(f'import pathlib\npathlib.Path({str(touched)!r}).touch()\nother = open({str(touched)!r}, "w")\n')
    [section] = sections_of([folder])
    assert ('run: seed', '5') in section.facts
    assert not touched.exists()


def test_literals_of_a_config(tmp_path: Path) -> None:
    lines = [
        'a = 1',
        "b = dict(c=[1, (2, -3.5)], d={'e': None})",
        'f = g',
        "h = dict(i=len('x'))",
        'a = 2',
        'k: int = 3',
    ]
    found = data.literals(put(tmp_path / 'config.py', '\n'.join(lines)))
    assert found == {'a': 2, 'b': {'c': [1, [2, -3.5]], 'd': {'e': None}}}
    assert data.value_in(found, 'b.d.e', 0) is None
    assert data.value_in(found, 'b.x', 0) == 0
    assert data.literals(put(tmp_path / 'broken.py', 'a = (')) == {}
    assert data.literals(put(tmp_path / 'deep.py', 'a = ' + '[' * 5000 + ']' * 5000)) == {}
    assert data.literals(tmp_path / 'nowhere.py') == {}


@pytest.mark.parametrize(
    'damage', ['', '[', '{"models": 3}', '{"checks": {}, "arms": [1]}', '[[[]]]', '{"runs": 1}', 'NaN']
)
def test_damaged_files_are_said_and_stop_nothing(damage: str, tmp_path: Path, ablation: Path) -> None:
    detection_run(tmp_path / 'det')
    diffusion_run(tmp_path / 'unet')
    far_run(tmp_path / 'far')
    demo(tmp_path / 'demo')
    shutil.copytree(ablation, tmp_path / 'blood')
    for path in [*tmp_path.rglob('*.json'), *tmp_path.rglob('*.jsonl')]:
        path.write_text(damage)
    for path in tmp_path.rglob('*.png'):
        path.write_bytes(b'\x89PNG\r\n')
    detection_run(tmp_path / 'whole')
    page = page_of(tmp_path)
    assert 'whole: the folded detector is the trained one' in page.text
    assert 'was not tested yet' in page.text


@pytest.mark.parametrize('value', ['"\\ud800"', '1' + '0' * 400, '1e308', 'Infinity'])
def test_numbers_of_no_use_and_half_characters_stop_nothing(value: str, tmp_path: Path) -> None:
    folder = classification_run(tmp_path / 'run')
    path = folder / 'evaluation.json'
    found = json.loads(path.read_text())
    first, second = found['validations']
    found['validations'] = [{**first, 'accuracy': 'HERE'}, {**second, 'accuracy': 'THERE'}]
    found['versions'] = {'torch': 'HERE'}
    path.write_text(json.dumps(found).replace('"HERE"', value).replace('"THERE"', value.replace('1e', '-1e')))
    assert write(tmp_path / 'report.html', sections_of([tmp_path]), 'Title', 'about') > 1000
    assert 'accuracy' in (tmp_path / 'report.html').read_text()


def test_points_of_accuracy_are_points_everywhere(tmp_path: Path) -> None:
    """In sentences, tables and differences."""
    for seed in range(3):
        classification_run(tmp_path / f'stock-{seed}', seed, 0.64 + 0.01 * seed)
        classification_run(tmp_path / f'start-{seed}', seed, 0.67 + 0.011 * seed, dict(type='Start', value=0.5))
    done = command('ablate', '--runs', tmp_path, '--out', tmp_path / 'ablation')
    assert done.returncode == 0, done.stderr
    [section] = sections_of([tmp_path / 'ablation'])
    [arm] = section.arms[0].arms
    assert [round(value, 2) for _, value in arm.points] == [3.0, 3.1, 3.2]
    assert arm.ends == pytest.approx((2.85, 3.35), abs=0.01)
    arms, runs = section.tables
    assert [row[2] for row in arms.rows] == ['65.0 ± 1.0', '68.1 ± 1.1']
    assert {row[2] for row in runs.rows} == {'64.00', '65.00', '66.00', '67.00', '68.10', '69.20'}


def test_only_the_folders_of_a_run_are_passed_over(tmp_path: Path) -> None:
    for name in ('data10k-s0', 'configs-b', 'evaluation-2', 'stock-s0', 'samples', 'checkpoint-3'):
        classification_run(tmp_path / name)
    [section] = sections_of([tmp_path])
    assert {row[0] for row in section.tables[0].rows} == {'data10k-s0', 'configs-b', 'evaluation-2', 'stock-s0'}


def test_the_last_samples_of_a_training_are_shown(tmp_path: Path) -> None:
    folder = diffusion_run(tmp_path / 'unet')
    shutil.rmtree(folder / 'evaluation', ignore_errors=True)
    shutil.rmtree(folder / 'samples', ignore_errors=True)
    for step in range(1, 13):
        picture(folder / f'samples/step-{1000 * step:07d}.png')
    [section] = sections_of([folder])
    assert [each.path.name for each in section.pictures] == ['step-0011000.png', 'step-0012000.png']


def test_a_section_that_cannot_be_read_says_so(tmp_path: Path, ablation: Path) -> None:
    found = json.loads((ablation / 'ablation.json').read_text())
    put(tmp_path / 'blood/ablation.json', {**found, 'runs': [3], 'arms': [{'arm': 'a', 'seeds': 5}], 'metric': 7})
    [section] = sections_of([tmp_path])
    assert section.verdicts[0].text.startswith('blood: cannot be read, a file is damaged (')
    page_of(tmp_path)


def test_where_nothing_is_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='nowhere: no such run'):
        sections_of([tmp_path / 'nowhere'])
    (tmp_path / 'notes').mkdir()
    with pytest.raises(DataError, match='notes: has no run; give the folder of a training'):
        sections_of([tmp_path / 'notes'])
    done = command('report', tmp_path / 'notes', '--out', tmp_path / 'report.html')
    assert done.returncode == 1
    assert not (tmp_path / 'report.html').exists()


# Pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_share_what_a_page_may_weigh(tmp_path: Path) -> None:
    folder = detection_run(tmp_path / 'run')
    for number in range(6):
        picture(folder / f'pictures/{number}.png', (900, 500), noise=True)
    text = html_of(sections_of([folder]), 'Title', 'about', most=1_400_000)
    page = check_is_one_file(text)
    assert len(text.encode()) < 1_400_000
    assert len(page.all('img')) == 6
    assert {each['width'] for each in page.all('img')} == {'480'}
    with pytest.raises(AsrError, match='would have .* more than 10 kB; give fewer runs'):
        write(tmp_path / 'report.html', sections_of([folder]), 'Title', 'about', most=10_000)
    assert not (tmp_path / 'report.html').exists()


def test_pictures_are_data(tmp_path: Path) -> None:
    small = embed(picture(tmp_path / 'a.png', (30, 20)), 10_000)
    assert small is not None
    assert small[0].startswith('data:image/')
    assert small[1] == (30, 20)
    svg = put(tmp_path / 'a.svg', '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    drawn = embed(svg, 10_000)
    assert drawn is not None
    assert drawn[0].startswith('data:image/svg+xml;base64,')
    assert embed(svg, 10) is None
    assert embed(put(tmp_path / 'b.png', 'no picture'), 10_000) is None
    assert embed(tmp_path / 'nowhere.png', 10_000) is None
    assert embed(picture(tmp_path / 'c.png', (900, 500), noise=True), 5_000) is None


# A browser ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='needs a browser: chromium or chromium-headless-shell')
@pytest.mark.parametrize('width', [1280, 390])
def test_a_browser_has_nothing_to_complain_about(width: int, everything: Path, tmp_path: Path) -> None:
    """No console message, which a violation of the page's own policy would be, and a screenshot that is not blank."""

    def look(path: Path) -> list[str]:
        words = [str(BROWSER), '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr']
        words += [f'--window-size={width},900', f'--screenshot={tmp_path / "shot.png"}', path.as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        return [line for line in done.stderr.splitlines() if 'CONSOLE' in line]

    out = tmp_path / 'report.html'
    out.write_text(html_of(sections_of([everything]), 'Title', 'about'))
    assert look(out) == []
    from PIL import Image

    with Image.open(tmp_path / 'shot.png') as shot:
        assert shot.width == width
        assert len(shot.convert('L').getcolors() or range(999)) > 30
    out.write_text(out.read_text().replace('</main>', '<img src="http://localhost:9/x.png"></main>'))
    assert any('Content Security Policy' in line for line in look(out)), 'what is loaded is refused'
