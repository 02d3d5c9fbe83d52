"""Names that users give (runs, paths, classes, models) are text: no markup, no formula, no template, no code."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.diffusion import ASR, DIT, UNET, assert_refused, call, config_for, trained, write_config, write_images
from rich.table import Table

from asr_downstream.console.progress import bar
from asr_downstream.console.text import render
from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.evaluation.compare import compare_runs
from asr_downstream.diffusion.evaluation.results import Result, save_results, tables
from asr_downstream.diffusion.export import fold_and_ship
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.runs import load_run
from asr_downstream.engine.config import CONFIG_FILE, portable
from asr_downstream.engine.data.sources import HubDataset
from asr_downstream.errors import AsrError, DataError

NAMES = ['[bold]', '[/x]', 'a[red]b[/red]', '[link=file:///etc]here', ':smile:', '\\[x]', '[[x]]']


@pytest.mark.parametrize('name', NAMES)
def test_tables_show_names_as_they_are(name: str) -> None:
    table = Table('head ' + name, title='title ' + name, caption='caption ' + name)
    table.add_row('cell ' + name)
    text = render(table)
    for place in ('head', 'title', 'caption', 'cell'):
        assert f'{place} {name}' in text
    result = Result(name, 'unfolded', 1, 'w', {'real': name, 'versions': {}}, {'fid': 1.0})
    assert tables([result]).count(name) == 2


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('terminal', [True, False])
def test_progress_bars_show_names_as_they_are(
    name: str, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '120')
    for key in ('FORCE_COLOR', 'TTY_COMPATIBLE'):
        monkeypatch.setenv(key, '1' if terminal else '')
    assert list(bar([1, 2], f'text {name}')) == [1, 2]
    assert f'text {name}' in capsys.readouterr().out


@pytest.mark.parametrize(
    'name',
    ['[/x]', 'a$\\frac$', *(pytest.param(n, marks=pytest.mark.slow) for n in ('[bold]', '$', '_hidden', '{x}', '%s'))],
)
def test_runs_are_compared_by_their_names(tmp_path: Path, name: str) -> None:
    paths = []
    for parent in ('a', 'b'):
        path = tmp_path / parent / name
        (path / 'samples').mkdir(parents=True)
        (path / 'log.jsonl').write_text(
            '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": %s}\n' % (0.1 if parent == 'a' else 0.2)
        )
        shutil.copy(picture(tmp_path), path / 'samples/step-0000002.png')
        save_results(path, [Result(name, 'unfolded', 2, 'w', {'versions': {}}, {'fid': 1.0})])
        paths.append(path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        text = compare_runs(paths, tmp_path / 'out')
    assert name in text
    assert (tmp_path / 'out/samples.png').is_file()
    losses = json.loads((tmp_path / 'out/results.json').read_text())['loss']
    assert sorted(points[-1][1] for points in losses.values()) == [0.1, 0.2]
    assert len(losses) == 2, 'runs of one name in two folders are two'


def picture(folder: Path) -> Path:
    """Write a picture."""
    from PIL import Image

    Image.new('RGB', (8, 8)).save(folder / 'p.png')
    return folder / 'p.png'


# Templates of MMEngine ------------------------------------------------------------------------------------------------

TEMPLATES = ['{{ fileBasename }}', '{{fileDirname}}', '{{ _base_.x }}', '{{$HOME:x}}', '{{{ fileExtname }}}', '{{ x }}']


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_resolved_config_reads_back_as_it_was(tmp_path: Path, name: str) -> None:
    config = config_for(tmp_path)
    config.data = dict(type='ImageFolder', path=f'/data/{name}/x', resolution=8)
    config.condition = dict(type='ClassLabels', classes=[name, 'b', f"it's {name}"])
    (tmp_path / 'run').mkdir()
    path = tmp_path / 'run' / CONFIG_FILE
    path.write_text(portable(config))
    again = load_config(path)
    assert again.data.path == f'/data/{name}/x'
    assert again.condition.classes == [name, 'b', f"it's {name}"]


def test_a_run_on_data_below_such_a_folder_is_read_back(tmp_path: Path) -> None:
    images = write_images(tmp_path / '{{ fileBasename }}' / 'images')
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    config = load_config(write_config(tmp_path, model=model, max_train_steps=1), data=images)
    config.output_dir = str(tmp_path / 'run')
    from asr_downstream.diffusion.training.train import train

    train(config)
    assert load_run(tmp_path / 'run', data=True).config.data.path == str(images)


# Whose fault it is ----------------------------------------------------------------------------------------------------


def test_the_classes_of_a_dit_are_counted_as_dit_counts_them(tmp_path: Path) -> None:
    images = write_images(tmp_path / 'images', classes=('cat', 'dog'))
    model = dict(
        type='DiTTransformer2DModel', **{**DIT, 'num_embeds_ada_norm': 1000, 'in_channels': 3, 'out_channels': 3}
    )
    settings = dict(model=model, plug=None, data=dict(type='ImageFolder', path=str(images), resolution=8))
    with pytest.raises(AsrError) as caught:
        build_parts(config_for(tmp_path, **settings, condition=dict(type='ClassLabels', drop=0.1)))
    assert 'num_embeds_ada_norm=1000 should be 2 (2 classes' in str(caught.value)
    assert 'and one for no class' not in str(caught.value)
    assert 'adds' in str(caught.value)


@pytest.mark.parametrize('options', [{'streaming': True}, {'split': None}])
def test_data_that_has_no_rows_is_blamed_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    images = write_images(tmp_path / 'images')
    (images / 'metadata.jsonl').write_text('{"file_name": "cat/0.png", "text": "a cat"}\n')
    data = dict(
        type='HubDataset', path='imagefolder', data_dir=str(images), cache_dir=str(tmp_path / 'cache'),
        caption_column='text', resolution=8, **options,
    )  # fmt: skip
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    path = write_config(tmp_path, model=model, data=data)
    done = call('diffusion/train.py', path, '--dry-run')
    assert_refused(done, 'imagefolder', next(iter(options)))
    assert 'condition' not in done.stderr


def test_a_stream_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kwargs: pytest.fail('it was opened'))
    with pytest.raises(DataError, match=r'me/birds: streaming .* no order that a resumed run .*leave streaming out'):
        HubDataset('me/birds', streaming=True)


def test_the_splits_to_choose_from_are_named(tmp_path: Path) -> None:
    images = write_images(tmp_path / 'images')
    with pytest.raises(DataError, match="split=None is no single one; name one, such as split='train'"):
        HubDataset('imagefolder', split=None, data_dir=str(images), cache_dir=str(tmp_path / 'cache'))


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        (
            'condition',
            dict(type='ClassLabels', dorp=0.1),
            "condition: ClassLabels takes no 'dorp'; did you mean 'drop'",
        ),
        ('condition', dict(type='ClassLabels', drop='much'), "condition: drop='much'"),
        ('data', dict(type='Digits', resolution=8, paht='x'), "data: Digits takes no 'paht'"),
        ('data', dict(type='Digits', resolution='8'), "data: resolution='8'"),
        ('data', dict(type='ImageFolder', path=3, resolution=8), 'data: path=3'),
        ('data', dict(type='ImageFolder', resolution=8), "data: ImageFolder needs 'path'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(AsrError) as caught:
        build_parts(config_for(tmp_path, **{key: value}))
    assert message in str(caught.value)


# Cards ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_names_of_classes_cannot_leave_the_comment_of_the_code(tmp_path: Path) -> None:
    hostile = 'cat\nraise SystemExit  #'
    names = (hostile, 'dog```', "o'wl")
    images = write_images(tmp_path / 'images', classes=names)
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3, 'num_class_embeds': 3})
    run = trained(
        tmp_path, model=model, plug=ASR, condition=dict(type='ClassLabels'),
        data=dict(type='ImageFolder', path=str(images), resolution=8),
    )  # fmt: skip
    fold_and_ship(load_run(run), tmp_path / 'out')
    card = (tmp_path / 'out/README.md').read_text()
    code = card.split('```python\n')[1].split('\n```')[0]
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(tmp_path / 'out')), scope)
    assert len(scope['images']) == 4
