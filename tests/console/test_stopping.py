"""Ctrl-C and terminations: exit statuses, and workers that leave stopping to their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from asr_downstream.console.stopping import Stopped, StopSignal

PROGRAM = """
import os, sys, time
import torch
from functools import partial
from torch.utils.data import DataLoader
from asr_downstream.console import cli
from asr_downstream.console.stopping import StopSignal, leave_stopping_to_the_parent

def main(argv):
    loader = DataLoader(range(10_000), num_workers=1, worker_init_fn=leave_stopping_to_the_parent)
    with StopSignal() as stopping:
        for item in loader:
            if item == 3:
                print('ready', flush=True)
            time.sleep(0.02)
            if stopping.is_set and item > 20:
                print('saved', flush=True)
                raise stopping.stopped()
cli.run(main)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ('number', 'status'), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_group_spares_the_workers(number: signal.Signals, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == 'ready\n'
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert out.endswith('saved\n')
    assert 'Traceback' not in err


PERSISTENT = """
from torch.utils.data import DataLoader
from asr_downstream.console.stopping import leave_stopping_to_the_parent

loader = DataLoader(
    range(8), num_workers=1, persistent_workers=True, worker_init_fn=leave_stopping_to_the_parent
)
print(sum(len(batch) for batch in loader), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_persistent_workers_end_with_their_parent() -> None:
    """At its exit a program terminates them once, and waits."""
    done = subprocess.run(
        [sys.executable, '-c', PERSISTENT], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, '8\n'), done.stderr


def test_the_second_signal_interrupts_at_once() -> None:
    with StopSignal() as stopping, pytest.raises(Stopped) as caught:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.is_set
        assert stopping.stopped().status == 143
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert caught.value.status == 130


def test_a_termination_that_is_passed_on_once_more_changes_nothing() -> None:
    with StopSignal() as stopping:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert stopping.stopped().status == 143


HUNG = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from asr_downstream.console.stopping import leave_stopping_to_the_parent

class Items:
    def __len__(self): return 9
    def __getitem__(self, i):
        if i == 1:
            print(os.getpid(), flush=True)
            time.sleep(1000)
        return i

loader = iter(DataLoader(Items(), num_workers=1, worker_init_fn=leave_stopping_to_the_parent))
next(loader)
print('ready', flush=True)
time.sleep(2)
"""


@pytest.mark.timeout(120)
def test_a_worker_that_hangs_obeys_its_parent_alone() -> None:
    process = subprocess.Popen([sys.executable, '-c', HUNG], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = sorted(process.stdout.readline().strip() for _ in range(2))
    assert lines[1] == 'ready'
    worker = int(lines[0])
    for _ in range(3):
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(worker, 0)  # it lives
    process.wait(60)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_signal_is_noted_when_nobody_reads_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: int, text: bytes) -> int:
        raise BrokenPipeError

    with StopSignal() as stopping:
        monkeypatch.setattr(os, 'write', write)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.is_set


POOLS = """
import sys
from multiprocessing import Pool
from asr_downstream.console.stopping import StopSignal

with StopSignal():
    for round in range(40):
        pool = Pool(4)
        pool.starmap(pow, [(1, 2), (2, 3)])
        pool.close()
        pool.terminate()
        pool.join()
print('done', flush=True)
"""


@pytest.mark.timeout(60)
def test_pools_of_processes_end_inside_the_block() -> None:
    """What metrics compute in parallel: a worker that would not be terminated is waited for, for ever."""
    done = subprocess.run([sys.executable, '-c', POOLS], cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert done.stdout == 'done\n', done.stderr
