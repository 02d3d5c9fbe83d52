"""Objective, average and configs of a diffusion training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion import UNET, config_for, write_config, write_images
from torch import nn

from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.models.build import build_model, build_scheduler
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.models.process import process_of
from asr_downstream.diffusion.training.objective import denoising_loss
from asr_downstream.engine.state.ema import EMA
from asr_downstream.errors import AsrError, CheckpointError, DataError

# Objective ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('gamma', [None, 5.0])
def test_loss_is_that_of_the_formulas(prediction: str, gamma: float | None) -> None:
    scheduler = build_scheduler(
        dict(type='DDPMScheduler', num_train_timesteps=100, beta_schedule='linear', prediction_type=prediction)
    )
    clean, noise, output = torch.randn(3, 4, 1, 8, 8).unbind()
    t = torch.tensor([0, 20, 60, 99])
    alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    batch = {'image': clean, 'noise': noise, 'timestep': t}
    process = process_of(scheduler)
    loss = denoising_loss(process, output, batch, gamma)
    torch.testing.assert_close(scheduler.add_noise(clean, noise, t), alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    target = {
        'epsilon': noise,
        'sample': clean,
        'v_prediction': alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
    }[prediction]
    torch.testing.assert_close(process.target(clean, noise, t), target)
    snr = (alpha / (1 - alpha)).flatten()
    weights = torch.ones(4)
    if gamma is not None:
        weights = snr.clamp(max=gamma) / {'epsilon': snr, 'sample': 1, 'v_prediction': snr + 1}[prediction]
        torch.testing.assert_close(process.weights(t, gamma), weights, rtol=1e-5, atol=1e-7)
    expected = (weights * (output - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


# Average --------------------------------------------------------------------------------------------------------------


def test_average_follows_the_recursion_by_name_with_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(model, max_decay=0.9, inv_gamma=1.0, power=0.75)
    mean = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(1, 40):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1) if not value.is_floating_point() else value.normal_()
        ema.update(model, step)
        decay = min(0.9, 1 - (1 + (step - 1)) ** -0.75)
        for key, value in model.state_dict().items():
            mean[key] = decay * mean[key] + (1 - decay) * value if value.is_floating_point() else value.clone()
    assert ema.state.keys() == model.state_dict().keys()
    for key, value in mean.items():
        torch.testing.assert_close(ema.state[key], value, msg=key)


def test_average_is_applied_for_a_block_only_and_refuses_other_names() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    ema.state['weight'] += 1
    with pytest.raises(ZeroDivisionError), ema.applied_to(model):
        assert 1 / int(torch.equal(model.weight, own['weight']))
    assert torch.equal(model.weight, own['weight'])
    with pytest.raises(CheckpointError, match='names of the weights differ: bias'):
        EMA(nn.Linear(3, 2, bias=False)).update(model, 1)
    with pytest.raises(CheckpointError, match='names of the weights differ'):
        ema.load({'weight': own['weight']})


# Config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'learning_rat': 1}, "did you mean 'learning_rate'"),
        ({'learning_rate': 'fast'}, "learning_rate='fast' should be float"),
        ({'use_ema': 1}, 'use_ema=1 should be bool'),
        ({'train_batch_size': True}, 'should be int'),
        ({'max_train_steps': 0}, 'should be greater than 0'),
        ({'mixed_precision': 'bf61'}, "did you mean 'bf16'"),
        ({'sampler': 'PNDM'}, 'not known'),
        ({'lr_scheduler': 'cosin'}, "did you mean 'cosine'"),
        ({'num_validation_images': 0}, 'should be greater than 0'),
        ({'report_to': ['mlflow']}, "use 'tensorboard', 'wandb'"),
    ],
)
def test_configs_are_checked_before_anything_is_built(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        load_config(write_config(tmp_path), options)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'model': {'type': 'UNet3D'}}, "did you mean 'UNet2DModel'"),
        ({'model': {'type': 'UNet2DModel', 'widths': 3}}, "takes no 'widths'"),
        ({'model': {'type': 'UNet2DModel', 'pretrained_model_name_or_path': '/nowhere'}}, 'cannot be made from'),
        ({'model': {'type': 'UNet2DModel', **UNET, 'out_channels': 2}}, 'should equal in_channels=1'),
        ({'data': {'type': 'Digits', 'resolution': 16}}, 'resolution=16 does not fit model.sample_size=8'),
        ({'noise_scheduler': {'type': 'PNDMScheduler'}}, 'is not one that is trained here'),
        ({'condition': {'type': 'ClassLabels'}}, 'model.num_class_embeds=None should be 10'),
        (
            {
                'condition': {'type': 'ClassLabels', 'drop': 0.1},
                'model': dict(type='UNet2DModel', **UNET, num_class_embeds=10),
            },
            'should be 11 .*one for no class',
        ),
        ({'model': dict(type='UNet2DModel', **UNET, num_class_embeds=10)}, 'the config has no condition'),
        ({'vae': {'pretrained_model_name_or_path': '/nowhere'}}, 'vae: .* cannot be loaded'),
        ({'noise_scheduler': {'type': 'DDPMScheduler', 'prediction_type': 'eps'}}, "did you mean 'epsilon'"),
        ({'guidance_scale': 3.0}, 'needs a condition with drop > 0'),
        ({'validation_steps': 5, 'num_inference_steps': 200}, 'should be at most 100'),
        ({'condition': {'type': 'ClassLabels', 'drop': 10}}, 'should be a share'),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        build_parts(config_for(tmp_path, **settings))


def test_data_is_found_under_the_root_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / 'birds')
    path = write_config(tmp_path, data={'type': 'ImageFolder', 'path': 'data/birds', 'resolution': 8})
    monkeypatch.setenv('ASR_DATA_ROOT', str(tmp_path))
    assert load_config(path).data.path == str(tmp_path / 'birds')
    assert load_config(path, data=tmp_path).data.path == str(tmp_path)
    with pytest.raises(DataError, match='no such image folder or zip'):
        load_config(path, data=tmp_path / 'nothing')


def test_stock_and_plugged_model_of_a_seed_have_the_same_weights(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    stock, plugged = build_model(config, plugged=False).state_dict(), build_model(config).state_dict()
    assert stock.keys() < plugged.keys()
    assert all(torch.equal(value, plugged[key]) for key, value in stock.items())
