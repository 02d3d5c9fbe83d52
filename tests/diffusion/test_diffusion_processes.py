"""Sampling and evaluation on two processes: the files and numbers of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise
from helpers.diffusion import ASR, UNET, call, trained, write_images
from safetensors.torch import save_file

from asr_downstream.console.processes import Processes
from asr_downstream.diffusion.evaluation.encoder import Encoder
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.runs import load_run
from asr_downstream.engine.launch import join
from asr_downstream.errors import AsrError

pytestmark = pytest.mark.usefixtures('one_thread')

SAMPLING = ('--num-samples', 7, '--batch-size', 2, '--steps', 3)  # four batches: two of each process
TORCHRUN = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
TIMES = ('images_per_second', 'speed')


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ASR(SE) run on a few images, with an encoder that is not trained."""
    folder = tmp_path_factory.mktemp('asr')
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    data = dict(type='ImageFolder', path=str(write_images(folder / 'train')), resolution=8)
    run = trained(folder, model=model, data=data, plug=ASR)
    encoder = Encoder(classes=4)
    randomise(encoder)
    save_file(encoder.state_dict(), run / 'encoder.safetensors', {'about': '{}'})
    return run


def two(start: list[str], *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the checkout in two processes."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **variables}
    words = [*start, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)


def assert_said_once(done: subprocess.CompletedProcess[str], text: str) -> None:
    """Assert that a launch failed with one line of error; what launchers add to it is theirs."""
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert text in lines[0], lines[0]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_two_processes_write_the_images_of_one(run: Path, tmp_path: Path) -> None:
    alone = call('diffusion/sample.py', run, *SAMPLING, '--single', '--out', tmp_path / 'one')
    done = two(TORCHRUN, 'diffusion/sample.py', run, *SAMPLING, '--single', '--out', tmp_path / 'two')
    assert done.returncode == 0, done.stderr
    found, expected = files(tmp_path / 'two'), files(tmp_path / 'one')
    assert found == expected
    assert len(set(expected.values())) == 8  # seven images that differ, and the grid
    assert done.stdout == alone.stdout.replace(str(tmp_path / 'one'), str(tmp_path / 'two'))  # said once


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run: Path, tmp_path: Path) -> None:
    rows, grids = [], []
    for number, start in enumerate((None, TORCHRUN)):
        own = Path(shutil.copytree(run, tmp_path / str(number) / 'run'))
        words = ('diffusion/evaluate.py', own, *SAMPLING, '--fold', '--workers', 0)
        done = call(*map(str, words)) if start is None else two(start, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('images/s') == 1, done.stdout
        rows.append(json.loads((own / 'evaluation.json').read_text()))
        grids.append(files(own / 'evaluation'))
    for row in (*rows[0], *rows[1]):
        for name in TIMES:
            row['numbers'].pop(name, None)
    assert rows[0] == rows[1]
    assert [row['arm'] for row in rows[1]] == ['unfolded', 'folded']
    assert rows[1][0]['numbers']['fid'] > 0
    assert grids[0] == grids[1]


def test_noise_belongs_to_the_image_and_not_to_the_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_run(run)

    def draw(numbers: Any) -> torch.Tensor:
        return generate(found.parts.model, found.parts, build_sampler(None, found.parts.scheduler), numbers, 2, 0, 2)

    whole, batches = draw(range(6)), [[0, 1], [2, 3], [4, 5]]
    second = [number for batch in Processes(1, 2).own(batches) for number in batch]
    assert torch.equal(draw(second), whole[second])
    # noise in the order of a process's own images
    streams = iter(range(100))
    monkeypatch.setattr('asr_downstream.diffusion.evaluation.sampling.mix', lambda *_: next(streams))
    assert not torch.equal(draw(second), draw(range(6))[second])


def test_shards_that_would_be_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip('needs a machine without GPUs')
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(AsrError, match='FSDP is asked for, but shards nothing on cpu'):
        join()


@pytest.mark.slow
def test_every_launcher_gives_the_same_or_refuses(run: Path, tmp_path: Path) -> None:
    accelerate = [sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch']
    wanted = call('diffusion/sample.py', run, *SAMPLING, '--single', '--out', tmp_path / 'one')
    assert wanted.returncode == 0
    done = two(
        [*accelerate, '--multi_gpu', '--num_processes', '2', '-m', 'asr_downstream', 'sample'],
        run, *SAMPLING, '--single', '--out', tmp_path / 'two',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / 'two') == files(tmp_path / 'one')
    one_process = two([*accelerate, '--cpu', '--num_processes', '2', 'diffusion/sample.py'], run, *SAMPLING)
    assert_said_once(one_process, 'asked for several processes and started one')
    sharded = two(
        [*accelerate, '--use_fsdp', '--fsdp_version', '2', '--num_processes', '2', 'diffusion/sample.py'],
        run, *SAMPLING, '--out', tmp_path / 'three',
    )  # fmt: skip
    assert_said_once(sharded, 'FSDP is asked for, but shards nothing on cpu')


@pytest.mark.slow
def test_what_fails_on_all_is_said_once(run: Path) -> None:
    done = two(TORCHRUN, 'diffusion/sample.py', run, *SAMPLING[:-1], 1000)
    assert_said_once(done, '1000 inference steps')
