"""Work that processes share: results in the order of one process, and a failure that all of them end with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.errors import DataError

PROGRAM = """
import torch.distributed as dist

from asr_downstream.console import cli
from asr_downstream.console.processes import Processes, end_processes
from asr_downstream.errors import DataError


def main(argv):
    dist.init_process_group('gloo')
    processes, items, done = Processes.of_launch(), list(range(7)), []

    def square(item, bad=None):
        done.append(item)
        if item == bad:
            raise DataError(f'item {item} is bad')
        return item * item

    def share(bad=None):
        return processes.shared(lambda item: square(item, bad), processes.own(items), len(items), 'squares', every=2)

    found = share()
    total = processes.first(lambda: sum(found))
    print(f'process {processes.index} did {done} has {found} knows {total}', flush=True)
    processes.together(lambda: share(bad=3))


cli.run(main)
"""


def test_processes_share_items_and_a_failure_ends_all(tmp_path: Path) -> None:
    (tmp_path / 'program.py').write_text(PROGRAM)
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'program.py']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    squares = [0, 1, 4, 9, 16, 25, 36]
    assert f'process 0 did [0, 2, 4, 6] has {squares} knows {sum(squares)}' in done.stdout, done.stderr
    assert f'process 1 did [1, 3, 5] has [] knows {sum(squares)}' in done.stdout
    assert done.stdout.count('squares ...') == 2  # the first process says it, once a share
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith('error: ')] == ['error: item 3 is bad']
    assert 'root cause' in done.stderr.lower() or 'exitcode' in done.stderr.lower()


def test_one_process_does_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert Processes.of_launch() is ALONE
    assert ALONE.shared(abs, ALONE.own([-1, -2, -3]), 3, 'absolute') == [1, 2, 3]
    assert capsys.readouterr().out == 'absolute ...\n'
    with pytest.raises(DataError, match='as it is'):
        ALONE.together(fail)


def fail() -> None:
    raise DataError('as it is')


@pytest.mark.parametrize('count', [1, 2, 3, 8])
def test_parts_are_all_and_no_item_is_in_two(count: int) -> None:
    items = list(range(7))
    parts = [Processes(index, count).own(items) for index in range(count)]
    assert sorted(item for part in parts for item in part) == items
