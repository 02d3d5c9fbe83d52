"""What is known of one trained run, whatever it was trained for; arms of runs that were stored without their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from asr_downstream.commands.ablation.arms import ARMS, STOCK
from asr_downstream.errors import DataError

__all__ = ['Record', 'arms_of_names', 'by_arm', 'check_alike', 'numbers_in', 'spread']

# An arm in the name of a config, as in retinanet_r18-w32-asr-se_fpn_bccd: the longest that is there.
TOKEN = re.compile(rf'-({"|".join(sorted(map(re.escape, ARMS), key=len, reverse=True))})(?=[_.]|$)')


@dataclass(frozen=True)
class Record:
    """One run: an arm and a seed.

    Attributes:
        arm: its name.
        seed: of the training.
        trained: name -> number, of the model as it was trained, at the last step.
        folded: the same of the folded model; None: nothing was folded.
        folding: ``'exact'``, ``'calibrated'`` or None.
        setting: what all runs of a comparison share: length, batch, data, how it was measured.
        about: provenance, such as folder, hash and versions.
    """

    arm: str
    seed: int
    trained: dict[str, float]
    folded: dict[str, float] | None = None
    folding: str | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages."""
        return f'{self.about.get("run", self.arm)}, seed {self.seed}'


def numbers_in(found: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a table of metrics, without what is none."""
    return {key: value for key, value in found.items() if type(value) in (int, float)}


def by_arm(records: Iterable[Record], metric: str, folded: bool = False) -> dict[str, dict[int, float]]:
    """Arm -> seed -> value.

    Raises:
        DataError: a run has no such metric, or none that is finite; or two runs are of one arm and seed.
    """
    found: dict[str, dict[int, float]] = {}
    for record in records:
        numbers = record.folded if folded else record.trained
        if numbers is None:
            continue
        value = numbers.get(metric)
        if value is None or not math.isfinite(value):
            has = 'is not finite' if value is not None else f'is missing; there is {", ".join(numbers)}'
            raise DataError(f'{record.name}: {metric} {has}')
        if record.seed in found.setdefault(record.arm, {}):
            raise DataError(f'{record.name}: is there twice; give one run an arm and seed')
        found[record.arm][record.seed] = value
    return {arm: dict(sorted(seeds.items())) for arm, seeds in found.items()}


def check_alike(records: Sequence[Record]) -> None:
    """Refuse to compare runs of different lengths, data or measurements.

    Raises:
        DataError: see above.
    """
    first = records[0]
    for record in records[1:]:
        for key in first.setting.keys() & record.setting.keys():
            if record.setting[key] != first.setting[key]:
                raise DataError(
                    f'{record.name}: {key} is {record.setting[key]}, but {first.setting[key]} in {first.name}; '
                    f'differences of such runs are no differences of arms'
                )


def arms_of_names(names: Iterable[str]) -> dict[str, str]:
    """Find the arms in names of configs: ``r18-asr-se_bccd`` is ``asr-se`` beside ``r18_bccd``, which is stock.

    A name that is that of an arm, as configs of an ablation have, is that arm. The others without their arms have to be
    one name; one that is another is an arm of its own, by its whole name.
    """
    names = list(names)
    parts = {
        name: (TOKEN.sub('', name, count=1), found[1] if (found := TOKEN.search(name)) else STOCK)
        for name in names
        if name not in ARMS
    }
    bases = [base for base, _ in parts.values()]
    common = max(dict.fromkeys(bases), key=bases.count, default='')
    found_in = {name: arm if base == common else name for name, (base, arm) in parts.items()}
    return {name: found_in.get(name, name) for name in names}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation if there are several."""
    return mean(values), stdev(values) if len(values) > 1 else None
