"""Folded UNets in programs that others wrote."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip('diffusers')

from conftest import randomise
from helpers.diffusion import ASR
from helpers.shared import NOISE, unet

from asr_downstream import fold, plug


def test_lora_of_peft_goes_on_a_folded_unet_and_off() -> None:
    peft = pytest.importorskip('peft')
    model = unet()
    plug(model, ASR)
    folded, _ = fold(randomise(model).double().eval())
    before = folded(*NOISE).sample
    config = peft.LoraConfig(r=2, target_modules=['conv1', 'to_q', 'to_v'], init_lora_weights=False)
    tuned = peft.get_peft_model(folded, config).double()
    assert (tuned(*NOISE).sample - before).abs().max() > 1e-3
    with tuned.disable_adapter():
        assert torch.allclose(tuned(*NOISE).sample, before, rtol=1e-10)
    learning = [name for name, value in tuned.named_parameters() if value.requires_grad]
    assert learning
    assert all('lora' in name for name in learning)
    merged = tuned.merge_and_unload()
    assert type(merged) is diffusers.UNet2DModel
    assert {*merged.state_dict()} == {*unet().state_dict()}


@pytest.mark.slow
def test_a_compiled_folded_unet_computes_the_same() -> None:
    model = unet()
    plug(model, ASR)
    folded, _ = fold(randomise(model).double().eval())
    with torch.no_grad():
        compiled = torch.compile(folded, backend='aot_eager', fullgraph=True)(*NOISE).sample
        plain = folded(*NOISE).sample
    assert (compiled - plain).abs().max() <= 1e-4 * plain.abs().max()
