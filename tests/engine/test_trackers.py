"""Services that a training logs to besides its own log."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.engine import run_of
from PIL import Image

from asr_downstream.engine.trackers import Reporter
from asr_downstream.errors import AsrError


class Service(ModuleType):
    """The calls of wandb and trackio, written down."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> Service:
        self.begun.append(settings)
        return self

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, image: Image.Image) -> tuple[str, Any]:
        return 'picture', image.size


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_service_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AsrError, match=f'report_to: {name} is not installed .*pip install {name}, or leave it out'):
        run_of(tmp_path, report_to=[name])


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_service_gets_numbers_and_pictures_and_a_resumed_run_goes_on_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setenv(f'{name.upper()}_PROJECT', 'mine')
    _, last = run_of(tmp_path / 'run', report_to=[name], learning_rate=0.02)
    assert [step for step, _ in service.logged] == [1, 2, 3, 4, 5, 6]
    assert {'loss', 'lr'} <= service.logged[0][1].keys()
    assert service.finished == 1
    last.rename(tmp_path / 'gone')
    run_of(tmp_path / 'run', 'latest', report_to=[name], learning_rate=0.02)
    run_of(tmp_path / 'other/run', report_to=[name])
    first, resumed, other = service.begun
    known = {'wandb': 'id', 'trackio': 'name'}[name]
    assert first == resumed
    assert first[known] != other[known]
    assert (first['project'], first['resume'], first['config']['learning_rate']) == ('mine', 'allow', 0.02)
    reporter = Reporter(tmp_path / 'run', 6, 6, 8, [name], {})
    reporter.picture(7, Image.new('RGB', (3, 2)))
    reporter.close()
    assert service.logged[-1] == (7, {'samples': ('picture', (3, 2))})
