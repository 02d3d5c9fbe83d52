"""Sites of diffusers' models: what is found, that it trains, starts where it stood, and folds into the stock class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import randomise
from helpers.diffusion import ASR, DIA, DIT, UNET, conditional_unet, vae
from torch import Tensor

from asr_downstream import describe, fold, plug, verify

D = torch.float64


def unet() -> Any:
    return diffusers.UNet2DModel(**UNET)


def dit() -> Any:
    model = diffusers.DiTTransformer2DModel(**DIT)
    # its modulation starts at zero, which would hide every branch
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def autoencoder() -> Any:
    return vae()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=D)


# Model -> how to build it, an input, number of sites, and one path of each kind.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], int, tuple[str, ...]]] = {
    'UNet2DModel': (
        unet,
        lambda: {'sample': noise(2, 1, 8, 8), 'timestep': torch.tensor([3, 70])},
        12,
        ('down_blocks.0.resnets.0.conv2', 'down_blocks.1.attentions.0.to_out.0', 'mid_block.attentions.0.to_out.0'),
    ),
    'UNet2DConditionModel': (
        conditional_unet,
        lambda: {
            'sample': noise(2, 4, 8, 8),
            'timestep': torch.tensor([3, 70]),
            'encoder_hidden_states': noise(2, 5, 24),
        },
        20,
        (
            'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0',
            'down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0',
            'down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2',
            'mid_block.resnets.1.conv2',
        ),
    ),
    'DiTTransformer2DModel': (
        dit,
        lambda: {
            'hidden_states': noise(2, 4, 8, 8),
            'timestep': torch.tensor([3, 70]),
            'class_labels': torch.tensor([0, 2]),
        },
        4,
        ('transformer_blocks.0.attn1.to_out.0', 'transformer_blocks.1.ff.net.2'),
    ),
    'AutoencoderKL': (
        autoencoder,
        lambda: {'sample': noise(2, 3, 16, 16)},
        12,
        ('encoder.mid_block.attentions.0.to_out.0', 'decoder.up_blocks.1.resnets.0.conv2'),
    ),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> Any:
    build, inputs, sites, paths = MODELS[request.param]
    return build().to(D).eval(), inputs(), sites, paths


def test_sites_are_the_ends_of_the_branches(case: Any) -> None:
    model, _, count, paths = case
    rows = plug(model, ASR).sites
    assert len(rows) == count
    assert set(paths) <= {row.path for row in rows}


@pytest.mark.parametrize('spec', [ASR, DIA, dict(type='ASR', attention=dict(type='DIALSTM', reduction=4))])
def test_preserve_leaves_a_pretrained_model_where_it_stands(case: Any, spec: dict[str, Any]) -> None:
    model, inputs, _, _ = case
    before = randomise(model)(**inputs).sample
    plug(model, {**spec, 'preserve': True})
    torch.testing.assert_close(model(**inputs).sample, before, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        if name.endswith('psi'):
            parameter.data.normal_(0, 3)
    if spec is not DIA:
        assert (model(**inputs).sample - before).abs().max() > 1e-6


@pytest.mark.parametrize('attention', [dict(type='SE', reduction=4), dict(type='DIALSTM', reduction=4)])
def test_folds_into_the_stock_class(case: Any, attention: dict[str, Any]) -> None:
    model, inputs, count, _ = case
    build = type(model).from_config
    plug(model, dict(type='ASR', attention=attention))
    randomise(model)
    folded, report = fold(model)
    assert len(report.sites) == count
    stock = build(model.config).to(D).eval()
    stock.load_state_dict(folded.state_dict(), strict=True)
    assert type(folded) is type(stock)
    assert verify(model, stock, inputs).relative < 1e-10
    # negative control: without its gates it is another function
    stripped = build(model.config).to(D).eval()
    stripped.load_state_dict({k: v for k, v in model.state_dict().items() if k in stock.state_dict()})
    assert verify(model, stripped, inputs).relative > 1e-4


@pytest.mark.parametrize('spec', [ASR, DIA, dict(type='Attention', attention=dict(type='SE', reduction=4))])
def test_every_gate_learns(case: Any, spec: dict[str, Any]) -> None:
    model, inputs, _, _ = case
    plug(randomise(model).train(), spec)
    sample = model(**inputs).sample
    (sample * noise(*sample.shape)).sum().backward()
    added = {n: p for n, p in model.named_parameters() if '.gate.' in n or '.dynamic.' in n or 'shared_attention' in n}
    assert added
    for name, parameter in added.items():
        assert parameter.grad is not None, name
    assert sum(bool(p.grad.abs().max() > 0) for p in added.values()) > 0.8 * len(added)  # SE's ReLU may rest


def test_a_stock_model_says_what_could_be_plugged() -> None:
    text = str(describe(unet()))
    assert 'no plugged sites' in text
    assert 'down_blocks.1.attentions.0.to_out.0' in text


def test_a_plugged_unet_loads_stock_weights_and_saves_folded(tmp_path: Path) -> None:
    model = randomise(unet()).eval()
    model.save_pretrained(tmp_path / 'stock')
    plugged = diffusers.UNet2DModel.from_pretrained(tmp_path / 'stock')
    plug(plugged, {**ASR, 'preserve': True})
    plugged.eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 50])
    torch.testing.assert_close(plugged(x, t).sample, model(x, t).sample)
    fold(plugged)[0].save_pretrained(tmp_path / 'folded')
    again, info = diffusers.UNet2DModel.from_pretrained(tmp_path / 'folded', output_loading_info=True)
    assert not info['missing_keys']
    assert not info['unexpected_keys']
    torch.testing.assert_close(again.eval()(x, t).sample, model(x, t).sample, rtol=1e-4, atol=1e-5)
