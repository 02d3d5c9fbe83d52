"""The bank of constant gates: attentions of users, and what an attention says of many sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.banks import (
    assert_same,
    by_site,
    gated,
    maps,
    plugged,
    served,
    step,
)
from torch import Tensor, nn

from asr_downstream.attention.base import ChannelAttention, pool
from asr_downstream.plugging.bank import hooks as bank
from asr_downstream.registry import ATTENTIONS as REGISTRY


class Scaled(ChannelAttention):
    """An attention of a user: its attribute may change, and its forward draws if it is told to."""

    def __init__(self, channels: int, factor: float = 1.0, drop: float = 0.0) -> None:
        super().__init__(channels)
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(channels))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.weight * pool(x) * self.factor).sigmoid()


@pytest.fixture
def registered() -> Any:
    REGISTRY.register_module(module=Scaled)
    yield
    REGISTRY._module_dict.pop('Scaled')


@pytest.mark.usefixtures('registered')
def test_attentions_of_users() -> None:
    model = plugged(dict(type='ASR', attention=dict(type='Scaled')))
    assert served(model) == set(gated(model))
    assert_same(step(model, maps()), by_site(model, maps()))
    for layer in gated(model):  # as a schedule would
        layer.gate[0].attention.factor = 3.0
    assert_same(step(model, maps()), by_site(model, maps()))
    model.layer1[0].bn2.gate[0].attention.factor = 5.0  # not like the others any more
    assert_same(step(model, maps()), by_site(model, maps()))
    model.layer2[0].bn2.gate[0].attention.drop = nn.Identity()
    assert_same(step(model, maps()), by_site(model, maps()))
    served(model)
    assert len(vars(model)[bank.BANK].plan) == 5


class Wrong(Scaled):
    """What it says of many sites is not what it computes for one."""

    def batched(self, parameters: dict[str, Tensor], psi: Tensor) -> Tensor:
        return (parameters['weight'] * psi.squeeze(1)).sigmoid() * 0.5


class Replaced(Wrong):
    """Its forward is another one than that of the method, which so does not count."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * pool(x)


def test_what_an_attention_says_of_many_sites_is_tried() -> None:
    for kind, count in ((Wrong, 0), (Replaced, 6)):
        REGISTRY.register_module(module=kind)
        try:
            model = plugged(dict(type='ASR', attention=dict(type=kind.__name__)))
        finally:
            REGISTRY._module_dict.pop(kind.__name__)
        assert len(served(model)) == count
        assert_same(step(model, maps()), by_site(model, maps()))


@pytest.mark.usefixtures('registered')
def test_random_attentions_are_left_to_their_sites() -> None:
    model = plugged(dict(type='ASR', attention=dict(type='Scaled', drop=0.5)))
    state = torch.get_rng_state()
    assert served(model.train()) == set()
    assert torch.equal(torch.get_rng_state(), state)
