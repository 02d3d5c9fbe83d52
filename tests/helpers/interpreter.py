"""Blocks of code run one set a process, as users run them, without waiting for torch each time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from conftest import ROOT

# A process that has imported what takes long, and computed nothing, since threads do not survive a fork.
SERVER = """
import json, os, sys, tempfile, traceback
import torch, asr_downstream.plugging.plug, asr_downstream.folding.fold
try: import transformers, diffusers
except ImportError: pass
for line in sys.stdin:
    with tempfile.TemporaryFile('w+') as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            code = 0
            try:
                for block in json.loads(line): exec(compile(block, block, 'exec'), {'__name__': '__main__'})
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        print(json.dumps([code, out.read()]), flush=True)
"""


class Interpreter:
    """Runs blocks of code in the root of the checkout; use it in a ``with``."""

    def __enter__(self) -> Interpreter:
        self.process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', SERVER],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exception: Any) -> None:
        self.process.communicate(timeout=60)

    def run(self, blocks: Sequence[str]) -> tuple[int, str]:
        """Run blocks in a process of their own, each with names of its own.

        Returns:
            Its exit status, and what it printed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(list(blocks)) + '\n')
        self.process.stdin.flush()
        code, text = json.loads(self.process.stdout.readline())
        return code, text
