"""LSTMs in the place of attention on a device: every way to run them gives what a loop gives."""

from __future__ import annotations

import pytest
import torch

from asr_downstream.far.model.backends import EXECUTIONS
from asr_downstream.far.model.lstm import MultiHeadLSTM

WIDTHS = [(8, 8), (5, 8), (8, 0)]


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('execution', [*EXECUTIONS, 'auto'])
def test_every_execution_gives_what_the_loop_on_the_cpu_gives(
    execution: str, training: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    expected = MultiHeadLSTM(24, 3, execution='loop', widths=WIDTHS).double()
    found = MultiHeadLSTM(24, 3, execution=execution, widths=WIDTHS).double()
    found.load_state_dict(expected.state_dict())
    found.to(device)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        y, other = expected(x), found(x.to(device))
    assert other.device.type == device.type
    assert torch.allclose(other.cpu(), y, 1e-9, 1e-9)
    if training:
        y.square().mean().backward()
        other.square().mean().backward()
        for (name, p), q in zip(expected.named_parameters(), found.parameters(), strict=True):
            assert p.grad is not None, name
            assert torch.allclose(q.grad.cpu(), p.grad, 1e-9, 1e-9), name
