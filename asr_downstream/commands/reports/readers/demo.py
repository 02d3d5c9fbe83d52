"""The demo: ``summary.json`` of its parts, their pictures and the logs of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, text_of
from asr_downstream.commands.reports.page import Picture, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import Reader, config_facts, training_chart, version_facts
from asr_downstream.commands.reports.readers.detection import detection_rows
from asr_downstream.commands.reports.readers.far import family_section

__all__ = ['Demo']

FILE = 'summary.json'
PICTURES = {
    'detections.png': 'Detections: the truth, unfolded, folded',
    'samples.png': 'Samples: real images, unfolded, folded',
}
DIFFUSION = {'fid': 'FID, own encoder', 'kid': 'KID, own encoder', 'parameters': 'parameters', 'gmacs': 'GMACs'}


class Demo(Reader):
    """A part of the demo. The parts lie in one another, so what is below is looked at as well."""

    together = False
    whole = False

    def matches(self, folder: Path) -> bool:
        return isinstance(json_of(folder / FILE).get('checks'), dict)

    def read(self, folders: Sequence[Path]) -> Section:
        [folder] = folders
        found = json_of(folder / FILE)
        arms = {n: a for n, a in (found.get('arms') or {}).items() if isinstance(a, dict)}
        if isinstance(found.get('models'), dict):
            section = family_section(folder, found, 'FAR: attention replaced by LSTMs')
        elif any('AP' in arm for arm in arms.values()):
            section = Section('Detection: three detectors of one seed', tables=detection_rows(arms))
        else:
            shown = [key for key in DIFFUSION if any(is_number(arm.get(key)) for arm in arms.values())]
            columns = [aligned([arm.get(key) for arm in arms.values()]) for key in shown]
            rows = list(zip(arms, *columns, strict=True))
            note = f'{text_of(found.get("images"))} images, {text_of(found.get("inference_steps"))} steps of DDIM.'
            section = Section(
                'Diffusion: two UNets of one seed',
                tables=[Table('What was measured', ['arm', *(DIFFUSION[key] for key in shown)], rows, note)],
            )
        section.verdicts = [*checks(found['checks']), *section.verdicts, *differences(found)]
        runs = self.runs(folder)
        section.charts = section.charts or training_chart(runs)
        section.pictures += [
            Picture(folder / name, caption, wide=True)
            for name, caption in PICTURES.items()
            if (folder / name).is_file()
        ]
        known = section.facts or [('folder', str(folder))]  # a family has the facts of its stages
        section.facts = list(dict.fromkeys([*known, *facts(found, [] if section.facts else runs)]))
        return section

    def runs(self, folder: Path) -> list[Path]:
        """Folders of the trainings of a part."""
        return sorted(p for p in folder.glob('*') if p.is_dir() and not self.matches(p) and any(p.glob('*.py')))


def checks(found: dict[str, Any]) -> list[Verdict]:
    """What the part has checked, in words."""
    failed = [words(name) for name, held in found.items() if not held]
    if failed:
        return [Verdict(f'Does not hold: {"; ".join(failed)}.', 'bad')]
    return [Verdict(f'Holds: {"; ".join(map(words, found))}.', 'good')]


def differences(found: dict[str, Any]) -> list[Verdict]:
    """How far the folded model is from the unfolded one."""
    boxes, grey = found.get('folded_against_unfolded'), found.get('largest_pixel_difference')
    said = []
    if isinstance(boxes, dict):
        said.append(
            f'Folded against unfolded: boxes differ by at most {text_of(boxes.get("boxes_px"))} px, scores by '
            f'{text_of(boxes.get("scores"))}, on {text_of(boxes.get("images"))} pictures.'
        )
    if is_number(grey):
        said.append(f'Folded against unfolded: grey levels differ by at most {text_of(grey)} of 255.')
    return [Verdict(text) for text in said]


def words(name: str) -> str:
    """Name of a check as words."""
    return name.replace('_', ' ')


def facts(found: dict[str, Any], runs: Sequence[Path]) -> list[tuple[str, str]]:
    """Provenance of a part."""
    labels = {
        'command': 'command',
        'seed': 'seed',
        'training_seconds': 'seconds of training',
        'wall_seconds': 'seconds',
    }
    about = [(label, text_of(found[key])) for key, label in labels.items() if key in found]
    for run in runs:
        said = ', '.join(f'{key} {value}' for key, value in config_facts(run))
        about.append((run.name, said))
    return [*about, *version_facts(found.get('versions'))]
