"""Compile the operator that runs the LSTMs of FAR on the CPU.

    asr-downstream build-ops            # once for each torch, Python, processor and compiler; about 20 seconds
    asr-downstream build-ops --again    # even if it is there

Needs a C++ compiler (CXX, or c++) and ninja. The library is kept in ~/.cache/asr-downstream, or in $ASR_CACHE. Without
it everything runs, and models with LSTMs are slower on the CPU; asr_downstream.far.describe(model) says what runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from asr_downstream.console import cli

__all__ = ['main']


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and compile."""
    parser = cli.parser(__doc__, 'build-ops', names)
    parser.add_argument('--again', action='store_true', help='compile it even if it is there')
    args = parser.parse_args(argv)

    from asr_downstream.far.model.ops.build import build

    print(f'the operator of the LSTMs: {build(args.again)}')
