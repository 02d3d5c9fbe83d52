"""Adapters of UNets of diffusers: runs, pipelines, commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip('diffusers')

from conftest import randomise
from helpers.adapters import call, differing, train
from helpers.diffusion import ASR, UNET, config_for, rewrite, trained
from helpers.hub import Hub, asr_downstream
from helpers.shared import NOISE, unet

from asr_downstream import apply_gates, fold, list_gates, plug, save_gates, unload, verify
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train as train_run
from asr_downstream.folding.adapters.base import BASE_FILE, remember

SPECS: dict[str, Any] = {
    'convolutions': ASR,
    'norms': dict(ASR, sites=['*.norm2', 'conv_norm_out']),
    'attention': dict(ASR, sites=['*.to_out.0', '*.to_v'], preserve=True),
}


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_applying_gives_the_fold_to_the_bit(tmp_path: Path, spec: Any) -> None:
    stock = randomise(unet()).eval()
    model = unet().eval()
    model.load_state_dict(stock.state_dict())
    plug(model, spec)
    remember(model)
    train(model).eval()
    save_gates(model, tmp_path / 'a.safetensors')
    applied = apply_gates(stock, tmp_path / 'a.safetensors')
    assert differing(applied, fold(model)[0]) == []
    assert vars(applied).keys() == vars(stock).keys()
    double = [m.double() for m in (applied, stock)]
    assert verify(*double, NOISE).relative > 1e-3
    unload(model)
    assert differing(model.double(), stock) == []


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers with a random UNet."""
    torch.manual_seed(0)
    model = randomise(diffusers.UNet2DModel(**UNET))
    for parameter in model.parameters():
        parameter.data.mul_(0.7)
    folder = tmp_path_factory.mktemp('base') / 'pipeline'
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule='squaredcos_cap_v2')
    diffusers.DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
    return folder


def run_of(folder: Path, base: Path) -> Path:
    """A run that has trained nothing but gates, from a pipeline."""
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(base), subfolder='unet')
    last = train_run(config_for(folder, model=model, plug=dict(ASR, preserve=True), max_train_steps=1))
    run = load_run(last)
    run.parts.model.load_state_dict(load(base).state_dict(), strict=False)
    train(run.parts.model)
    for name in ('model', 'ema'):
        rewrite(last, name, run.parts.model.state_dict())
    return last.parent


def load(folder: Path) -> Any:
    return diffusers.DDPMPipeline.from_pretrained(folder).unet


def test_a_run_becomes_an_adapter_and_the_adapter_a_pipeline(tmp_path: Path, base: Path) -> None:
    run = run_of(tmp_path, base)
    done = call('save', run, tmp_path / 'a.safetensors')  # its base is the pipeline that it began with
    assert done.returncode == 0, done.stderr
    assert 'UNet2DModel' in done.stdout
    assert list_gates(tmp_path / 'a.safetensors').about == {'run': 'run', 'step': 1, 'ema': True}
    done = call('apply', base, tmp_path / 'a.safetensors', tmp_path / 'night')
    assert done.returncode == 0, done.stderr
    folded = fold(load_run(run).parts.model)[0]
    assert differing(load(tmp_path / 'night'), folded) == []
    assert differing(load(base), folded) != []
    done = call('apply', base, tmp_path / 'a.safetensors', tmp_path / 'nothing', '--strength', '0')
    assert done.returncode == 0, done.stderr
    assert differing(load(tmp_path / 'nothing'), load(base)) == []
    images = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'night')(batch_size=1, num_inference_steps=2).images
    assert len(images) == 1

    other = load(base)
    other.conv_in.weight.data += 1
    other.save_pretrained(tmp_path / 'other')
    for words, message in (
        (('save', run, tmp_path / 'b.safetensors', '--base', tmp_path / 'other'), 'weights differ (conv_in.weight)'),
        (('apply', tmp_path / 'other', tmp_path / 'a.safetensors', tmp_path / 'x'), 'tensors differ (conv_in.weight)'),
        (('apply', run, tmp_path / 'a.safetensors', tmp_path / 'x'), 'have gates, fold it first'),
        (('save', tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'), 'is a file; expected RUN OUT'),
    ):
        done = call(*words)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    call('save', run, tmp_path / 'c.safetensors', '--base', tmp_path / 'other', '--heads', 'conv_in')
    assert {*list_gates(tmp_path / 'c.safetensors').heads} == {'conv_in.weight', 'conv_in.bias'}


def test_a_run_that_trained_everything_has_no_adapter(tmp_path: Path) -> None:
    run = trained(tmp_path, plug=ASR)
    done = call('save', run, tmp_path / 'a.safetensors')
    assert done.returncode == 1
    assert 'its base is not known' in done.stderr


def test_what_a_run_remembers_is_its_base(tmp_path: Path) -> None:
    run = trained(tmp_path, plug=ASR)
    model = load_run(run).parts.model
    remember(model, ['conv_out'], run)
    done = call('save', run, tmp_path / 'a.safetensors')
    assert done.returncode == 0, done.stderr
    assert {*list_gates(tmp_path / 'a.safetensors').heads} == {'conv_out.weight', 'conv_out.bias'}
    record = json.loads((run / BASE_FILE).read_text())
    record['tensors']['conv_in.bias'] = '0' * 16
    (run / BASE_FILE).write_text(json.dumps(record))
    done = call('save', run, tmp_path / 'b.safetensors')
    assert 'weights differ (conv_in.bias)' in done.stderr
    done = call('save', run, tmp_path / 'b.safetensors', '--heads', 'changed', '--learnt')
    assert {*list_gates(tmp_path / 'b.safetensors').heads} == {'conv_in.bias'}
    assert list_gates(tmp_path / 'b.safetensors').learnt


def test_a_training_with_learns_from_the_pipeline_to_the_pipeline(tmp_path: Path, base: Path) -> None:
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(base), subfolder='unet')
    settings = dict(model=model, plug=dict(ASR, preserve=True), learns=['gates', 'conv_out.*'], max_train_steps=2)
    run = train_run(config_for(tmp_path, **settings)).parent
    assert (run / BASE_FILE).is_file()
    done = call('save', run, tmp_path / 'a.safetensors')
    assert done.returncode == 0, done.stderr
    assert {*list_gates(tmp_path / 'a.safetensors').heads} == {'conv_out.weight', 'conv_out.bias'}
    done = call('apply', base, tmp_path / 'a.safetensors', tmp_path / 'night')
    assert done.returncode == 0, done.stderr
    applied = load(tmp_path / 'night')
    assert differing(applied, fold(load_run(run).parts.model)[0]) == []
    changed = differing(applied, load(base))
    assert {'conv_out.weight', 'conv_out.bias'} < {*changed}
    assert all(name.startswith(('conv_out', *list_gates(tmp_path / 'a.safetensors').sites)) for name in changed)


@pytest.mark.slow
def test_an_adapter_is_pushed_to_a_hub_with_a_card(hub: Hub, tmp_path: Path, base: Path) -> None:
    out = tmp_path / 'night.safetensors'
    done = asr_downstream(hub, 'gates', 'save', run_of(tmp_path / 'run', base), out, '--push-to-hub', 'user/night')
    assert done.returncode == 0, done.stderr
    assert hub.files.keys() == {'night.safetensors', 'README.md'}
    assert hub.files['night.safetensors'] == out.read_bytes()
    card = hub.files['README.md'].decode()
    assert 'library_name: asr_downstream' in card
    assert 'asr-downstream fold apply BASE night.safetensors OUT' in card
