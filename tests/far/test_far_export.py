"""Models whose attention is replaced can be exported and compiled; masks are looked at only where that is possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.far import dit, encoder, noisy, pixels, unet, vit
from torch import nn

from asr_downstream import PlugError
from asr_downstream.far import replace

FAR = dict(type='FAR', variant='M3', layers='all', execution='loop')


class First(nn.Module):
    """The first output of a model, for exports: they take no classes of outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        found = self.model(**inputs)
        return found if isinstance(found, torch.Tensor) else found[0]


def replaced(model: nn.Module) -> First:
    replace(model, FAR)
    return First(randomise(model)).eval()


def eager(model: Any) -> Any:
    model.set_attn_implementation('eager')
    return model


def tokens() -> dict[str, Any]:
    return noisy(4, 'hidden_states') | {'class_labels': torch.tensor([0, 4])}


CASES = {
    'ViT': (vit, pixels),
    'ViT, eager attention': (lambda: eager(vit()), pixels),
    'DeiT': (lambda: vit('DeiT'), pixels),
    'UNet2DModel': (unet, noisy),
    'DiT': (dit, tokens),
    'TransformerEncoder': (encoder, lambda: {'src': torch.randn(2, 5, 16)}),
}


@pytest.mark.parametrize(
    ('build', 'inputs'),
    [pytest.param(*case, id=name, marks=[] if 'iT' in name and name != 'DiT' else pytest.mark.slow)
     for name, case in CASES.items()],
)  # fmt: skip
def test_exported_models_compute_the_same(build: Any, inputs: Any) -> None:
    model, given = replaced(build()), inputs()
    with torch.no_grad():
        exported = torch.export.export(model, (), given, strict=False).module()
        assert torch.allclose(exported(**given), model(**given), atol=1e-5, rtol=1e-4)
        other = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in given.items()}
        assert torch.allclose(exported(**other), model(**other), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ViT, eager attention', 'TransformerEncoder'])
def test_compiled_models_compute_the_same(name: str) -> None:
    build, inputs = CASES[name]
    model, given = replaced(build()), inputs()  # type: ignore[no-untyped-call]
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        assert torch.allclose(compiled(**given), model(**given), atol=1e-5, rtol=1e-4)


def test_masks_that_hide_tokens_are_refused_where_they_can_be_seen() -> None:
    model = replaced(encoder())
    src = torch.randn(2, 5, 16)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.equal(model(src=src, src_key_padding_mask=hidden), model(src=src))
    hidden[0, 3] = True
    with pytest.raises(PlugError, match='hides tokens'):
        model(src=src, src_key_padding_mask=hidden)
