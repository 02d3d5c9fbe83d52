"""Own and shared attentions through one interface, and recurrent ones that normalise: each site with its own norms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.shared import ASR_DIA, DIA, Net, images, plugged
from torch import Tensor, nn

from asr_downstream import ATTENTIONS, fold, plug, verify
from asr_downstream.attention import DIALSTM
from asr_downstream.plugging.gating.gates import Gate

SE = dict(type='SE', reduction=4)


class Normalised(DIALSTM):
    """The recurrent unit on a normalised descriptor."""

    def __init__(self, channels: int, norm: str = 'LayerNorm') -> None:
        super().__init__(channels)
        self.norm = getattr(nn, norm)(channels)

    def step(self, y: Tensor, state: Any = None) -> Any:
        return super().step(self.norm(y), state)


@pytest.fixture(autouse=True)
def normalised() -> Iterator[None]:
    ATTENTIONS.register_module(module=Normalised)
    yield
    ATTENTIONS.module_dict.pop('Normalised')


def gates_of(model: nn.Module) -> list[Gate]:
    return [m for m in model.modules() if isinstance(m, Gate)]


def test_a_run_is_folded_with_the_norms_of_each_of_its_sites() -> None:
    model = plugged(dict(type='ASR', attention=dict(type='Normalised')), training=False)
    own = [gate.attention.own['norm'].weight for gate in gates_of(model)]
    assert not torch.equal(own[0], own[1])
    folded, _ = fold(model)
    assert verify(folded, model, images()).relative < 1e-12
    assert verify(fold(copy.deepcopy(model))[0], folded, images()).absolute == 0


def test_a_start_that_is_preserved_teaches_no_norm_of_another_site() -> None:
    model = Net().double()
    spec = dict(type='DIA', attention=dict(type='Normalised', norm='BatchNorm1d'), preserve=True)
    plug(model.train(), spec)
    norms = [gate.attention.own['norm'] for gate in gates_of(model)]
    assert all(norm.training and norm.num_batches_tracked == 0 for norm in norms)


def test_a_run_asks_for_learned_inputs_that_were_put_in_the_place_of_others() -> None:
    model, other = plugged(ASR_DIA, training=False), plugged(ASR_DIA, training=False)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    psi = [gate.psi for gate in gates_of(model)]
    assert all(torch.equal(a, gate.psi) for a, gate in zip(psi, gates_of(other), strict=True))
    assert verify(fold(model)[0], fold(other)[0], images()).absolute == 0
    assert verify(fold(model)[0], model, images()).relative < 1e-12


@pytest.mark.parametrize(
    ('spec', 'shared', 'recurrent'),
    [
        (dict(type='ASR', attention=SE), False, False),
        (dict(type='ASR', attention=SE, share='stage'), True, False),
        (ASR_DIA, True, True),
        (dict(type='Attention', attention=SE), False, False),
        (dict(type='Attention', attention=dict(type='DIALSTM')), False, False),
        (dict(type='DIA', attention=SE), True, False),
        (DIA, True, True),
    ],
)
def test_own_and_shared_attentions_have_one_interface(spec: Any, shared: bool, recurrent: bool) -> None:
    for gate in gates_of(plugged(spec, training=False)):
        seen = gate.site_attention
        assert type(seen.original).__name__ == spec['attention']['type']
        assert ((seen.unit is not None), seen.recurrent, (seen.place is not None)) == (shared, recurrent, recurrent)
        gates = seen.fresh(images(2).new_ones(1, gate.channels))
        assert gates.shape == (1, gate.channels)
        inside = {id(p) for part in seen.parts() for p in part.parameters()}
        assert {id(p) for p in gate.attention.parameters()} <= inside
