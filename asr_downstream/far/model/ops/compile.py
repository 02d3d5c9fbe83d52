"""Compiles the operator into a folder and tries it there: a program of its own, which `build` runs aside."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch
from torch import nn

NAME = 'lstm'
HERE = Path(__file__).resolve().parent
SOURCES = (HERE / 'lstm.cpp', HERE / 'lstm.h')
# Exact arithmetic: no -ffast-math, which would drop NaN.
FLAGS = ('-O3', '-std=c++20', '-march=native' if platform.machine() == 'x86_64' else '-mcpu=native')
OPENMP = '-fopenmp'  # of GCC: torch has its OpenMP loaded, so nothing is linked for it; without it there is one thread


def main(folder: str, gcc: bool) -> None:
    """Compile into ``folder``, load what came of it, and compare it with `torch.nn.LSTM`."""
    from torch.utils.cpp_extension import load

    flags = [*FLAGS, OPENMP] if gcc else [*FLAGS]
    load(NAME, [str(SOURCES[0])], extra_cflags=flags, build_directory=folder, is_python_module=False, verbose=True)
    lstm, x = nn.LSTM(20, 13, batch_first=True, bidirectional=True), torch.randn(3, 9, 20)
    with torch.no_grad():
        [found] = torch.ops.asr_downstream.lstm_heads([x], [*lstm.parameters()], [0, 0], [False, True])
        difference = float((found - lstm(x)[0]).abs().max())
    if not difference < 1e-5:
        sys.exit(f'the compiled operator differs from torch.nn.LSTM by {difference:.1e}')


if __name__ == '__main__':
    main(sys.argv[1], gcc=sys.argv[2] == 'gcc')
