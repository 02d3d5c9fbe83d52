"""A user's own source, condition, metric and attention, from a package outside, by the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.diffusion import UNET, assert_refused, call, write_config
from helpers.extending import run as command
from helpers.extending import write_package

from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.evaluation.encoder import train_encoder
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.far import both_imports
from asr_downstream.engine.data.images import build_images
from asr_downstream.errors import AsrError
from asr_downstream.files.configs import import_modules, read_config

MODULES = [f'mypackage.{name}' for name in ('attentions', 'sources', 'conditions', 'metrics')]
OWN: dict[str, Any] = dict(
    custom_imports=dict(imports=MODULES),
    model=dict(type='UNet2DModel', **UNET, num_class_embeds=2),
    plug=dict(type='ASR', attention=dict(type='Gain')),
    data=dict(type='Bars', resolution=8),
    condition=dict(type='Direction'),
    max_train_steps=4,
    checkpointing_steps=2,
)
QUICK = ('--num-samples', 8, '--steps', 2, '--workers', 0)


@pytest.fixture(scope='module')
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the package and of a run that was stopped and resumed with it."""
    folder = write_package(tmp_path_factory.mktemp('own'))
    path = write_config(folder, **OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for steps, resume in ((2, ()), (4, ('--resume',))):
            arguments = ('--output-dir', folder / 'run', *resume, '--cfg-options', f'max_train_steps={steps}')
            done = call('diffusion/train.py', path, *arguments)
            assert done.returncode == 0, done.stderr
        yield folder


def test_a_run_is_resumed_evaluated_and_sampled_by_what_its_config_names(own: Path) -> None:
    assert (own / 'run/checkpoint-4').is_dir()
    assert 'mypackage.sources' in (own / 'run/config.py').read_text()
    images = load_run(own / 'run', data=True).parts.images
    assert images is not None
    train_encoder(images, own / 'encoder.safetensors', steps=5, workers=0)
    arguments = ('--metrics', 'gap,fid', '--extractor', own / 'encoder.safetensors', *QUICK)
    done = call('diffusion/evaluate.py', own / 'run', *arguments)
    assert done.returncode == 0, done.stderr
    assert 'gap' in done.stdout
    numbers = json.loads((own / 'run/evaluation.json').read_text())[0]['numbers']
    assert numbers['gap'] > 0
    assert 'fid' in numbers
    assert 'kid' not in numbers
    done = call('diffusion/evaluate.py', own / 'run', '--metrics', 'gapp', *QUICK)
    assert_refused(done, "unknown metric 'gapp': did you mean 'gap'")
    done = call('diffusion/sample.py', own / 'run', '--num-samples', 2, '--steps', 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_where_the_package_is_not_one_line_says_so(own: Path) -> None:
    done = command('diffusion/sample.py', own / 'run')
    assert_refused(done, f'{own}/run/config.py', 'custom_imports', 'mypackage', 'PYTHONPATH')


@pytest.mark.slow
def test_what_is_shipped_needs_no_package(own: Path) -> None:
    done = call('tools/fold.py', own / 'run', own / 'shipped')
    assert done.returncode == 0, done.stderr
    card = (own / 'shipped/README.md').read_text()
    code = card.split('```python\n')[1].split('```')[0].replace('THIS FOLDER', str(own / 'shipped'))
    assert 'class_labels' in code
    code += "\nimport sys; assert not {'mypackage', 'asr_downstream'} & set(sys.modules); print(images.shape)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=own, check=False)
    assert done.returncode == 0, done.stderr
    assert 'torch.Size([4, 1, 8, 8])' in done.stdout


@pytest.mark.parametrize(
    ('named', 'message'),
    [
        (dict(imports=['no_such_package.data']), 'no_such_package.data cannot be imported .*PYTHONPATH'),
        (dict(imports='no_such_package'), 'no_such_package cannot be imported'),
        (dict(imports=['broken_package']), 'broken_package fails while it is imported .ZeroDivisionError'),
        (dict(imports=[5]), 'should be a list of modules'),
        (dict(imports=['']), 'should be a list of modules'),
        (dict(modules=['a']), r'should be dict\(imports='),
        (['a'], 'should be dict or None'),
    ],
)
def test_imports_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: Any, message: str) -> None:
    (tmp_path / 'broken_package.py').write_text('1 / 0\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AsrError, match=f'custom_imports.*{message}') as caught:
        load_config(write_config(tmp_path, custom_imports=named))
    assert '\n' not in str(caught.value)


def test_failed_imports_may_be_allowed(tmp_path: Path) -> None:
    named = dict(imports=['no_such_package'], allow_failed_imports=True)
    with pytest.warns(UserWarning, match='no_such_package is not imported'):
        load_config(write_config(tmp_path, custom_imports=named))


@pytest.mark.parametrize('name', ['config.yaml', 'config.json'])
def test_data_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    module = f'imported_by_{path.suffix[1:]}'
    (tmp_path / f'{module}.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\n')
    monkeypatch.syspath_prepend(tmp_path)
    path.write_text('{"custom_imports": {"imports": ["MODULE"]}, "max_train_steps": 1}'.replace('MODULE', module))
    for read in (lambda: load_config(path), lambda: read_config(path, 'x')):
        with pytest.raises(AsrError, match='is data and imports nothing; use a .py config'):
            read()
    assert not (tmp_path / 'ran').exists()
    import_modules(dict(imports=module), tmp_path)
    assert (tmp_path / 'ran').exists()


def test_imports_of_two_configs_are_joined(tmp_path: Path) -> None:
    one, other = (load_config(write_config(tmp_path / name)) for name in 'ab')
    assert both_imports(one, other) is None
    one.custom_imports = dict(imports=['a', 'b'])
    other.custom_imports = dict(imports='b')
    assert both_imports(one, other) == {'imports': ['a', 'b']}
    assert both_imports(other, one) == {'imports': ['b', 'a']}


def test_names_are_suggested_from_all_that_is_registered() -> None:
    with pytest.raises(AsrError, match="data: type='Digit' is not known; did you mean 'Digits'"):
        build_images(dict(type='Digit', resolution=8), 1)
