"""Ctrl-C and terminations: exit statuses, and workers that leave stopping to their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from asr_downstream.stopping import Stopped, StopSignal

PROGRAM = """
import os, sys, time
import torch
from functools import partial
from torch.utils.data import DataLoader
from asr_downstream import cli
from asr_downstream.stopping import StopSignal, leave_stopping_to_the_parent

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
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_the_second_signal_interrupts_at_once() -> None:
    with StopSignal() as stopping, pytest.raises(Stopped) as caught:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.is_set
        assert stopping.stopped().status == 143
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert caught.value.status == 130
