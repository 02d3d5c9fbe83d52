"""What an ablation has to know of a kind of training: its configs, its commands, where its numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from asr_downstream.commands.ablation.arms import Arm, folding_of
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.console import cli
from asr_downstream.errors import AsrError
from asr_downstream.files.configs import plain, without_templates

__all__ = ['Kind', 'Plan', 'Run', 'setting_of']


@dataclass(frozen=True)
class Plan:
    """What is the same for all runs of an ablation.

    Attributes:
        config: of the stock model.
        out: folder of the ablation.
        data: where the data are, instead of what the config says.
        options: words after ``--cfg-options`` of the trainings.
        test: further words for the command that evaluates.
        calibrate: images that gates which depend on the input are averaged over.
        threads: of each training.
    """

    config: Path
    out: Path
    data: Path | None = None
    options: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    calibrate: int = 64
    threads: int = 1

    def given(self, option: str) -> list[str]:
        """Words that say where the data are and what of the config is overridden."""
        data = [] if self.data is None else [option, str(self.data)]
        return [*data, *(['--cfg-options', *self.options] if self.options else [])]

    @property
    def overrides(self) -> dict[str, Any]:
        """What the options say, as the trainings understand them."""
        parser = cli.parser('')
        cli.add_options(parser)
        return parser.parse_args(['--cfg-options', *self.options]).cfg_options if self.options else {}


@dataclass(frozen=True)
class Run:
    """A training that an ablation wants: an arm and a seed.

    Attributes:
        plan: of the ablation.
        name: of the arm.
        arm: its plug.
        seed: of the training.
    """

    plan: Plan
    name: str
    arm: Arm
    seed: int

    @property
    def config(self) -> Path:
        """Config of the arm."""
        return self.plan.out / 'configs' / f'{self.name}.py'

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return self.plan.out / 'runs' / f'{self.name}-s{self.seed}'

    @property
    def folding(self) -> list[str]:
        """Words that let the command that evaluates fold as well."""
        how = folding_of(self.arm.plug)
        if how is None:
            return []
        return ['--fold', how, *(['--calibrate', str(self.plan.calibrate)] if how == 'calibrated' else [])]

    def __str__(self) -> str:
        return f'{self.arm.label}, seed {self.seed}'


class Kind:
    """A kind of training.

    Attributes:
        name: of the kind.
        folder: with its ready configs.
        result: file in the folder of a run that has its numbers.
        metrics: name -> what it is; verdicts are about the first, unless another is asked for.
        tests_as_it_trains: whether one command does both.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    result: ClassVar[str]
    metrics: ClassVar[dict[str, Metric]]
    tests_as_it_trains: ClassVar[bool] = False

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is of this kind."""
        raise NotImplementedError

    def plug_of(self, config: Mapping[str, Any]) -> Any:
        """The plug in a config, or None."""
        return config.get('plug')

    def pretrained(self, config: Mapping[str, Any]) -> str | None:
        """What the trainings start from, if not from scratch."""
        return None

    def check(self, config: Mapping[str, Any], path: Path) -> None:
        """Refuse a config whose trainings would have no numbers to compare.

        Raises:
            AsrError: it is one.
        """

    def keys(self, config: Mapping[str, Any], plug: Any) -> str:
        """Lines of Python that put a plug into a config that inherits from ``config``."""
        return f'plug = {plug!r}\n'

    def text(self, base: Path, config: Mapping[str, Any], arm: Arm) -> str:
        """Text of the config of an arm, which inherits from the one that was given."""
        head = f'# {arm.label}: {arm.line}. An arm of an ablation of {base.name}.\n_base_ = {str(base.resolve())!r}\n'
        return without_templates(head + (self.keys(config, arm.plug) if arm.plug is not None else ''))

    def prepare(self, plan: Plan) -> None:
        """Make what the evaluations of all runs share; may take a while."""

    def train(self, run: Run) -> list[str]:
        """Words of the command that trains a run, or goes on with it."""
        raise NotImplementedError

    def test(self, run: Run) -> list[str]:
        """Words of the command that folds and evaluates a run, which is trained."""
        raise NotImplementedError

    def steps(self, run: Run) -> list[Callable[[], list[str]]]:
        """Commands of a run, each made when its turn has come."""
        return [lambda: self.train(run), lambda: self.test(run)]

    def is_run(self, folder: Path) -> bool:
        """Whether a folder looks like a run of this kind."""
        raise NotImplementedError

    def read(self, folder: Path) -> Record:
        """Read the numbers of a run.

        Raises:
            AsrError: it is not complete, was not evaluated, or is damaged.
        """
        raise NotImplementedError

    def metric(self, name: str | None) -> Metric:
        """What a verdict is about.

        Raises:
            AsrError: there is no such metric.
        """
        found = next(iter(self.metrics.values())) if name is None else self.metrics.get(name)
        if found is None:
            raise AsrError(f'--metric: {name!r} is none of {self.name}; there is {", ".join(self.metrics)}')
        return found


def setting_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What trainings of the engine share, if only their arms differ: the resolved config of a run says it."""
    model = plain(config['model'])
    return {
        'batch': config['train_batch_size'] * config['gradient_accumulation_steps'],
        'learning_rate': config['learning_rate'],
        'resolution': config['data'].get('resolution'),
        'model': ', '.join(f'{key}={value}' for key, value in sorted(model.items())),
    }
