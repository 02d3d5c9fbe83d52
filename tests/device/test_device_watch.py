"""What a training looks at every step, on a device: it waits for nothing and misses nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('accelerate')

from accelerate import Accelerator

from asr_downstream import AsrError
from asr_downstream.engine.watch import Watch


def test_a_divergence_is_heard_at_the_next_step_at_the_latest(device: torch.device) -> None:
    watch = Watch(Accelerator(cpu=device.type == 'cpu'))
    watch.tell(1, torch.tensor(1.0, device=device), torch.tensor(2.0, device=device), stop=False)
    assert not watch.heard()
    watch.tell(2, torch.tensor(float('nan'), device=device), None, stop=False)
    if device.type == 'cuda':
        assert not watch.heard()  # on its way
        watch.tell(3, torch.tensor(1.0, device=device), None, stop=False)
    with pytest.raises(AsrError, match='step 2: the loss is nan'):
        watch.heard()


def test_before_a_checkpoint_everything_is_read(device: torch.device) -> None:
    watch = Watch(Accelerator(cpu=device.type == 'cpu'))
    watch.tell(1, torch.tensor(1.0, device=device), torch.tensor(float('inf'), device=device), stop=True)
    with pytest.raises(AsrError, match='step 1: the norm of the gradients is inf'):
        watch.heard(at_once=True)
    watch.tell(2, torch.tensor(1.0, device=device), None, stop=True)
    assert watch.heard(at_once=True)
