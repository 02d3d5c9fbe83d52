"""Reading checkpoints: damaged, unsafe and foreign files each get their own line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomise
from helpers.plugged import ASR, tiny
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from asr_downstream import CheckpointError, plug
from asr_downstream.files.atomic import write_atomically
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.plugging.weights import load_state


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_mmengine_checkpoints_are_read_without_trust(tmp_path: Path) -> None:
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': {'loss': buffer}, 'meta': {'epoch': 1}}, path)
    found = read_checkpoint(path)
    assert found['meta'] == {'epoch': 1}
    assert found['message_hub']['loss'].mean() == pytest.approx(1.5)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / 'evil.pth'
    marker = tmp_path / 'was_here'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'hook': Evil(marker)}, path)
    with pytest.raises(CheckpointError, match='--trust'):
        read_checkpoint(path)
    assert not marker.exists()
    read_checkpoint(path, trust=True)
    assert marker.exists()  # negative control: it would have run


def test_getattr_in_a_checkpoint_reaches_log_buffers_only(tmp_path: Path) -> None:
    class Reach:
        def __reduce__(self) -> tuple:
            return (getattr, (torch.Tensor, 'numpy'))

    path = tmp_path / 'reach.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'hook': Reach()}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_trust_reads_what_needs_pickle(tmp_path: Path) -> None:
    path = tmp_path / 'whole.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'path': Path('x')}, path)
    with pytest.raises(CheckpointError, match='--trust'):
        read_checkpoint(path)
    assert read_checkpoint(path, trust=True)['path'] == Path('x')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('keep', [0, 7, 200])
def test_truncated_files(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f'a{suffix}'
    state = {'w': torch.randn(300)}
    torch.save({'state_dict': state}, path) if suffix == '.pth' else save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match='damaged'):
        read_checkpoint(path)


def test_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / 'epoch_9.pth').touch()
    with pytest.raises(CheckpointError, match=r'no such checkpoint; there is epoch_9.pth'):
        read_checkpoint(tmp_path / 'epoch_10.pth')


def test_wrapped_names_are_unwrapped_and_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    assert state_dict_of({'state_dict': {'module.w': torch.ones(1)}}, path).keys() == {'w'}
    with pytest.raises(CheckpointError, match='holds no weights.*epoch'):
        state_dict_of({'epoch': 3}, path)


def test_folded_plugged_and_foreign_checkpoints_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    stock, plugged = tiny(), randomise(tiny())
    plug(plugged, ASR)
    before = {k: v.clone() for k, v in plugged.state_dict().items()}
    with pytest.raises(CheckpointError, match='stock checkpoint, or was folded already'):
        load_state(plugged, stock.state_dict(), path)
    with pytest.raises(CheckpointError, match='has gates.*tools/fold.py'):
        load_state(stock, plugged.state_dict(), path)
    foreign = {f'backbone.{k}': v for k, v in stock.state_dict().items()}
    with pytest.raises(CheckpointError, match='another model.*missing.*unknown'):
        load_state(stock, foreign, path)
    reshaped = {**plugged.state_dict(), 'fc.weight': torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r'1 of another shape \(fc.weight: \(3, 3\)'):
        load_state(plugged, reshaped, path)
    assert all(torch.equal(v, before[k]) for k, v in plugged.state_dict().items())


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / 'report.json'
    path.write_text('old')

    def fail(p: Path) -> None:
        p.write_text('half')
        raise OSError('disk full')

    with pytest.raises(ValueError, match='disk full'):
        write_atomically(path, fail)
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['report.json']
