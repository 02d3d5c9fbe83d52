"""Self-attention of diffusion UNets replaced by LSTMs: distilled, resumed, pruned; what comes out is a run again."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.diffusion import ASR, UNET, assert_same, conditional_arguments, config_for, vae, weights, write_images
from mmengine.config import Config
from safetensors.torch import load_file

from asr_downstream.diffusion.evaluation.fold import compare, fold_run
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.export import fold_and_ship
from asr_downstream.diffusion.models.build import build_model
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.state import checkpoints
from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.far.config import load_config
from asr_downstream.far.distil.loss import Features
from asr_downstream.far.distil.stages import build_task, load_teacher, replaced, run_stages
from asr_downstream.far.export import load_far
from asr_downstream.far.family import prune_family, ship_trained
from asr_downstream.far.model.describe import describe
from asr_downstream.far.model.replace import find_attentions
from asr_downstream.far.prune.budgets import Budget
from asr_downstream.measure import cost
from asr_downstream.plugging.describe import describe as describe_gates

ATTENTIONS = [
    'down_blocks.1.attentions.0', 'up_blocks.0.attentions.0', 'up_blocks.0.attentions.1', 'mid_block.attentions.0',
]  # fmt: skip
STAGES = [
    dict(name='distill', learns='replacements', distance=dict(type='MSE', feature='heads'), max_train_steps=3),
    dict(name='finetune', learns='all', max_train_steps=2, validation_steps=2),
]
SHORT = dict(learns='all', max_train_steps=1)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock run of three steps."""
    return train(config_for(tmp_path_factory.mktemp('teacher'), plug=None, max_train_steps=3)).parent


def write_far(folder: Path, run: Path, **settings: Any) -> Path:
    """Write a FAR config with two short stages."""
    content = {
        'task': dict(type='Denoising'),
        'teacher': dict(run=str(run)),
        'train_batch_size': 4,
        'learning_rate': 1e-2,
        'use_ema': True,
        'checkpointing_steps': 1,
        'checkpoints_total_limit': None,
        'validation_steps': 0,
        'dataloader_num_workers': 0,
        'report_to': [],
        'stages': STAGES,
        'prune': dict(sparse=dict(hoyer=1e-2, **SHORT), finetune=SHORT),
        **settings,
    }
    path = folder / 'far.py'
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in content.items()) + '\n')
    return path


def far_config(folder: Path, run: Path, **settings: Any) -> Config:
    return load_config(write_far(folder, run, **settings))


@pytest.fixture(scope='module')
def distilled(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages; on one thread, as the command is run here."""
    folder, threads = tmp_path_factory.mktemp('distilled'), torch.get_num_threads()
    torch.set_num_threads(1)
    distil(write_far(folder, teacher), '--output-dir', folder / 'out')
    torch.set_num_threads(threads)
    return folder / 'out'


def distil(*arguments: object) -> None:
    """Run tools/distill_far.py, in this process: most of its time is imports."""
    runpy.run_path(str(ROOT / 'tools/distill_far.py'))['main']([str(argument) for argument in arguments])


def sampled(path: Path) -> torch.Tensor:
    """Two images of a run."""
    run = load_run(path)
    return generate(run.parts.model, run.parts, build_sampler('DDIM', run.parts.scheduler), range(2), 3)


# What comes out -------------------------------------------------------------------------------------------------------


def test_what_comes_out_is_a_run(teacher: Path, distilled: Path, tmp_path: Path) -> None:
    finetune = distilled / 'finetune'
    run = load_run(finetune)
    assert (run.step, run.ema) == (2, True)
    assert run.config.replace['layers'] == ATTENTIONS
    assert (run.config.max_train_steps, run.config.train_batch_size, run.config.learning_rate) == (2, 4, 1e-2)
    assert run.config.noise_scheduler == load_run(teacher).config.noise_scheduler
    assert [row.path for row in describe(run.parts.model).rows] == ATTENTIONS
    assert sampled(finetune).shape == (2, 1, 8, 8)
    assert not torch.equal(sampled(finetune), sampled(distilled / 'distill'))
    assert (finetune / 'samples/step-0000002.png').is_file()

    # of the teacher's average, all but queries, keys and values is in the distilled student, untouched
    original = load_file(checkpoints.find(teacher) / 'ema.safetensors')
    latest = load_file(checkpoints.find(teacher) / 'model.safetensors')
    assert any(not torch.equal(value, latest[name]) for name, value in original.items())
    student = load_file(distilled / 'distill/checkpoint-3/model.safetensors')
    shared = original.keys() & student.keys()
    assert {name.split('.')[-2] for name in original.keys() - shared} == {'to_q', 'to_k', 'to_v'}
    assert all(torch.equal(original[name], student[name]) for name in shared)
    before = replaced(far_config(tmp_path, teacher), load_run(teacher).parts.model).state_dict()
    assert all(not torch.equal(before[name], student[name]) for name in student.keys() - shared)


def begun(distilled: Path, out: Path) -> Path:
    """The stages as they were when the first was stopped after two steps."""
    for step in (1, 2):
        shutil.copytree(distilled / f'distill/checkpoint-{step}', out / f'distill/checkpoint-{step}')
    return out


@pytest.mark.slow
def test_a_stage_continues_bit_for_bit(
    teacher: Path, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, path = begun(distilled, tmp_path / 'cut'), write_far(tmp_path, teacher)
    distil(path, '--output-dir', cut, '--resume')
    assert 'checkpoint-2, step 2' in capsys.readouterr().out
    for name in ('distill/checkpoint-3', 'finetune/checkpoint-2'):
        assert_same(distilled / name, cut / name)
    run = load_run(cut / 'finetune')
    inputs = run.parts.inputs(2)
    with torch.no_grad():
        assert torch.equal(load_far(cut / 'shipped/FAR-100')(**inputs).sample, run.parts.model(**inputs).sample)
    shutil.rmtree(cut / 'distill/checkpoint-3')
    with pytest.raises(CheckpointError, match=r'trained with task_weight=1.0, the config says 0.5'):
        run_stages(far_config(tmp_path, teacher, task_weight=0.5), cut, resume=True)


@pytest.mark.slow
def test_a_process_of_its_own_continues_bit_for_bit(teacher: Path, distilled: Path, tmp_path: Path) -> None:
    cut, path = begun(distilled, tmp_path / 'cut'), write_far(tmp_path, teacher)
    command = [sys.executable, '-W', 'ignore', 'tools/distill_far.py', str(path), '--output-dir', str(cut), '--resume']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    for said in ('distill: replacements learn', 'finetune: finished before'):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        for name in ('distill/checkpoint-3', 'finetune/checkpoint-2'):
            assert_same(distilled / name, cut / name)


@pytest.mark.slow
def test_members_of_a_pruned_family_are_runs(teacher: Path, distilled: Path, tmp_path: Path) -> None:
    config, out = far_config(tmp_path, teacher), distilled
    assert [p.name for p in prune_family(config, out, [Budget('units', 0.5), Budget('latency', 1.0)])] == [
        'FAR-50', 'FAR-latency-100',
    ]  # fmt: skip
    run = load_run(out / 'FAR-50')
    widths = run.config.replace['widths']
    rows = describe(run.parts.model).rows
    assert {row.path: [list(pair) for pair in row.widths] for row in rows} == {k: widths[k] for k in ATTENTIONS}
    assert sum(row.units for row in rows) <= 0.5 * sum(row.full for row in rows)
    assert cost.parameters(run.parts.model) < cost.parameters(load_run(out / 'finetune').parts.model)
    assert sampled(out / 'FAR-50').isfinite().all()
    inputs = run.parts.inputs(2)
    with torch.no_grad():
        assert torch.equal(load_far(out / 'shipped/FAR-50')(**inputs).sample, run.parts.model(**inputs).sample)


def test_features_of_a_unet(teacher: Path, tmp_path: Path) -> None:
    parts = load_run(teacher).parts
    model = parts.model
    student = replaced(far_config(tmp_path, teacher), model)
    places = find_attentions(model)
    sides = dict.fromkeys(ATTENTIONS, 4)
    for feature in ('heads', 'attention', 'block'):
        with torch.no_grad(), Features(model, places, feature) as wanted, Features(student, places, feature) as own:
            model(**parts.inputs(2))
            student(**parts.inputs(2))
        for path, side in sides.items():
            shape = (2, side * side, 32) if feature == 'heads' else (2, 32, side, side)
            assert wanted.found[path].shape == own.found[path].shape == shape, (feature, path)
            assert not torch.equal(wanted.found[path], own.found[path])


@pytest.mark.slow
def test_other_features_are_learnt_from(teacher: Path, tmp_path: Path) -> None:
    stage = dict(name='distill', distance=dict(type='Cosine', feature='attention'), max_train_steps=1)
    run_stages(far_config(tmp_path, teacher, stages=[stage]), tmp_path / 'out')
    assert sampled(tmp_path / 'out/distill').isfinite().all()


# Other runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_latent_run_with_classes(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / 'vae')
    latents = dict(pretrained_model_name_or_path=str(tmp_path / 'vae'))
    images = write_images(tmp_path / 'images')
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 4, 'out_channels': 4, 'num_class_embeds': 4})
    config = config_for(
        tmp_path, model=model, plug=None, max_train_steps=1, vae=latents,
        condition=dict(type='ClassLabels', drop=0.1), guidance_scale=2.0,
        data=dict(type='ImageFolder', path=str(images), resolution=16),
    )  # fmt: skip
    run = train(config).parent
    elsewhere = tmp_path / 'elsewhere'
    images.rename(elsewhere)
    far = load_config(write_far(tmp_path, run, stages=[dict(STAGES[0], max_train_steps=1)]), data=elsewhere)
    run_stages(far, tmp_path / 'out')
    found = load_run(tmp_path / 'out/distill', data=True)
    assert found.config.condition['classes'] == ['cat', 'dog', 'owl']
    assert (found.config.data['path'], found.config.data['resolution']) == (str(elsewhere), 16)
    assert sampled(tmp_path / 'out/distill').shape == (2, 3, 16, 16)


def test_self_attention_beside_cross_attention() -> None:
    spec = dict(type='FAR')
    model = dict(type='UNet2DConditionModel', **conditional_arguments())
    found = build_model(Config(dict(seed=0, model=model, plug=None, replace=spec)))
    paths = [row.path for row in describe(found).rows]
    assert len(paths) == 4
    assert all(path.endswith('attn1') for path in paths)


@pytest.mark.slow
def test_a_plugged_run(tmp_path: Path) -> None:
    run = train(config_for(tmp_path, plug=ASR, max_train_steps=1)).parent
    config = far_config(tmp_path, run, stages=[dict(STAGES[0], learns='all', max_train_steps=1)])
    out = tmp_path / 'out'
    run_stages(config, out)
    found = load_run(out / 'distill')
    assert len(describe_gates(found.parts.model).sites) == 12
    folded = fold_run(found)[0]
    assert compare(found, folded)['float64']['model'] < 1e-10
    assert [row.path for row in describe(folded).rows] == ATTENTIONS
    ship_trained(config, out)
    inputs = found.parts.inputs(2)
    with torch.no_grad():
        shipped, own = (m(**inputs).sample for m in (load_far(out / 'shipped/FAR-100'), found.parts.model))
    assert (shipped - own).abs().max() <= 1e-5 * own.abs().max()
    report = fold_and_ship(found, tmp_path / 'shipped')  # gates folded, for this package
    with torch.no_grad():
        again = load_far(tmp_path / 'shipped')(**inputs).sample
    assert report['replaced']
    assert (again - own).abs().max() <= 1e-5 * own.abs().max()
    other = dict(type='FAR', variant='M1')
    with pytest.raises(PlugError, match=r"gates of down_blocks.1.attentions.0.to_out.0.*variant='M3'"):
        run_stages(far_config(tmp_path, run, replace=other, stages=[STAGES[1]]), tmp_path / 'other')


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(teacher=dict(run='nowhere/run')), 'nowhere/run: no such run; train it with diffusion/train.py first'),
        (dict(teacher=dict(run='tests')), r'tests: is no run of diffusion/train.py'),
        (dict(teacher=dict(type='ViTForImageClassification')), r"should be dict\(run='work_dirs/...'\)"),
        (dict(stages=[dict(name='teacher', learns='teacher')]), 'train it with diffusion/train.py'),
        (dict(image_mean=[0.5], image_std=[0.5]), 'image_mean, image_std: is of Classification'),
    ],
    ids=['missing', 'no-run', 'no-folder', 'learns-teacher', 'classification'],
)
def test_errors(teacher: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AsrError, match=message):
        run_stages(far_config(tmp_path, teacher, **settings), tmp_path / 'out')
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.name not in ('far.py', '.lock')]


def test_a_run_without_self_attention(tmp_path: Path) -> None:
    plain = dict(
        down_block_types=('DownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'UpBlock2D'), add_attention=False
    )
    run = train(config_for(tmp_path, plug=None, model=dict(type='UNet2DModel', **{**UNET, **plain}), max_train_steps=1))
    with pytest.raises(PlugError, match='UNet2DModel: has no self-attention'):
        run_stages(far_config(tmp_path, run.parent), tmp_path / 'out')


@pytest.mark.slow
def test_the_teacher_is_the_average(teacher: Path, tmp_path: Path) -> None:
    config = far_config(tmp_path, teacher)
    found = load_teacher(config, tmp_path)
    average = {k.removeprefix('ema.'): v for k, v in weights(checkpoints.find(teacher)).items() if k.startswith('ema.')}
    assert all(torch.equal(value, average[name]) for name, value in found.state_dict().items())
    assert {'sample', 'timestep'} == set(build_task(config, found).example())
