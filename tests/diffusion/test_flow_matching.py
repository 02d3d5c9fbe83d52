"""Flow matching: what is learnt, when, what has no meaning, and that plain diffusers samples what is shipped."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from helpers.diffusion import (
    ASR,
    DIT,
    UNET,
    assert_refused,
    assert_same,
    call,
    config_for,
    losses,
    trained,
    vae,
    write_config,
    write_images,
)
from torch import nn

from asr_downstream.diffusion.analysis import NoisyImages, loss_over
from asr_downstream.diffusion.evaluation.encoder import train_encoder
from asr_downstream.diffusion.evaluation.evaluate import Plan, evaluate_runs
from asr_downstream.diffusion.evaluation.fold import fold_run
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.export import fold_and_ship
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.models.process import FLOW, Density, Flow, process_of
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.objective import denoising_loss
from asr_downstream.diffusion.training.train import train
from asr_downstream.errors import AsrError
from asr_downstream.modules.seeds import generator, mix

SCHEDULE = dict(type=FLOW, num_train_timesteps=1000)
SETTINGS = {'noise_scheduler': SCHEDULE}


def flow(density: Density | None = None, **settings: Any) -> Flow:
    """A flow of diffusers' scheduler."""
    found = process_of(diffusers.FlowMatchEulerDiscreteScheduler(**settings), density)
    assert isinstance(found, Flow)
    return found


# What is learnt, and when ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_noise_and_target_are_those_of_diffusers(shift: float) -> None:
    process = flow(shift=shift)
    clean, noise = torch.randn(2, 6, 1, 8, 8, dtype=torch.float64).unbind()
    stream = generator('timesteps')
    t = torch.stack([process.draw(stream) for _ in range(6)])
    theirs = process.scheduler.scale_noise(clean, t, noise)
    torch.testing.assert_close(process.noisy(clean, noise, t), theirs, rtol=0, atol=1e-6)
    # the target takes Euler from the noise to the image, in as many steps as there are
    sampler = build_sampler('Euler', process.scheduler)
    sampler.set_timesteps(7)
    x = noise
    for step in sampler.timesteps:
        x = sampler.step(process.target(clean, noise, t), step, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)
    assert (x - noise).abs().max() > 1


def test_the_loss_is_that_of_the_formula() -> None:
    clean, noise, output = torch.randn(3, 4, 1, 8, 8).unbind()
    t = torch.tensor([3.0, 200.0, 620.0, 1000.0])
    batch = {'image': clean, 'noise': noise, 'timestep': t}
    each = (output - (noise - clean)).square().mean((1, 2, 3))
    for scheme in ('logit_normal', 'mode', 'none', 'sigma_sqrt', 'cosmap'):
        process = flow(Density(scheme))
        weights = compute_loss_weighting_for_sd3(scheme, t / 1000)
        torch.testing.assert_close(denoising_loss(process, output, batch, None), (weights * each).mean())
        torch.testing.assert_close(denoising_loss(process, output, batch, None, weighted=False), each.mean())


def drawn(density: Density, count: int = 4000) -> torch.Tensor:
    process, stream = flow(density), generator('draws')
    found = torch.stack([process.draw(stream) for _ in range(count)])
    assert torch.isin(found, process.scheduler.timesteps).all()
    return found / 1000


def test_timesteps_have_the_density_that_is_asked_for() -> None:
    uniform = drawn(Density('none'))
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    for mean, std in ((0.0, 1.0), (1.0, 0.5)):
        logits = drawn(Density('logit_normal', mean, std)).logit(1e-4)
        assert float(logits.mean()) == pytest.approx(-mean, abs=0.06)  # diffusers counts timesteps from the noise
        assert float(logits.std()) == pytest.approx(std, abs=0.05)
    mode = drawn(Density('mode'))
    assert not torch.equal(mode, uniform)
    assert float(mode.std()) < float(uniform.std()) - 0.01


def test_the_end_of_the_density_is_a_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Density, 'draw', lambda self, stream: torch.ones(()))  # mode gives 1 for 0
    assert flow().draw(generator('one')) == 1.0


class Exact(nn.Module):
    """The velocity of a Gaussian with standard deviation 0.5, in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        s = (t / 1000).view(-1, 1, 1, 1)
        velocity = x * (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2)
        return type('Output', (), {'sample': velocity})


@pytest.mark.parametrize('sampler', Flow.samplers)
@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_samplers_find_the_distribution_of_an_exact_model(tmp_path: Path, sampler: str, shift: float) -> None:
    parts = build_parts(config_for(tmp_path, noise_scheduler={**SCHEDULE, 'shift': shift}))
    images = generate(Exact().eval(), parts, build_sampler(sampler, parts.scheduler), range(32), 40)
    expected = (torch.randn(100_000) * 0.5 / 2 + 0.5).clamp(0, 1)
    assert float(images.std()) == pytest.approx(float(expected.std()), rel=0.1)


# What has no meaning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'noise_scheduler': {**SCHEDULE, 'prediction_type': 'epsilon'}}, 'prediction_type has no meaning in flow'),
        ({'noise_scheduler': {**SCHEDULE, 'beta_start': 0.1, 'beta_schedule': 'linear'}}, 'have no meaning in flow'),
        ({'noise_scheduler': {**SCHEDULE, 'use_dynamic_shifting': True}}, 'use_dynamic_shifting=True needs a mu'),
        ({'noise_scheduler': {**SCHEDULE, 'invert_sigmas': True}}, 'invert_sigmas'),
        ({'noise_scheduler': {**SCHEDULE, 'shift': 0.0}}, 'shift=0.0 should be greater than 0'),
        ({**SETTINGS, 'snr_gamma': 5.0}, 'snr_gamma=5.0 has no meaning'),
        ({**SETTINGS, 'sampler': 'DDIM'}, "use 'Euler' or 'DPM-Solver\\+\\+'"),
        ({'sampler': 'Euler'}, "sampler='Euler' does not sample DDPMScheduler"),
        ({'weighting_scheme': 'none'}, "weighting_scheme='none' has no meaning with DDPMScheduler"),
        ({**SETTINGS, 'weighting_scheme': 'logit-normal'}, "did you mean 'logit_normal'"),
    ],
)
def test_settings_of_the_other_process_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        build_parts(config_for(tmp_path, **settings))


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ASR(SE) run by flow matching."""
    return trained(tmp_path_factory.mktemp('flow'), plug=ASR, **SETTINGS)


@pytest.fixture(scope='module')
def shipped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, folded and shipped."""
    out = tmp_path_factory.mktemp('shipped') / 'flow'
    report = fold_and_ship(load_run(run), out)
    assert report['difference']['float64']['model'] < 1e-10
    assert report['difference']['float32']['sample'] < 1e-3
    return out


def test_a_training_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {**SETTINGS, 'max_train_steps': 40, 'checkpointing_steps': 20, 'validation_steps': 40, 'plug': None}
    settings |= {'num_inference_steps': 3, 'num_validation_images': 4}
    whole = train(config_for(tmp_path / 'whole', **settings))
    found = [loss for _, loss in losses(tmp_path / 'whole/run')]
    assert sum(found[-8:]) < 0.8 * sum(found[:8])
    assert (tmp_path / 'whole/run/samples/step-0000040.png').is_file()
    assert load_run(whole).config.sampler == 'Euler'
    again = config_for(tmp_path / 'whole', **settings)
    again.output_dir = str(tmp_path / 'again')
    (tmp_path / 'again').mkdir()
    half = whole.parent / 'checkpoint-20'
    target = tmp_path / 'again' / half.name
    half.rename(target)
    assert_same(train(again, str(target)), whole)


@pytest.mark.parametrize('change', [{'weighting_scheme': 'none'}, {'noise_scheduler': {**SCHEDULE, 'shift': 2.0}}])
def test_a_checkpoint_is_bound_to_its_flow(tmp_path: Path, change: Any) -> None:
    train(config_for(tmp_path, **SETTINGS, max_train_steps=1))
    with pytest.raises(AsrError, match=f'was trained with {next(iter(change))}='):
        train(config_for(tmp_path, **{**SETTINGS, 'max_train_steps': 2, **change}), 'latest')


def test_plain_diffusers_samples_what_is_shipped(run: Path, shipped: Path, tmp_path: Path) -> None:
    home = tmp_path / 'venv'
    venv.create(home, symlinks=True)
    site = next(home.glob('lib/python*/site-packages'))
    (site / 'libraries.pth').write_text(next(p for p in sys.path if p.endswith('site-packages')) + '\n')
    code = (
        'import sys, torch; from diffusers import DDPMPipeline\n'
        'pipeline = DDPMPipeline.from_pretrained(sys.argv[1])\n'
        'streams = [torch.Generator().manual_seed(int(s)) for s in sys.argv[3:]]\n'
        "images = pipeline(len(streams), streams, num_inference_steps=6, output_type='pt').images\n"
        'assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"\n'
        'assert not any("asr_downstream" in name for name in sys.modules)\n'
        'torch.save(images, sys.argv[2])\n'
    )
    seeds = [str(mix(0, 'image', number)) for number in range(3)]
    done = subprocess.run(
        [str(home / 'bin/python'), '-c', code, str(shipped), str(tmp_path / 'images.pt'), *seeds],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = load_run(run)
    expected = generate(ours.parts.model, ours.parts, build_sampler(None, ours.parts.scheduler), range(3), 6)
    found = torch.load(tmp_path / 'images.pt', weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.05


def test_the_card_and_the_commands_know_the_flow(run: Path, shipped: Path, tmp_path: Path) -> None:
    card = (shipped / 'README.md').read_text()
    scope: dict[str, Any] = {}
    exec(card.split('```python\n')[1].split('```')[0].replace('THIS FOLDER', str(shipped)), scope)
    assert len(scope['images']) == 16
    assert 'num_inference_steps=50' in card
    assert FLOW in card
    done = call('diffusion/sample.py', run, '--out', tmp_path, '--num-samples', 2, '--steps', 2)
    assert 'averaged weights, Euler, 2 steps' in done.stdout, done.stderr
    refused = call('diffusion/sample.py', run, '--out', tmp_path, '--sampler', 'DDIM')
    assert_refused(refused, "sampler 'DDIM'", FLOW, "'Euler', 'DPM-Solver++'")


@pytest.mark.slow
def test_evaluation_compares_the_folded_flow(run: Path, tmp_path: Path) -> None:
    images = load_run(run, data=True).parts.images
    assert images is not None
    encoder = tmp_path / 'encoder.safetensors'
    train_encoder(images, encoder, steps=5, workers=0)
    plan = Plan(num_samples=4, steps=2, extractor=str(encoder), fold='exact', workers=0, metrics=('fid',))
    unfolded, folded = evaluate_runs([run], plan)
    assert unfolded.provenance['sampler'] == 'Euler'
    assert folded.numbers['pixels'] < 0.1
    assert folded.numbers['fid'] == pytest.approx(unfolded.numbers['fid'], rel=1e-3)


def test_an_analysis_sees_the_flow_from_image_to_noise(run: Path) -> None:
    found = load_run(run, data=True)
    batch = NoisyImages(found, 4)[0]
    clean, noise, t = (batch['truth'][key] for key in ('image', 'noise', 'timestep'))
    assert t.unique().tolist() == [50.0 + 100 * n for n in range(10)]
    sigma = (t / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(batch['args'][0], (1 - sigma) * clean + sigma * noise)
    folded = fold_run(found)[0]
    assert loss_over(found, 4, folded) == pytest.approx(loss_over(found, 4, found.parts.model), rel=1e-4)
    assert loss_over(found, 4, folded) > 0.5


# DiT, and what starts from what is shipped ----------------------------------------------------------------------------


def latent_dit(folder: Path) -> dict[str, Any]:
    """Settings of a DiT on latents of classes."""
    vae().save_pretrained(folder / 'vae')
    return dict(
        model=dict(type='DiTTransformer2DModel', **DIT),
        vae=dict(pretrained_model_name_or_path=str(folder / 'vae')),
        data=dict(type='ImageFolder', path=str(write_images(folder / 'images')), resolution=16),
        condition=dict(type='ClassLabels', drop=0.1),
        noise_scheduler={**SCHEDULE, 'shift': 2.0},
    )


def test_a_latent_dit_ships_with_a_solver_that_its_pipeline_runs(tmp_path: Path) -> None:
    run = trained(tmp_path / 'run', **latent_dit(tmp_path), plug=ASR)
    out = tmp_path / 'out'
    assert fold_and_ship(load_run(run), out)['pipeline']
    pipeline = diffusers.DiTPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    streams = [torch.Generator().manual_seed(mix(0, 'image', n)) for n in range(3)]
    theirs = pipeline([0, 1, 2], 1, streams, num_inference_steps=6, output_type='pt').images
    found = load_run(run)
    sampler = build_sampler('DPM-Solver++', found.parts.scheduler)
    ours = generate(found.parts.model, found.parts, sampler, range(3), 6)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.02
    model = dict(type='DiTTransformer2DModel', pretrained_model_name_or_path=str(out))
    again = build_parts(config_for(tmp_path / 'on', **{**latent_dit(tmp_path), 'model': model, 'noise_scheduler': ...}))
    assert type(again.scheduler).__name__ == FLOW
    assert again.scheduler.config.shift == 2.0


@pytest.mark.slow
def test_a_dit_in_pixels_ships_with_code_that_samples(tmp_path: Path) -> None:
    model = dict(type='DiTTransformer2DModel', **{**DIT, 'in_channels': 1, 'out_channels': 1})
    model['num_embeds_ada_norm'] = 10
    run = trained(tmp_path, model=model, condition=dict(type='ClassLabels', drop=0.1), **SETTINGS)
    fold_and_ship(load_run(run), tmp_path / 'out')
    assert json.loads((tmp_path / 'out/scheduler/scheduler_config.json').read_text())['_class_name'] == FLOW
    code = (tmp_path / 'out/README.md').read_text().split('```python\n')[1].split('```')[0]
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(tmp_path / 'out')), scope)
    assert scope['images'].shape == (4, 1, 8, 8)
    assert scope['images'].isfinite().all()


def test_a_training_goes_on_from_a_shipped_flow(shipped: Path, tmp_path: Path) -> None:
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(shipped))
    parts = build_parts(config_for(tmp_path, model=model, noise_scheduler=...))
    assert isinstance(parts.process, Flow)
    said = dict(type='DDPMScheduler')
    done = call('diffusion/train.py', write_config(tmp_path, model=model, noise_scheduler=said), '--dry-run')
    assert_refused(done, "type='DDPMScheduler'", f"type='{FLOW}'", str(shipped))
    stock = tmp_path / 'ddpm'
    diffusers.DDPMPipeline(diffusers.UNet2DModel(**UNET), diffusers.DDPMScheduler()).save_pretrained(stock)
    config = write_config(tmp_path, model={**model, 'pretrained_model_name_or_path': str(stock)}, **SETTINGS)
    assert_refused(call('diffusion/train.py', config, '--dry-run'), f"type='{FLOW}'", "type='DDPMScheduler'")
