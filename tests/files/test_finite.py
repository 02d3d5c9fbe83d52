"""Weights that are not finite: refused where they are read, by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from asr_downstream.errors import CheckpointError
from asr_downstream.plugging import weights as checkpoint

STATE = {
    'conv.weight': torch.ones(3, 2),
    'conv.bias': torch.zeros(2, dtype=torch.bfloat16),
    'half': torch.ones(2, dtype=torch.float16),
    'quarter': torch.ones(2).to(torch.float8_e4m3fn),
    'spectrum': torch.ones(2, dtype=torch.complex64),
    'count': torch.tensor(2**40),
    'mask': torch.tensor([True, False]),
    'empty': torch.zeros(0, 3),
}


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('conv.weight', torch.tensor([1.0, math.nan])),
        ('conv.bias', torch.tensor([1.0, math.inf], dtype=torch.bfloat16)),
        ('half', torch.tensor([-math.inf], dtype=torch.float16)),
        ('quarter', torch.tensor([math.nan]).to(torch.float8_e4m3fn)),
        ('spectrum', torch.tensor([complex(1, math.nan)])),
    ],
)
def test_loaded_weights_that_are_not_finite_are_refused_by_name(name: str, value: torch.Tensor) -> None:
    checkpoint.check_weights_finite(STATE, Path('good.safetensors'))
    with pytest.raises(CheckpointError, match=f'bad.safetensors: {name} is not finite.*another checkpoint'):
        checkpoint.check_weights_finite({**STATE, name: value}, Path('bad.safetensors'))
    both = {**STATE, name: value, 'last': torch.tensor(math.nan)}
    with pytest.raises(CheckpointError, match=f'{name}, last are not finite'):
        checkpoint.check_weights_finite(both, Path('bad.safetensors'))
