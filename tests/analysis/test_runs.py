"""Which kind of run a folder is, and what runs are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr_downstream import AsrError
from asr_downstream.errors import CheckpointError
from asr_downstream.folding.analysis.runs import MARKS, OpenRun, Wanted, kind_of, names_of, open_run
from asr_downstream.registry import RUNS


def test_the_files_tell_the_kind(tmp_path: Path) -> None:
    for name, files in {
        'detection': {'epoch_1.pth': '', 'last_checkpoint': 'epoch_1.pth', 'x.py': ''},
        'diffusion': {'config.py': 'model = 1\nnoise_scheduler = dict()\n', 'checkpoint-1/model.safetensors': ''},
        'classification': {'config.py': 'model = 1\n', 'checkpoint-1/model.safetensors': ''},
        'far': {'shipped/teacher/far.json': '{}', 'distill/config.py': ''},
    }.items():
        folder = tmp_path / name
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        assert kind_of(folder) == name
        for inside in folder.glob('checkpoint-*'):
            assert kind_of(inside) == name
    assert kind_of(tmp_path / 'detection' / 'epoch_1.pth') == 'detection'
    assert {kind for kind, *_ in MARKS} == {'detection', 'diffusion', 'classification', 'far'}
    for wrong in (tmp_path, tmp_path / 'detection' / 'x.py'):
        with pytest.raises(CheckpointError, match='is no run that is known'):
            kind_of(wrong)
    with pytest.raises(CheckpointError, match='no such run'):
        open_run(tmp_path / 'nothing', Wanted())


def test_a_kind_can_be_registered(tmp_path: Path) -> None:
    (tmp_path / 'x.pth').write_text('')
    seen = []

    @RUNS.register_module(name='mine')
    def open_mine(path: Path, wanted: Wanted) -> OpenRun:
        seen.append((path, wanted.images))
        return 'opened'  # type: ignore[return-value]

    try:
        assert open_run(tmp_path, Wanted(images=3), 'mine') == 'opened'
        assert seen == [(tmp_path, 3)]
        with pytest.raises(AsrError, match="no runs of kind 'mime' are known; did you mean 'mine'"):
            open_run(tmp_path, Wanted(), 'mime')
    finally:
        del RUNS._module_dict['mine']


def test_runs_are_called_by_their_folders(tmp_path: Path) -> None:
    for name in ('a/run', 'b/run', 'b/other', 'x=y'):
        (tmp_path / name).mkdir(parents=True)
    at = lambda name: str(tmp_path / name)  # noqa: E731
    assert list(names_of([at('a/run'), at('b/other')])) == ['run', 'other']
    assert list(names_of([at('a/run'), at('b/run')])) == ['a/run', 'b/run']
    assert names_of([f'SE={at("a/run")}']) == {'SE': tmp_path / 'a/run'}
    assert list(names_of([at('x=y')])) == ['x=y']  # a path that is there is no name
    for twice in ([at('a/run'), at('a/../a/run')], [f'n={at("a/run")}', f'n={at("b/run")}']):
        with pytest.raises(AsrError, match='twice|one name'):
            names_of(twice)
