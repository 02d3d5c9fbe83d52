"""How the gates of sites that share an attention are computed together, see `asr_downstream.plugging.bank.hooks`.

There is nothing to stack but the learned inputs. Without a state they are a batch. With one (DIA's LSTM) they are a
sequence, and the whole run is computed before its first site: the gates depend on no feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.attention.base import said_with
from asr_downstream.plugging.bank.alike import TOLERANCE, Form, bare
from asr_downstream.plugging.gating.gates import ConstantGate
from asr_downstream.plugging.gating.site_attention import Member

__all__ = ['SharedForm', 'shared_form']


class SharedForm(Form):
    """The gates of sites of one unit.

    Args:
        member: of one of the sites.
    """

    def __init__(self, member: Member) -> None:
        self.names = []
        self.unit = member.unit
        self.run = member.run
        self.chained = member.recurrent

    def shared(self) -> list[Any]:
        return list(self.unit.parameters())

    def modules(self) -> list[nn.Module]:
        return list(self.unit.modules())

    def watched(self) -> bool:
        return bool(self.unit.slot.watchers)

    def covers(self, gates: list[ConstantGate]) -> bool:
        return not self.chained or [gate.attention for gate in gates] == self.run.members

    def __call__(self, gates: list[ConstantGate], parameters: dict[str, Tensor], psi: Tensor | None) -> Tensor:
        assert psi is not None
        attention: Any = self.unit.attention
        if not self.chained:
            return attention(psi.squeeze(1))
        return sequence(attention, psi).to(psi.dtype)  # the state is float32 where weights are in half precision


def sequence(attention: Any, psi: Tensor) -> Tensor:
    """Run a recurrent attention along learned inputs ``(sites, 1, C)``; returns the gates ``(sites, C)``."""
    found = []
    state = None
    if said_with('step', attention, 'drive') is None:
        for x in psi.unbind():
            gates, state = attention.step(x, state)
            found.append(gates)
    else:
        for drive in attention.drive(psi.squeeze(1)).split(1):
            gates, state = attention.advance(drive, state)
            found.append(gates)
    return torch.cat(found)


def shared_form(gate: ConstantGate) -> Form | None:
    """How the gates of the sites that share this one's attention are computed together; None: each by itself."""
    member = gate.site_attention
    if not isinstance(member, Member) or member.unit.norms or any(True for _ in member.unit.buffers()):
        return None
    if gate.psi is None:
        return None
    try:
        return SharedForm(member) if member.recurrent or batches(member.unit.attention, gate.channels) else None
    except Exception:  # whatever an attention does that a batch cannot
        return None


def batches(attention: nn.Module, channels: int) -> bool:
    """Whether an attention gives a batch of inputs what it gives each; tried in float64 and in both modes."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        tried = bare(attention, 'cpu').double()
        for parameter in tried.parameters():
            parameter.normal_(generator=generator)
        psi = torch.randn(3, channels, dtype=torch.float64, generator=generator)
        results = [found for mode in (True, False) for found in both(tried.train(mode), psi)]
    return all(torch.allclose(r, results[0], TOLERANCE, TOLERANCE) for r in results)


def both(attention: nn.Module, psi: Tensor) -> list[Tensor]:
    """Gates of the inputs as a batch, and one by one."""
    return [attention(psi), torch.cat([attention(x) for x in psi.split(1)])]
