"""Commands side by side: order, failures, stops; and an ablation that goes on where it was stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from asr_downstream.commands.ablation import schedule
from asr_downstream.commands.ablation.arms import ARMS
from asr_downstream.commands.ablation.kinds.base import Kind, Plan, Run
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.results import result_of
from asr_downstream.commands.ablation.schedule import Job, run_jobs
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.commands.ablation.study import NOTE, Study
from asr_downstream.console.stopping import Stopped
from asr_downstream.errors import AsrError, DataError

# Stands for `python -m asr_downstream`: writes when it ran, with what; 'train' needs two goes where there is a bomb.
PROGRAM = """
import json, os, pathlib, signal, sys, time
what, folder, *rest = sys.argv[1:]
folder = pathlib.Path(folder)
if '--dry-run' in rest:
    config = pathlib.Path(rest[1]).read_text()
    sys.exit('error: does not fit' if "'ASR'" in config else 0)
with (folder / 'ran.jsonl').open('a') as file:
    file.write(json.dumps([what, *rest, os.environ['OMP_NUM_THREADS'], time.time()]) + '\\n')
if what == 'fail':
    sys.exit('error: no room')
if what == 'quiet':
    sys.exit(1)
if what == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
if what == 'wait':
    signal.signal(signal.SIGTERM, lambda *a: ((folder / 'checkpoint').touch(), sys.exit(143)))
    print('waiting', flush=True)
    time.sleep(60)
if what == 'deaf':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print('waiting', flush=True)
    time.sleep(60)
if what == 'train':
    (folder / 'trained').write_text(rest[0])
if what == 'test':
    seed = int((folder / 'trained').read_text())
    (folder / 'result.json').write_text(json.dumps({'seed': seed, 'x': 1 + 0.1 * seed + ('asr' in folder.name)}))
"""


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    popen = subprocess.Popen
    started: list[Any] = []

    def start(words: list[str], **kwargs: Any) -> Any:
        assert words[:3] == [sys.executable, '-m', 'asr_downstream']
        started.append(popen([sys.executable, '-S', '-E', str(program), *words[3:]], **kwargs))
        return started[-1]

    monkeypatch.setattr(schedule.subprocess, 'Popen', start)
    monkeypatch.setattr(schedule, 'LOOK_SECONDS', 0.01)
    yield
    assert all(process.poll() is not None for process in started), 'nothing is left running'


def job(folder: Path, *steps: str, threads: int = 1) -> Job:
    return Job(folder.name, folder, [lambda s=s: [s, str(folder)] for s in steps], threads)


def ran(folder: Path) -> list[list[Any]]:
    path = folder / 'ran.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_steps_follow_each_other_and_jobs_run_side_by_side(tmp_path: Path) -> None:
    said: list[str] = []
    jobs = [job(tmp_path / str(n), 'a', 'b', threads=3) for n in range(3)]
    assert run_jobs(jobs, 2, said.append) == []
    for n in range(3):
        assert [(row[0], row[1]) for row in ran(tmp_path / str(n))] == [('a', '3'), ('b', '3')]
    assert [line.partition(':')[0] for line in said if 'started' in line] == ['0', '1', '2']
    assert ran(tmp_path / '1')[0][-1] < ran(tmp_path / '0')[1][-1] + 5  # the second began beside the first
    assert said[2].startswith(('0: done in', '1: done in'))
    assert re.search(r'1 of 3 left, about \d:\d\d:\d\d', said[-2])


def test_a_failure_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    def refuse() -> list[str]:
        raise DataError('wrote no checkpoint')

    said: list[str] = []
    late = Job('late', tmp_path / 'late', [lambda: ['a', str(tmp_path / 'late')], refuse])
    jobs = [job(tmp_path / 'bad', 'fail', 'b'), late, job(tmp_path / 'good', 'a')]
    failed = run_jobs(jobs, 1, said.append)
    assert [(each.name, each.error) for each in failed] == [('bad', 'no room'), ('late', 'wrote no checkpoint')]
    assert [row[0] for row in ran(tmp_path / 'bad')] == ['fail']
    assert [row[0] for row in ran(tmp_path / 'good')] == ['a']
    assert any(line.startswith('bad: failed: no room') for line in said)


def test_what_failed_before_is_not_why_it_failed_now(tmp_path: Path) -> None:
    folder = tmp_path / 'a'
    assert run_jobs([job(folder, 'fail')], 1, print)[0].error == 'no room'
    assert run_jobs([job(folder, 'quiet')], 1, print)[0].error == 'nothing was printed'
    [killed] = run_jobs([job(folder, 'killed')], 1, print)
    assert killed.error == 'was ended by SIGKILL, as for want of memory'


def when(path: Path, do: Any) -> threading.Thread:
    """Do something when a file is there and says that a command waits."""

    def watch() -> None:
        for _ in range(2000):
            if path.is_file() and 'waiting' in path.read_text():
                return do()
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_commands_once_and_begins_nothing(tmp_path: Path, number: signal.Signals) -> None:
    jobs = [job(tmp_path / 'a', 'wait', 'b'), job(tmp_path / 'b', 'a')]
    thread = when(tmp_path / 'a/output.txt', lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped:
        run_jobs(jobs, 1, print)
    thread.join()
    assert stopped.value.status == 128 + number
    assert (tmp_path / 'a/checkpoint').exists()
    assert [row[0] for row in ran(tmp_path / 'a')] == ['wait']
    assert ran(tmp_path / 'b') == []


def test_a_second_interrupt_ends_what_does_not_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, 'GRACE_SECONDS', 0.1)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when(tmp_path / 'a/output.txt', twice)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job(tmp_path / 'a', 'deaf')], 1, print)
    thread.join()
    assert time.monotonic() - begin < 30


# A study --------------------------------------------------------------------------------------------------------------


class Numbers(Kind):
    """A kind whose trainings are the program above."""

    name = 'numbers'
    folder = 'diffusion/configs'
    result = 'result.json'
    metrics = {'x': Metric('x')}

    def train(self, run: Run) -> list[str]:
        return ['train', str(run.folder), str(run.seed), str(run.config)]

    def test(self, run: Run) -> list[str]:
        return ['test', str(run.folder), *run.plan.test]

    def is_run(self, folder: Path) -> bool:
        return (folder / 'result.json').is_file()

    def read(self, folder: Path) -> Record:
        if not self.is_run(folder):
            raise DataError(f'{folder}: is not complete')
        found = json.loads((folder / 'result.json').read_text())
        folded = {'x': found['x']} if 'asr' in folder.name else None
        return Record(folder.name, found['seed'], {'x': found['x']}, folded)


def study(out: Path, seeds: int = 3, **plan: Any) -> Study:
    config = ROOT / 'diffusion/configs/unet-w32_digits.py'
    return Study(Plan(config, out, **plan), Numbers(), {name: ARMS[name] for name in ('stock', 'asr-se')}, range(seeds))


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out, said = tmp_path / 'out', list[str]()
    assert study(out, 2).carry_out(2, said.append) == []
    folder = out / 'runs/asr-se-s1'
    (folder / 'result.json').unlink()  # as if it had been stopped in its test
    assert study(out).carry_out(2, said.append) == []
    assert '3 of 6 runs are there' in said
    assert [row[0] for row in ran(folder)] == ['train', 'test', 'train', 'test']
    assert [row[0] for row in ran(out / 'runs/stock-s1')] == ['train', 'test'], 'a run with its result is passed over'
    records = study(out).records()
    assert [(record.arm, record.seed) for record in records] == [
        (arm, seed) for seed in range(3) for arm in ('stock', 'asr-se')
    ]
    result = result_of('numbers', 'x', Metric('x'), records)
    assert result.comparisons['asr-se'].differences == pytest.approx((1, 1, 1))
    assert study(out).carry_out(2, said.append) == []
    assert said[-1] == '6 of 6 runs are there'
    assert json.loads((folder / NOTE).read_text())['plug'] == ARMS['asr-se'].plug


def test_a_rehearsal_names_the_arms_that_would_fail_and_leaves_nothing(tmp_path: Path) -> None:
    out, said = tmp_path / 'out', list[str]()
    with pytest.raises(AsrError, match=r'^ASR\(SE\): would fail'):
        study(out, 3).rehearse(said.append)
    assert said[-1].endswith('6 of 6 runs to train, 2 arms')
    assert not out.exists()
    study(out, 1).carry_out(1, print)
    before = sorted(out.rglob('*'))
    with pytest.raises(AsrError, match='was made from another config'):
        study(out, 1, options=('max_train_steps=5',)).rehearse(said.append)
    study(out, 1).rehearse(said.append)
    assert said[-3:-1] == ['\nASR(SE): SE on learned inputs', 'all its runs are there']
    assert sorted(out.rglob('*')) == before


def test_other_words_for_the_evaluation_train_nothing_anew(tmp_path: Path) -> None:
    """A typing error in them would cost all trainings; classifiers are evaluated by the command that trains them."""
    out = tmp_path / 'out'
    study(out, 1).carry_out(1, print)
    other = study(out, 1, test=('--fast',))
    assert other.records() == []
    stock = out / 'runs/stock-s0'
    (stock / 'result.json').write_text('{"seed": 0, "x": 5}')
    other.job = lambda run: Job(str(run), run.folder, [lambda: ['fail', str(run.folder)]])  # type: ignore[method-assign]
    assert len(other.carry_out(1, print)) == 2
    assert not (stock / 'result.json').exists(), 'else it would be taken for one of the new words'
    again = study(out, 1, test=('--fast',))
    assert again.carry_out(1, print) == []
    assert ran(stock)[-1][:2] == ['test', '--fast']
    assert len(again.records()) == 2
    both = study(out, 1, test=('--fast',))
    both.kind.tests_as_it_trains = True  # type: ignore[misc]
    with pytest.raises(AsrError, match='was made from another config, other data or options'):
        both.carry_out(1, print)


def test_a_run_whose_numbers_cannot_be_read_says_why(tmp_path: Path) -> None:
    other = study(tmp_path / 'out', 1)
    read = other.kind.read

    def refuse(folder: Path) -> Record:
        if 'asr' in folder.name and (folder / 'result.json').exists():
            raise DataError(f'{folder}: has no AP')
        return read(folder)

    other.kind.read = refuse  # type: ignore[method-assign]
    [failed] = other.carry_out(1, print)
    assert failed.error == f'{tmp_path / "out/runs/asr-se-s0"}: has no AP'


def test_runs_of_something_else_are_not_taken(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    study(out, 1).carry_out(1, print)
    with pytest.raises(AsrError, match='stock-s0: was made from another config, other data or options'):
        study(out, 1, options=('max_train_steps=5',)).carry_out(1, print)
    (out / 'runs/stock-s0' / NOTE).write_text('[')
    with pytest.raises(AsrError, match='stock-s0: was made from another config'):
        study(out, 1).carry_out(1, print)
    (out / 'runs/stock-s0' / NOTE).unlink()
    with pytest.raises(AsrError, match='stock-s0: is there, but not of an ablation'):
        study(out, 1).carry_out(1, print)


def test_a_run_of_another_seed_or_without_its_fold_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    study(out, 1).carry_out(1, print)
    result = out / 'runs/asr-se-s0/result.json'
    result.write_text('{"seed": 4, "x": 2}')
    with pytest.raises(DataError, match='was trained with seed 4'):
        study(out, 1).records()
    kind = Numbers()
    kind.read = lambda folder: Record(folder.name, 0, {'x': 1.0})  # type: ignore[method-assign]
    other = study(out, 1)
    other.kind = kind
    assert [record.arm for record in other.records()] == ['stock'], 'the arm that folds was not folded'
