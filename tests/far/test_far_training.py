"""FAR trainings: stages, resume, distances, families, through the library and the real commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command
from helpers.far import CASES, FAR, launch, vit, write_config
from huggingface_hub import ModelCard
from mmengine.config import Config
from safetensors.torch import load_file

from asr_downstream.engine.data.augment import AUGMENTATIONS, build_augmentations
from asr_downstream.engine.optim import build_schedule
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.far.config import derived, load_config, stage_config, with_epochs
from asr_downstream.far.distil.classification import Classification, split
from asr_downstream.far.distil.loss import DISTANCES, Features, check_feature
from asr_downstream.far.distil.stages import build_task, finished, load_student, load_teacher, run_stages
from asr_downstream.far.distil.task import Distillation
from asr_downstream.far.evaluation.evaluate import load_family
from asr_downstream.far.evaluation.token_relations import attention_maps, mixer_maps, similarity
from asr_downstream.far.export import load_far
from asr_downstream.far.model.replace import find_attentions, replace
from asr_downstream.far.model.trainable import block_of
from asr_downstream.modules.seeds import generator
from asr_downstream.registry import TASKS, build


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.find(run) / 'model.safetensors')


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool trained all stages."""
    folder = tmp_path_factory.mktemp('far')
    done = launch('distill_far', write_config(folder), '--output-dir', folder / 'out')
    assert done.returncode == 0, done.stderr
    assert 'stage 3/3, finetune: all learn' in done.stdout
    assert 'val/accuracy' in done.stdout
    return folder


def test_the_stages_train_what_they_say(run: Path) -> None:
    teacher, distilled, tuned = (weights(run / 'out' / name) for name in ('teacher', 'distill', 'finetune'))
    for name, value in teacher.items():
        if name in distilled:
            assert torch.equal(distilled[name], value), name  # frozen, the output projection as well
    assert {n for n in teacher if n not in distilled} == {
        f'vit.layers.{layer}.attention.{qkv}_proj.{kind}'
        for layer in range(2) for qkv in 'qkv' for kind in ('weight', 'bias')
    }  # fmt: skip
    moved = [name for name in distilled if not torch.equal(distilled[name], tuned[name])]
    assert any('mixer' in name for name in moved)
    assert any('mlp' in name for name in moved)
    rows = read_log(run / 'out' / 'distill' / 'log.jsonl', having='loss')
    assert [row['step'] for row in rows] == list(range(1, 7))
    for row in rows:
        blocks = [v for k, v in row.items() if k.startswith('distance/')]
        assert len(blocks) == 2
        assert row['distance'] == pytest.approx(sum(blocks), rel=1e-5)
        assert row['loss'] == pytest.approx(row['task'] + row['distance'], rel=1e-5)


def test_the_shipped_models_are_those_that_were_trained(run: Path) -> None:
    config = load_config(run / 'tiny.py')
    models = load_family(run / 'out')
    assert list(models) == ['teacher', 'FAR-100']
    for name, model in {
        'teacher': load_teacher(config, run / 'out'), 'FAR-100': load_student(config, run / 'out', 'finetune')
    }.items():  # fmt: skip
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in models[name].state_dict().items())


def test_a_family_is_pruned_and_evaluated(run: Path) -> None:
    out = run / 'out'
    done = command('prune_far', run / 'tiny.py', '--output-dir', out, '--keep', 0.5, '--parameters', 0.9)
    assert done.returncode == 0, done.stderr
    assert 'FAR-50: threshold' in done.stdout
    assert '32 of 64 hidden units stay' in done.stdout
    found = load_family(out)
    assert list(found)[:2] == ['teacher', 'FAR-100']
    assert {'FAR-50', 'FAR-parameters-90'} < set(found)
    rows = read_log(out / 'sparse' / 'log.jsonl', having='loss')
    assert rows[0]['loss'] == pytest.approx(rows[0]['task'] + 1e-3 * rows[0]['hoyer'], rel=1e-5)
    again = command('prune_far', run / 'tiny.py', '--output-dir', out, '--keep', 0.5, '--resume')
    assert again.returncode == 0, again.stderr
    assert 'sparse: finished before' in again.stdout
    assert 'FAR-50: finished before' in again.stdout

    done = command('evaluate_far', out, '--rounds', 2, '--relations', 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / 'evaluation.json').read_text())
    assert report['models']['FAR-50']['units'] == 32
    assert report['models']['FAR-50']['parameters'] < report['models']['FAR-100']['parameters']
    assert 0 <= report['models']['teacher']['accuracy'] <= 1
    assert set(report['relations']) >= {'FAR-100', 'FAR-50', 'not trained', 'uniform'}
    assert (out / 'relations.png').stat().st_size > 10_000
    for name, row in report['models'].items():
        (result,) = ModelCard.load(out / 'shipped' / name / 'README.md').data.eval_results
        assert (result.task_type, result.metric_type) == ('image-classification', 'accuracy')
        assert result.metric_value == row['accuracy']
        assert result.metric_args == {'images': report['images']}
        load_far(out / 'shipped' / name)


def test_a_config_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, replace=dict(type='FAR', layers=[99])))
    with pytest.raises(PlugError, match='99'):
        run_stages(config, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_resume_gives_the_same_weights_and_passes_over_finished_stages(run: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    shutil.copytree(run / 'out', out, ignore=shutil.ignore_patterns('finetune', 'sparse', 'FAR-*', 'shipped'))
    shutil.rmtree(out / 'distill' / 'checkpoint-6')
    done = command('distill_far', run / 'tiny.py', '--output-dir', out, '--resume')
    assert done.returncode == 0, done.stderr
    assert 'teacher: finished before' in done.stdout
    assert 'resumed from' in done.stdout
    for stage in ('distill', 'finetune'):
        a, b = weights(run / 'out' / stage), weights(out / stage)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_whether_a_stage_is_finished_is_read_from_its_checkpoint(run: Path) -> None:
    config = load_config(run / 'tiny.py', {'data': dict(type='ImageFolder', path='/gone', resolution=8)})
    assert [finished(config, run / 'out', stage['name']) for stage in config.stages] == [True] * len(config.stages)
    longer = load_config(run / 'tiny.py', {'stages.0.max_train_steps': 10_000})
    assert not finished(longer, run / 'out', 'teacher')
    assert not finished(config, run / 'nothing', 'teacher')
    other = load_config(run / 'tiny.py', {'holdout': 0.3})
    with pytest.raises(CheckpointError, match='holdout'):
        finished(other, run / 'out', 'teacher')


def test_tasks_are_found_by_name_and_may_be_a_users_own(tmp_path: Path) -> None:
    @TASKS.register_module(name='Quiet', force=True)
    class Quiet(Classification):
        def __init__(self, config: Config, model: Any, loudness: int = 0) -> None:
            super().__init__(config, model)
            self.loudness = loudness

    config = load_config(write_config(tmp_path, task=dict(type='Quiet', loudness=3)))
    assert build_task(config).loudness == 3
    with pytest.raises(AsrError, match="task: Quiet takes no 'loud'; did you mean 'loudness'"):
        build_task(load_config(write_config(tmp_path, task=dict(type='Quiet', loud=3))))
    with pytest.raises(AsrError, match='task: Quiet takes no .model.'):
        build_task(load_config(write_config(tmp_path, task=dict(type='Quiet', model=3))))
    with pytest.raises(AsrError, match="did you mean 'Denoising'"):
        build_task(load_config(write_config(tmp_path, task=dict(type='Denoise'))))


def test_a_second_run_in_the_folder_needs_resume(run: Path) -> None:
    done = command('distill_far', run / 'tiny.py', '--output-dir', run / 'out')
    assert done.returncode == 1
    assert 'continue it with --resume' in done.stderr


def test_dry_run_says_what_would_be_done(tmp_path: Path) -> None:
    path = write_config(tmp_path, epochs=2.0)
    done = command('distill_far', path, '--output-dir', tmp_path / 'out', '--dry-run')
    assert done.returncode == 0, done.stderr
    assert '2 attentions replaced' in done.stdout
    assert 'distill: replacements learn, 203 steps' in done.stdout  # 2 x 1,617 images in batches of 16
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'teacher': None}, "has no 'teacher'"),
        ({'stages': []}, 'has no stages'),
        ({'stages': [dict(name='a'), dict(name='a')]}, 'a name of its own'),
        ({'stages': [dict(name='a', learns='head')]}, "learns='head' is not known"),
        ({'stages': [dict(name='a', epoch=3)]}, "did you mean 'epochs'"),
        ({'task': dict(type='Detection')}, 'should be dict'),
        ({'teacher': dict(type='ResNet')}, 'is not trained here'),
        ({'teacher': dict(type='ViTForImageClassification', imagesize=8)}, "did you mean 'image_size'"),
        ({'data': dict(type='Digits', resolution=16)}, 'does not fit image_size=8'),
        ({'holdout': 0.0}, 'should be a share'),
        ({'augment': [dict(type='Mixup')]}, 'unknown augmentation'),
        ({'image_mean': [0.5]}, 'give both'),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AsrError, match=message):
        run_stages(load_config(write_config(tmp_path, **settings)), tmp_path / 'out')
    assert not checkpoints.checkpoints_in(tmp_path / 'out' / 'teacher')


def distillation(tmp_path: Path, replaced: dict[str, Any], **settings: Any) -> Distillation:
    config = load_config(write_config(tmp_path))
    stage = stage_config(config, 'distill', **settings)
    base = Classification(stage)
    teacher = base.model
    student = vit()
    student.load_state_dict(teacher.state_dict())
    replace(student, {**FAR, **replaced})
    return Distillation(Classification(stage, student), teacher, stage)


@pytest.mark.parametrize(
    ('replaced', 'settings', 'message'),
    [
        ({'variant': 'M1'}, {}, 'needs variant M2 or M3'),
        ({}, {'distance': dict(type='MSE', feature='layer')}, "feature='layer' is not known"),
        ({}, {'distance': dict(type='Cosine', feature='block', axis='batch')}, "axis='batch'"),
        ({}, {'distance': dict(type='L1')}, 'unknown distance'),
        ({}, {'gradient_checkpointing': True}, 'gradient_checkpointing hides'),
        ({}, {'torch_compile': True}, 'torch_compile hides'),
        ({}, {'distance': None, 'task_weight': 0.0}, 'nothing to learn'),
    ],
)
def test_distillations_that_make_no_sense(
    tmp_path: Path, replaced: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AsrError, match=message):
        distillation(tmp_path, replaced, **settings)


@pytest.mark.parametrize('feature', ['heads', 'attention', 'block'])
def test_teacher_and_student_that_are_equal_have_no_distance(feature: str) -> None:
    case = CASES['ViT']
    teacher = case.model()
    places = find_attentions(teacher)
    with torch.no_grad(), Features(teacher, places, feature) as a:
        case.output(teacher)
    with torch.no_grad(), Features(teacher, places, feature) as b:
        case.output(teacher)
    assert a.found.keys() == {'vit.layers.0.attention', 'vit.layers.1.attention'}
    for spec in (dict(type='MSE'), dict(type='Cosine', axis='tokens'), dict(type='Cosine', axis='channels')):
        distance = build(DISTANCES, spec)
        one, other = a.found['vit.layers.0.attention'], a.found['vit.layers.1.attention']
        assert float(distance(one, b.found['vit.layers.0.attention'])) == pytest.approx(0, abs=1e-6)
        assert float(distance(one, other)) > 1e-3
    assert not teacher.vit.layers[0]._forward_hooks  # none is left behind


def test_cosine_over_tokens_is_not_cosine_over_channels() -> None:
    a, b = torch.randn(2, 5, 3, generator=generator(0)), torch.randn(2, 5, 3, generator=generator(1))
    over_tokens, over_channels = (build(DISTANCES, dict(type='Cosine', axis=axis)) for axis in ('tokens', 'channels'))
    assert over_tokens(a, b) == pytest.approx(1 - float(torch.nn.CosineSimilarity(dim=1)(a, b).mean()))
    assert over_channels(a, b) == pytest.approx(1 - float(torch.nn.CosineSimilarity(dim=2)(a, b).mean()))
    maps = [x.mT.unflatten(-1, (5, 1)) for x in (a, b)]  # (B, C, H, W): pixels are tokens
    assert over_tokens(*maps) == pytest.approx(float(over_tokens(a, b)))
    assert over_channels(*maps) == pytest.approx(float(over_channels(a, b)))


def test_blocks_of_attentions() -> None:
    unet = CASES['UNet2DModel'].model()
    assert block_of(CASES['ViT'].model(), 'vit.layers.1.attention') == 'vit.layers.1'
    assert block_of(unet, 'mid_block.attentions.0') == 'mid_block.attentions.0'
    with pytest.raises(PlugError, match='does not call its projection'):
        check_feature('heads', 'M3', find_attentions(CASES['TransformerEncoder'].model()))


def test_epochs_become_steps() -> None:
    config = Config(
        dict(train_batch_size=8, gradient_accumulation_steps=2, epochs=3, max_train_steps=1, warmup_epochs=0.5,
             lr_warmup_steps=0)
    )  # fmt: skip
    given, config = config, with_epochs(config, 100, 2)
    assert (given.max_train_steps, given.epochs) == (1, 3)
    assert (config.max_train_steps, config.lr_warmup_steps) == (10, 2)  # 300 / 32, 50 / 32, rounded up
    assert config.epochs is None


def test_the_same_images_are_held_out_for_every_seed() -> None:
    train, held_out = split(100, 0.1)
    assert (train, held_out) == split(100, 0.1)
    assert sorted(train + held_out) == list(range(100))
    assert len(held_out) == 10


@pytest.mark.parametrize('name', sorted(AUGMENTATIONS.module_dict))
def test_augmentations_follow_from_the_stream_and_keep_shape_and_range(name: str) -> None:
    (augmentation,) = build_augmentations([dict(type=name, **({'padding': 2} if name == 'Crop' else {}))])
    image = torch.rand(3, 9, 7, generator=generator(0)) * 2 - 1
    before = image.clone()
    found = [augmentation(image, generator(number)) for number in range(20)]
    assert torch.equal(image, before)
    assert all(x.shape == image.shape and x.abs().max() <= 1 + 1e-6 for x in found)
    assert any(not torch.equal(x, image) for x in found)
    again = [augmentation(image, generator(number)) for number in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_token_relations() -> None:
    case = CASES['ViT']
    teacher = case.model()
    inputs = {name: value.double() for name, value in case.inputs().items()}
    maps = attention_maps(teacher, find_attentions(teacher), inputs)
    student = case.model()
    replace(student, FAR)
    influence = mixer_maps(student, inputs)
    assert maps.keys() == influence.keys() == set(case.attentions)
    for found in (*maps.values(), *influence.values()):
        assert found.shape == (3, 5, 5)
        assert torch.allclose(found.sum(-1), torch.ones(3, 5, dtype=found.dtype))
    one = maps[case.attentions[0]]
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(one, influence[case.attentions[0]]) < 0.999


@pytest.mark.parametrize('path', sorted((ROOT / 'tools' / 'far_configs').glob('*.py')), ids=lambda path: path.stem)
def test_configs(path: Path) -> None:
    config = load_config(path)
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    for settings in [stage_config(config, stage['name']) for stage in config.stages]:
        build_schedule(optimiser, with_epochs(settings, 1000, 1))
    for settings in config.prune.values():
        derived(config, 'pruning', settings)
    opening = path.read_text().partition('\n\n')[0].partition('=')[0]
    assert f'tools/far_configs/{path.name}' in opening


def test_a_pretrained_folder_is_a_teacher(tmp_path: Path) -> None:
    model = vit('DeiT')
    model.save_pretrained(tmp_path / 'deit')
    spec = dict(type='DeiTForImageClassification', pretrained_model_name_or_path=str(tmp_path / 'deit'))
    half = {'image_mean': [0.5], 'image_std': [0.5]}
    config = load_config(write_config(tmp_path, teacher=spec, stages=[dict(name='distill')], **half))
    teacher = load_teacher(config, tmp_path / 'out')
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters(), strict=True))
    model.bfloat16().save_pretrained(tmp_path / 'deit')  # in which the steps of an optimiser would be rounded away
    assert {p.dtype for p in load_teacher(config, tmp_path / 'out').parameters()} == {torch.float32}
    missing = {**spec, 'pretrained_model_name_or_path': str(tmp_path / 'none')}
    with pytest.raises(AsrError, match='cannot be made from'):
        load_teacher(load_config(write_config(tmp_path, teacher=missing)), tmp_path / 'out')


@pytest.mark.slow
def test_two_processes_with_half_the_batch_distil_as_one_with_the_whole(tmp_path: Path) -> None:
    for name, batch, processes in (('one', 16, 1), ('two', 8, 2)):
        path = write_config(tmp_path / name, train_batch_size=batch, validation_steps=0)
        done = launch('distill_far', path, '--output-dir', tmp_path / name / 'out', processes=processes)
        assert done.returncode == 0, done.stderr
    for stage in ('teacher', 'distill', 'finetune'):
        one, two = (weights(tmp_path / name / 'out' / stage) for name in ('one', 'two'))
        assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one), stage
    assert (tmp_path / 'two' / 'out' / 'shipped' / 'FAR-100' / 'far.json').is_file()


def test_averages_half_precision_and_accumulation(tmp_path: Path) -> None:
    options = {'mixed_precision': 'bf16', 'use_ema': True, 'gradient_accumulation_steps': 2, 'max_train_steps': 3}
    config = load_config(write_config(tmp_path, **options, validation_steps=0))
    run_stages(config, tmp_path / 'out')
    last = checkpoints.find(tmp_path / 'out' / 'finetune')
    average, raw = load_file(last / 'ema.safetensors'), weights(tmp_path / 'out' / 'finetune')
    assert {value.dtype for value in raw.values()} == {torch.float32}
    student = load_student(config, tmp_path / 'out', 'finetune').state_dict()
    assert all(torch.equal(student[name], average[name]) for name in raw)
    assert any(not torch.equal(average[name], raw[name]) for name in raw)
    with pytest.raises(AsrError, match='has checkpoints of an earlier run'):
        run_stages(config, tmp_path / 'out')
