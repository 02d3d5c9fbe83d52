"""Evaluations: weights that mean nothing are refused first, folders are tried first, earlier results are kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_of_at_most
from helpers import far
from helpers.diffusion import ASR, assert_refused, call, rewrite, script, trained
from safetensors.torch import load_file, save_file

from asr_downstream.diffusion.evaluation import evaluate as evaluation
from asr_downstream.diffusion.evaluation.evaluate import Plan, evaluate_runs
from asr_downstream.diffusion.evaluation.results import Result, read_results, save_results
from asr_downstream.diffusion.runs import load_run
from asr_downstream.errors import AsrError
from asr_downstream.far.export import load_far, save_far
from asr_downstream.files.atomic import sha256

QUICK = ('--num-samples', 4, '--steps', 2, '--workers', 0)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ASR(SE) run on digits."""
    return trained(tmp_path_factory.mktemp('asr'), plug=ASR)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / 'copy'))


def broken(path: Path, name: str = 'ema', value: float = float('nan')) -> Path:
    """Put a value that is not finite into weights of a run."""
    checkpoint = next(path.glob('checkpoint-*'))
    state = load_file(checkpoint / f'{name}.safetensors')
    state['conv_out.bias'][0] = value
    rewrite(checkpoint, name, state)
    return path


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tool', ['sample', 'evaluate', 'fold', 'calibrate'])
@pytest.mark.parametrize('value', [float('nan'), pytest.param(float('-inf'), marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_refused_before_any_work(
    copy: Path, tmp_path: Path, tool: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, 'train_encoder', lambda *a, **k: pytest.fail('trained an encoder first'))
    words = {
        'sample': ('diffusion/sample.py', broken(copy, value=value), '--out', tmp_path / 'out', *QUICK[:4]),
        'evaluate': ('diffusion/evaluate.py', broken(copy, value=value), *QUICK),
        'fold': ('tools/fold.py', broken(copy, value=value), tmp_path / 'out'),
        'calibrate': ('tools/fold.py', broken(copy, value=value), tmp_path / 'out', '--calibrate', 8),
    }[tool]
    assert_refused(call(*words), 'ema.safetensors', 'conv_out.bias', 'not finite')
    assert not (tmp_path / 'out').exists()
    load_run(copy, ema=False)  # those are fine


def test_the_second_of_two_runs_is_checked_before_the_first_is_evaluated(
    run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, 'extractor_for', lambda *a: pytest.fail('worked first'))
    assert_refused(call('diffusion/evaluate.py', run, broken(copy), *QUICK), 'not finite')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--metrics', 'fid,is'), "'is'"),
        pytest.param(('--steps', 500), '500', marks=pytest.mark.slow),
        (('--guidance-scale', 2), 'guidance'),
        pytest.param(('--metrics', ''), 'metrics', marks=pytest.mark.slow),
        (('--num-samples', 1), '--num-samples'),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_before_any_work(
    run: Path, options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, 'extractor_for', lambda *a: pytest.fail('worked first'))
    assert_refused(call('diffusion/evaluate.py', run, *QUICK, *options), message)


def test_images_that_are_not_finite_are_no_pictures(copy: Path, tmp_path: Path) -> None:
    checkpoint = next(copy.glob('checkpoint-*'))
    state = load_file(checkpoint / 'ema.safetensors')
    for name in ('conv_in.weight', 'conv_out.weight'):
        state[name] = torch.full_like(state[name], 3e38)  # finite, and what is computed with it is not
    rewrite(checkpoint, 'ema', state)
    done = call('diffusion/sample.py', copy, '--out', tmp_path / 'out', *QUICK[:4])
    assert_refused(done, 'images', 'not finite')
    assert not (tmp_path / 'out/grid.png').exists()


def test_a_family_with_weights_that_are_not_finite_has_no_accuracy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ('teacher', 'FAR-100'):
        model = far.vit()
        if name != 'teacher':
            far_model(model)
        save_far(model, tmp_path / 'shipped' / name, {'name': name})
    path = tmp_path / 'shipped/FAR-100/asr_downstream.safetensors'
    state = load_file(path)
    state['classifier.bias'][:] = float('nan')
    save_file(state, path)
    facts = json.loads((path.parent / 'far.json').read_text())
    facts['files'][path.name] = sha256(path)  # whoever wrote them, knew them
    (path.parent / 'far.json').write_text(json.dumps(facts))
    assert_refused(call('tools/evaluate_far.py', tmp_path, '--rounds', 1), 'classifier.bias', 'not finite')
    with pytest.raises(AsrError, match='not finite'):
        load_far(path.parent)


def far_model(model: Any) -> None:
    """Replace attention, in place."""
    from asr_downstream.far import replace

    replace(model, far.FAR)


# Folders --------------------------------------------------------------------------------------------------------------


def unusable(folder: Path) -> Path:
    """A folder that nobody can make, root neither: a file is in its way."""
    (folder / 'file').write_text('mine')
    return folder / 'file' / 'out'


@pytest.mark.parametrize('tool', ['sample', 'fold', 'compare', 'compare to a file'])
def test_folders_that_cannot_be_written_are_refused_before_any_work(
    run: Path, copy: Path, tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asr_downstream.diffusion import export as shipping
    from asr_downstream.diffusion.evaluation import compare as comparison
    from asr_downstream.diffusion.evaluation import fold as folding
    from asr_downstream.diffusion.evaluation import sampling

    for module, name in (
        (sampling, 'generate'),
        (folding, 'fold_exactly'),
        (shipping, 'compare'),
        (comparison, 'draw_curves'),
    ):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail('worked first'))
    out = unusable(tmp_path)
    words: dict[str, tuple[Any, ...]] = {
        'sample': ('diffusion/sample.py', run, '--out', out),
        'fold': ('tools/fold.py', run, out),
        'compare': ('diffusion/compare.py', run, '--out', out),
        'compare to a file': ('diffusion/compare.py', run, '--out', tmp_path / 'file'),
    }
    assert_refused(call(*words[tool]), str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_text() == 'mine'


def test_a_run_that_cannot_be_written_is_not_evaluated(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, 'extractor_for', lambda *a: pytest.fail('worked first'))
    shutil.rmtree(copy / 'evaluation', ignore_errors=True)
    (copy / 'evaluation').write_text('a file where grids go')
    assert_refused(call('diffusion/evaluate.py', copy, *QUICK), 'evaluation', 'cannot be written')


@pytest.mark.slow
@pytest.mark.parametrize('case', ['no pipeline', 'damaged', 'folder'])
def test_the_sampler_without_this_package_says_it_in_one_line(tmp_path: Path, case: str) -> None:
    folder = tmp_path / 'pipeline'
    folder.mkdir()
    out = unusable(tmp_path) if case == 'folder' else tmp_path / 'o.safetensors'
    if case != 'no pipeline':
        (folder / 'model_index.json').write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers"')
    done = script('tools/sample_stock.py', folder, '--out', out)
    assert done.returncode in (1, 2)
    assert 'Traceback' not in done.stderr
    assert 'error: ' in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / 'o.safetensors').exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize('tool', ['fold', *(pytest.param(t, marks=pytest.mark.slow) for t in ('sample', 'compare'))])
def test_a_full_disk_is_one_line_and_leaves_nothing(copy: Path, tmp_path: Path, tool: str) -> None:
    out = tmp_path / 'out' / 'here'
    words: dict[str, tuple[Any, ...]] = {
        'sample': ('diffusion/sample.py', copy, '--out', out, '--num-samples', 64, '--steps', 1),
        'fold': ('tools/fold.py', copy, out),
        'compare': ('diffusion/compare.py', copy, '--out', out),
    }
    with files_of_at_most(20_000 if tool == 'compare' else 4_000):
        done = call(*words[tool])
    assert_refused(done, 'cannot be written', 'free')
    assert not [p for p in (tmp_path / 'out').rglob('*') if p.is_file()]


# Earlier results ------------------------------------------------------------------------------------------------------

ROW = Result('run', 'unfolded', 1, 'w', {'images': 4, 'versions': {'torch': '2'}}, {'fid': 1.0, 'parameters': 7})
WHOLE = json.dumps([dataclasses.asdict(ROW)])
DAMAGED = {
    'cut': WHOLE[:40],
    'empty': '',
    'no list': '{"a": 1}',
    'null': 'null',
    'numbers': '[1, 2]',
    'lacks': WHOLE.replace('"step": 1, ', ''),
    'strange key': WHOLE.replace('"step": 1', '"step": 1, "more": 2'),
    'wrong type': WHOLE.replace('"step": 1', '"step": "1"'),
    'numbers wrong': WHOLE.replace('1.0', '"low"'),
    'provenance wrong': WHOLE.replace('{"images": 4, "versions": {"torch": "2"}}', '[]'),
    'versions wrong': WHOLE.replace('{"torch": "2"}', '3'),
    'bytes': b'\xff\xfe\x00',
    'deep': '[' * 100_000,
}


FAST = ('cut', 'null', 'wrong type', 'bytes')


def put(folder: Path, content: str | bytes) -> Path:
    """Write a damaged file of results."""
    path = folder / 'evaluation.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in DAMAGED])
def test_damaged_results_are_set_aside_before_the_work_and_new_ones_kept(
    copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = put(copy, DAMAGED[name])
    content = damaged.read_bytes()

    class Worked(Exception):
        pass

    def work(*args: Any) -> None:
        assert not damaged.exists(), 'is set aside before the work'
        raise Worked

    monkeypatch.setattr(evaluation, 'extractor_for', work)
    with pytest.raises(Worked):
        evaluate_runs([copy], Plan(num_samples=4, steps=2))
    (aside,) = copy.glob('evaluation.damaged*')
    assert aside.read_bytes() == content
    put(copy, DAMAGED[name])  # again, between: it does not take the place of the first
    save_results(copy, [ROW])
    assert read_results(copy) == [ROW]
    assert len(list(copy.glob('evaluation.damaged*'))) == 2


@pytest.mark.parametrize('tool', ['show', 'compare', 'fold'])
def test_tools_that_only_read_name_damaged_results(copy: Path, tmp_path: Path, tool: str) -> None:
    put(copy, DAMAGED['no list'])
    words: dict[str, tuple[Any, ...]] = {
        'show': ('diffusion/evaluate.py', copy, '--show'),
        'compare': ('diffusion/compare.py', copy, '--out', tmp_path / 'out'),
        'fold': ('tools/fold.py', copy, tmp_path / 'out'),
    }
    assert_refused(call(*words[tool]), 'evaluation.json', 'damaged')
    assert not (tmp_path / 'out').exists()


@pytest.mark.timeout(60)
def test_evaluations_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def keep(number: int) -> None:
        save_results(tmp_path, [dataclasses.replace(ROW, step=number)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, range(40)))
    assert sorted(result.step for result in read_results(tmp_path)) == list(range(40))
