"""torchrun, which ends with the status of what ended it: ``python -m asr_downstream.console.torchrun``, as torchrun.

After a signal torchrun itself shows a traceback and exits with 1, which a loop over runs takes for a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> None:
    """Launch.

    Raises:
        SystemExit: with 128 + the signal that the launch was told to stop with, or the status of the first process
            that failed.
    """
    try:
        run.run(run.parse_args(argv))
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f'was killed by signal {-code}' if code < 0 else f'ended with status {code}'
        print(f'error: process {rank} of the launch {how}; the others were ended', file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


if __name__ == '__main__':
    main()
