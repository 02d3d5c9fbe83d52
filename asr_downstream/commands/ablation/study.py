"""An ablation: the runs that it wants, those that are there, and the trainings of the others.

Each arm has a config that inherits from the one that was given, in ``OUT/configs``, and each run a folder in
``OUT/runs``, with a note of what it was made from. A run that has its final numbers is not made again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from asr_downstream.commands.ablation.arms import Arm
from asr_downstream.commands.ablation.kinds import Kind, kind_of_config, kind_of_folder
from asr_downstream.commands.ablation.kinds.base import Plan, Run
from asr_downstream.commands.ablation.kinds.detection import read_lines
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.schedule import Job, run_jobs
from asr_downstream.errors import AsrError, DataError
from asr_downstream.files.atomic import check_writable, read_json, write_atomically, write_json
from asr_downstream.files.configs import override, plain, read_config
from asr_downstream.files.locks import occupied
from asr_downstream.files.ready import FOLDERS, find_config

__all__ = ['Study', 'open_config', 'pretrained', 'read_stored']

NOTE = 'arm.json'


def open_config(given: Path) -> tuple[Path, Kind]:
    """Find a config, by path or by name, and its kind.

    Raises:
        AsrError: it is not there, of no kind that can be compared, or has a plug already.
    """
    errors = []
    for folder in FOLDERS:
        try:
            path = find_config(given, folder)
        except AsrError as error:
            errors.append(error)
            continue
        config = read_config(path, folder)
        kind = kind_of_config(config, path)
        if kind.plug_of(config) is not None:
            raise AsrError(f'{path}: has a plug; give the stock config, the arms put theirs into it')
        return path, kind
    raise errors[0]


def pretrained(plan: Plan, kind: Kind) -> str | None:
    """What the trainings start from, if not from scratch.

    Raises:
        AsrError: their numbers could not be read.
    """
    config = read_config(plan.config, kind.folder)
    override(config, plan.overrides, plan.config)
    kind.check(config, plan.config)
    return kind.pretrained(config)


class Study:
    """An ablation.

    Args:
        plan: what is the same for all runs.
        kind: of the config.
        arms: name -> arm.
        seeds: of the trainings.
    """

    def __init__(self, plan: Plan, kind: Kind, arms: Mapping[str, Arm], seeds: Sequence[int]) -> None:
        self.plan = plan
        self.kind = kind
        self.arms = arms
        # seed by seed, so that what can be compared is there early
        self.runs = [Run(plan, name, arm, seed) for seed in seeds for name, arm in arms.items()]
        self.config = read_config(plan.config, kind.folder)

    def carry_out(self, side_by_side: int, say: Callable[[str], None] = print) -> list[Job]:
        """Train, fold and evaluate what is not there.

        Args:
            side_by_side: how many runs at once.
            say: takes lines about them.

        Returns:
            Those that failed.

        Raises:
            AsrError: the folder cannot be written, is in use, or has runs of something else.
            Stopped: the program was told to stop; called again, it goes on.
        """
        check_writable(self.plan.out)
        with occupied(self.plan.out):
            for run in self.runs:
                self.check_note(run)
            missing = [run for run in self.runs if self.found(run) is None]
            if there := len(self.runs) - len(missing):
                say(f'{there} of {len(self.runs)} runs are there')
            if not missing:
                return []
            for run in missing:
                if self.noted(run).get('measured') != self.note(run)['measured']:
                    (run.folder / self.kind.result).unlink(missing_ok=True)  # it was measured in another way
                write_atomically(run.config, partial(Path.write_text, data=self.text(run)))
                write_json(run.folder / NOTE, self.note(run))
            self.kind.prepare(self.plan)
            jobs = [self.job(run) for run in missing]
            run_jobs(jobs, side_by_side, say)
            for run, job in zip(missing, jobs, strict=True):
                job.error = job.error or self.lacking(run)
            return [job for job in jobs if job.error]

    def rehearse(self, say: Callable[[str], None] = print) -> None:
        """Let each arm print the plan of its next training; nothing is trained, and nothing written to the folder.

        Raises:
            AsrError: an arm does not fit the model, its data are not there, or the folder has runs of something else.
        """
        for run in self.runs:
            self.check_note(run)
        missing = [run for run in self.runs if self.found(run) is None]
        first = {run.name: run for run in reversed(missing)}
        refused = []
        with tempfile.TemporaryDirectory(prefix='ablate-') as folder:
            for name, arm in self.arms.items():
                say(f'\n{arm.label}: {arm.line}')
                if name not in first:
                    say('all its runs are there')
                    continue
                config = Path(folder) / f'{name}.py'
                config.write_text(self.text(first[name]), encoding='utf-8')
                words = [
                    str(config) if word == str(first[name].config) else word for word in self.kind.train(first[name])
                ]
                command = [sys.executable, '-m', 'asr_downstream', *words, '--dry-run']
                if subprocess.run(command, check=False).returncode:
                    refused.append(arm.label)
        say(f'\n{len(missing)} of {len(self.runs)} runs to train, {len(self.arms)} arms')
        if refused:
            raise AsrError(f'{", ".join(refused)}: would fail, for what is said above')

    def text(self, run: Run) -> str:
        """Text of the config of a run."""
        return self.kind.text(self.plan.config, self.config, run.arm)

    def job(self, run: Run) -> Job:
        """Commands of a run."""
        return Job(str(run), run.folder, self.kind.steps(run), self.plan.threads)

    def found(self, run: Run) -> Record | None:
        """What is known of a run; None: it has not come to its end.

        Raises:
            DataError: its seed is another.
        """
        if self.lacking(run):
            return None
        record = self.kind.read(run.folder)
        if record.seed != run.seed:
            raise DataError(f'{run.folder}: was trained with seed {record.seed}; delete it, or choose another --out')
        return replace(record, arm=run.name)

    def lacking(self, run: Run) -> str | None:
        """Why a run does not count as complete; None: it is."""
        if self.noted(run).get('measured') != self.note(run)['measured']:
            return 'was measured in another way'
        try:
            record = self.kind.read(run.folder)
        except AsrError as error:
            return str(error)
        return 'its folded model was not measured' if run.folding and record.folded is None else None

    def records(self) -> list[Record]:
        """What is known of all runs that are complete."""
        return [record for run in self.runs if (record := self.found(run)) is not None]

    def note(self, run: Run) -> dict[str, Any]:
        """What a run is made from."""
        plan = self.plan
        measured = [plan.test, plan.calibrate if 'calibrated' in run.folding else None]
        made_of = [repr(plain(self.config.to_dict())), run.arm.plug, str(plan.data), plan.options]
        if self.kind.tests_as_it_trains:
            made_of += measured
        return {
            'arm': run.name,
            'label': run.arm.label,
            'plug': run.arm.plug,
            'seed': run.seed,
            'config': str(plan.config),
            'made_of': hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
            'measured': hashlib.sha256(json.dumps(measured).encode()).hexdigest(),
        }

    def noted(self, run: Run) -> dict[str, Any]:
        """What was noted when a run began, or nothing."""
        try:
            found = read_json(run.folder / NOTE)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def check_note(self, run: Run) -> None:
        """Refuse to take a run of other data, options or configs for one of this ablation.

        Raises:
            AsrError: it is one.
        """
        if not (run.folder / NOTE).exists():
            if any(run.folder.glob('*')):
                raise AsrError(f'{run.folder}: is there, but not of an ablation; choose another --out')
            return
        if self.noted(run).get('made_of') != self.note(run)['made_of']:
            raise AsrError(
                f'{run.folder}: was made from another config, other data or options; delete it, or choose another --out'
            )


def read_stored(paths: Sequence[Path]) -> tuple[Kind, list[Record]]:
    """Read runs that are there: files of `results-det`, folders of runs, folders of such folders.

    Raises:
        AsrError: there is none, one cannot be read, or they are of several kinds.
    """
    from asr_downstream.commands.ablation.kinds import KINDS

    files = [path for path in paths if path.is_file()]
    found: list[tuple[Kind, Record]] = [(KINDS['detection'], record) for record in read_lines(*files)]
    for path in [path for path in paths if not path.is_file()]:
        folders = [path] if kind_of_folder(path) else sorted(p for p in path.glob('*') if p.is_dir())
        folders = folders if any(map(kind_of_folder, folders)) else sorted(path.glob('runs/*'))
        read = [(kind, named(folder, kind.read(folder))) for folder in folders if (kind := kind_of_folder(folder))]
        if not read:
            raise DataError(f'{path}: has no runs; give folders of trained and evaluated runs, or of these')
        found += read
    kinds = list(dict.fromkeys(kind.name for kind, _ in found))
    if len(kinds) > 1:
        raise DataError(f'runs of {" and ".join(kinds)} have no metric in common; compare one kind at a time')
    return found[0][0], [record for _, record in found]


def named(folder: Path, record: Record) -> Record:
    """Give a run the arm that an ablation has noted with it."""
    try:
        note = read_json(folder / NOTE)
    except (OSError, ValueError):
        return record
    arm = note.get('arm') if isinstance(note, dict) else None
    return replace(record, arm=arm) if isinstance(arm, str) else record
