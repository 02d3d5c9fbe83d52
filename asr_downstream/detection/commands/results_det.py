"""Gather trained and tested detectors in one table: mean and spread over the seeds.

    for s in 0 1 2; do
      asr-downstream train-det CONFIG --work-dir runs/NAME-s$s --seed $s
      asr-downstream test-det CONFIG runs/NAME-s$s/epoch_12.pth --fold --work-dir runs/NAME-s$s
    done
    asr-downstream results-det runs/* --out results.jsonl

Numbers are those of the last epoch. A run that is not complete, or was tested at another epoch, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, read the runs, print the table, write the records."""
    parser = cli.parser(__doc__, 'results-det', names)
    parser.add_argument('runs', type=Path, nargs='+', help='work dirs of asr-downstream train-det')
    parser.add_argument('--out', type=Path, help='JSON lines to write, one a run')
    args = parser.parse_args(argv)

    from asr_downstream.detection.evaluation.results import markdown, read_run, write_jsonl
    from asr_downstream.files.atomic import check_could_write

    if args.out:
        check_could_write(args.out.parent)
    records = [read_run(run) for run in args.runs]
    print(markdown(records))
    if args.out:
        write_jsonl(args.out, records)
