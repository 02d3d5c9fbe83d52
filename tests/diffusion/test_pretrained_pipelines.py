"""Models from pretrained folders: the noise schedule of their pipeline, the right part of it, and its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.diffusion import (
    UNET,
    assert_refused,
    call,
    conditional_unet,
    config_for,
    vae,
    write_config,
    write_text_encoder,
)
from helpers.engine import change_progress
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from asr_downstream import plug
from asr_downstream.diffusion.defaults import DEFAULT_SCHEDULE
from asr_downstream.diffusion.models.build import build_model
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.models.pretrained import noise_schedule, same_schedule
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.errors import AsrError

DAMAGES = ('lacks', 'has more', 'plugged', 'not finite', 'bin')
WEIGHTS = 'diffusion_pytorch_model.safetensors'
VELOCITY = dict(prediction_type='v_prediction', beta_schedule='squaredcos_cap_v2', num_train_timesteps=50)


@pytest.fixture(scope='module')
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that predicts velocity on a cosine schedule of 50 steps."""
    folder = tmp_path_factory.mktemp('pipe') / 'pipe'
    torch.manual_seed(0)
    scheduler = diffusers.DDPMScheduler(**VELOCITY, clip_sample=False)
    diffusers.DDPMPipeline(unet=diffusers.UNet2DModel(**UNET), scheduler=scheduler).save_pretrained(folder)
    return folder


def pretrained(path: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a config that starts from a folder and says nothing of noise."""
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(path), **settings)
    return {'model': model, 'noise_scheduler': ..., 'num_inference_steps': 5}


def schedule(config: Any) -> dict[str, Any]:
    """What defines the noise of a training."""
    found = build_parts(config).scheduler.config
    return {key: found[key] for key in VELOCITY}


@pytest.mark.parametrize('form', ['subfolder', 'found', 'path'])
def test_the_schedule_of_the_pipeline_is_taken(tmp_path: Path, pipe: Path, form: str) -> None:
    settings = {'subfolder': pretrained(pipe, subfolder='unet'), 'found': pretrained(pipe)}
    config = config_for(tmp_path, **settings.get(form, pretrained(pipe / 'unet')))
    assert schedule(config) == VELOCITY


def test_a_run_keeps_the_schedule_when_the_pipeline_changes(tmp_path: Path, pipe: Path) -> None:
    own = Path(shutil.copytree(pipe, tmp_path / 'own'))
    last = train(config_for(tmp_path, **pretrained(own, subfolder='unet'), max_train_steps=1))
    path = own / 'scheduler/scheduler_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'prediction_type': 'epsilon'}))
    run = load_run(last)
    assert run.parts.scheduler.config.prediction_type == 'v_prediction'
    assert run.config.noise_scheduler['num_train_timesteps'] == 50


@pytest.mark.parametrize(
    ('said', 'both'),
    [
        ({'prediction_type': 'epsilon'}, ("'epsilon'", "'v_prediction'")),
        ({'beta_schedule': 'linear'}, ("'linear'", "'squaredcos_cap_v2'")),
        ({'num_train_timesteps': 1000}, ('1000', '50')),
    ],
)
def test_a_contradiction_names_both_values(tmp_path: Path, pipe: Path, said: Any, both: tuple[str, str]) -> None:
    settings = {**pretrained(pipe, subfolder='unet'), 'noise_scheduler': dict(type='DDPMScheduler', **said)}
    key = next(iter(said))
    done = call('diffusion/train.py', write_config(tmp_path, **settings), '--dry-run')
    assert_refused(done, key, *both, str(pipe), 'leave')


def test_what_agrees_is_taken_and_the_rest_is_the_pipelines(tmp_path: Path, pipe: Path) -> None:
    said = dict(type='DDPMScheduler', prediction_type='v_prediction', variance_type='fixed_large')
    config = config_for(tmp_path, **{**pretrained(pipe, subfolder='unet'), 'noise_scheduler': said})
    assert schedule(config) == VELOCITY
    assert build_parts(config).scheduler.config.variance_type == 'fixed_large'


def test_without_a_pipeline_the_default_holds(tmp_path: Path, pipe: Path) -> None:
    alone = Path(shutil.copytree(pipe / 'unet', tmp_path / 'alone'))
    for settings in (pretrained(alone), {'noise_scheduler': ...}):
        config = config_for(tmp_path, **settings)
        assert schedule(config) == {
            'prediction_type': 'epsilon', 'beta_schedule': 'linear', 'num_train_timesteps': 1000,
        }  # fmt: skip


def test_the_schedulers_of_other_samplers_are_read(tmp_path: Path, pipe: Path) -> None:
    own = Path(shutil.copytree(pipe, tmp_path / 'own'))
    sampler = diffusers.PNDMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)
    sampler.save_pretrained(own / 'scheduler')
    index = json.loads((own / 'model_index.json').read_text())
    (own / 'model_index.json').write_text(json.dumps({**index, 'scheduler': ['diffusers', 'PNDMScheduler']}))
    config = config_for(tmp_path, **pretrained(own))
    found = build_parts(config).scheduler
    assert type(found).__name__ == 'DDPMScheduler'
    assert torch.equal(found.alphas_cumprod, sampler.alphas_cumprod)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        ('{"scheduler": 3', 'model_index.json'),
        ('[]', 'model_index.json'),
        ('no scheduler', 'scheduler_config.json'),
        ('no betas', 'EDMEulerScheduler'),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_named(tmp_path: Path, pipe: Path, damage: str, message: str) -> None:
    own = Path(shutil.copytree(pipe, tmp_path / 'own'))
    if damage == 'no scheduler':
        (own / 'scheduler/scheduler_config.json').write_text('{"beta_schedule"')
    elif damage == 'no betas':
        diffusers.EDMEulerScheduler().save_pretrained(own / 'scheduler')
    else:
        (own / 'model_index.json').write_text(damage)
    with pytest.raises(AsrError, match=message):
        build_parts(config_for(tmp_path, **pretrained(own, subfolder='unet')))


def test_the_part_of_another_class_is_named(tmp_path: Path) -> None:
    own = tmp_path / 'text'
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = write_text_encoder(tmp_path / 'encoder')
    diffusers.StableDiffusionPipeline(
        vae=vae(), unet=conditional_unet(), scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        text_encoder=CLIPTextModel.from_pretrained(encoder, subfolder='text_encoder'),
        tokenizer=CLIPTokenizer.from_pretrained(encoder, subfolder='tokenizer'),
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(own)  # fmt: skip
    for settings in (pretrained(own), pretrained(own, subfolder='unet'), pretrained(own / 'unet')):
        with pytest.raises(AsrError, match="type='UNet2DModel'") as caught:
            build_model(config_for(tmp_path, **settings))
        assert 'UNet2DConditionModel' in str(caught.value)


@pytest.mark.parametrize(
    'damage', [*(pytest.param(d, marks=() if d in ('lacks', 'plugged') else pytest.mark.slow) for d in DAMAGES), 'cut']
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, pipe: Path, damage: str) -> None:
    own = Path(shutil.copytree(pipe / 'unet', tmp_path / 'unet'))
    state = load_file(own / WEIGHTS)
    message = {'cut': 'cannot be made', 'not finite': 'is not finite', 'plugged': 'gates'}.get(damage, 'conv_in.weight')
    if damage == 'cut':
        (own / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[:5000])
    elif damage == 'bin':
        (own / WEIGHTS).unlink()
        del state['conv_in.weight']
        torch.save(state, own / 'diffusion_pytorch_model.bin')
    elif damage == 'plugged':
        model = diffusers.UNet2DModel(**UNET)
        plug(model, dict(type='ASR', attention=dict(type='SE', reduction=4)))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, own / WEIGHTS, {'format': 'pt'})
    else:
        changes = {
            'lacks': None,
            'has more': state['conv_in.weight'].clone(),
            'not finite': state['conv_in.weight'] * torch.nan,
        }
        state['conv_in.weight2' if damage == 'has more' else 'conv_in.weight'] = changes[damage]
        save_file({k: v for k, v in state.items() if v is not None}, own / WEIGHTS, {'format': 'pt'})
    done = call('diffusion/train.py', write_config(tmp_path, **pretrained(own)), '--dry-run')
    assert_refused(done, str(own), message)


def test_a_vae_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    vae(1).save_pretrained(tmp_path / 'vae')
    state = load_file(tmp_path / 'vae' / WEIGHTS)
    del state['quant_conv.weight']
    save_file(state, tmp_path / 'vae' / WEIGHTS, {'format': 'pt'})
    spec = dict(pretrained_model_name_or_path=str(tmp_path / 'vae'))
    with pytest.raises(AsrError, match=r'vae: .*quant_conv\.weight'):
        build_parts(config_for(tmp_path, vae=spec, data=dict(type='Digits', resolution=16)))


def as_before(checkpoint: Path, schedule: dict[str, Any]) -> None:
    """Let a checkpoint say which schedule it was trained with, as one does that an earlier version wrote."""
    change_progress(checkpoint, lambda content: content['settings'].update(noise_scheduler=schedule))


@pytest.mark.parametrize('says', ['nothing', 'the same', 'another'])
def test_a_run_of_before_goes_on_with_its_schedule(
    tmp_path: Path, pipe: Path, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs used to be trained with the default schedule, whatever the pipeline had, and to write it in short."""
    settings, short = pretrained(pipe, subfolder='unet'), dict(DEFAULT_SCHEDULE)
    last = train(config_for(tmp_path, **settings, max_train_steps=1))
    as_before(last, short)
    if says != 'nothing':
        settings['noise_scheduler'] = short | ({'beta_schedule': 'scaled_linear'} if says == 'another' else {})
    config = config_for(tmp_path, **settings, max_train_steps=2)
    if says == 'another':
        with pytest.raises(AsrError, match='scaled_linear'):
            train(config, 'latest')
        return
    last = train(config, 'latest')
    assert load_run(last).parts.scheduler.config.prediction_type == 'epsilon'
    out = capsys.readouterr().out
    assert "prediction_type='v_prediction', this run with prediction_type='epsilon', and goes on" in out


def test_a_schedule_in_short_is_the_one_in_full() -> None:
    short = dict(DEFAULT_SCHEDULE)
    assert same_schedule(short, dict(diffusers.DDPMScheduler().config))
    assert not same_schedule(short, {**short, 'prediction_type': 'sample'})


def test_a_hub_that_does_not_answer_is_not_no_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dict(type='UNet2DModel', pretrained_model_name_or_path='someone/something', subfolder='unet')
    default = dict(DEFAULT_SCHEDULE)
    full = default | {'prediction_type': 'epsilon'}

    def fails(cause: Exception) -> None:
        def load_config(*args: Any, **kwargs: Any) -> None:
            try:
                raise cause
            except Exception:
                raise OSError('no such file') from None

        monkeypatch.setattr(diffusers.DiffusionPipeline, 'load_config', load_config)

    fails(LocalEntryNotFoundError('not in the cache'))
    with pytest.raises(AsrError, match='cannot tell which schedule .* say noise_scheduler'):
        noise_schedule(None, model, default)
    with pytest.warns(UserWarning, match='could not be compared'):
        assert noise_schedule(full, model, default) == full
    fails(EntryNotFoundError('no model_index.json'))
    assert noise_schedule(None, model, default) == default


@pytest.mark.parametrize('damage', ['cut', 'no betas'])
def test_a_schedule_that_is_said_needs_no_scheduler_of_the_pipeline(tmp_path: Path, pipe: Path, damage: str) -> None:
    own = Path(shutil.copytree(pipe, tmp_path / 'own'))
    if damage == 'cut':
        (own / 'scheduler/scheduler_config.json').write_text('{')
    else:
        diffusers.EDMEulerScheduler().save_pretrained(own / 'scheduler')
    said = dict(type='DDPMScheduler', **VELOCITY)
    with pytest.warns(UserWarning, match='could not be compared'):
        assert noise_schedule(said, pretrained(own, subfolder='unet')['model'], {}) == said
    with pytest.raises(AsrError, match='say noise_scheduler with'):
        noise_schedule({'beta_schedule': 'linear'}, pretrained(own, subfolder='unet')['model'], {})
