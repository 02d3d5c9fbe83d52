"""Values of configs are checked before anything is built: one line for a value of the wrong kind or out of range."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from helpers.diffusion import assert_refused, call
from helpers.diffusion import write_config as write_diffusion
from helpers.far import write_config as write_far
from pydantic import Field

from asr_downstream.diffusion.config import SCHEMA as DIFFUSION
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.engine.data.augment import build_augmentations
from asr_downstream.engine.data.images import build_images
from asr_downstream.engine.values import check_values
from asr_downstream.errors import AsrError, PlugError
from asr_downstream.far.config import SCHEMA as FAR
from asr_downstream.far.config import load_config as load_far
from asr_downstream.far.distil.loss import Distance

nan, inf = math.nan, math.inf
SHARED: list[tuple[str, Any, str]] = [
    ('data', 5, 'data=5 should be dict'),
    ('max_train_steps', 0, 'max_train_steps=0 should be greater than 0'),
    ('max_train_steps', 2.5, 'should be int or None'),
    ('train_batch_size', -1, 'should be greater than 0'),
    ('gradient_accumulation_steps', 0, 'should be greater than 0'),
    ('learning_rate', nan, 'learning_rate=nan should be '),
    ('learning_rate', inf, 'learning_rate=inf should be finite'),
    ('learning_rate', 0, 'should be greater than 0'),
    ('lr_scheduler', 3, 'lr_scheduler=3 is not known'),
    ('lr_warmup_steps', -1, 'lr_warmup_steps=-1 should be at least 0'),
    ('lr_scheduler_kwargs', [], 'should be dict'),
    ('adam_beta1', 1.0, 'adam_beta1=1.0 should be at least 0 and less than 1'),
    ('adam_beta1', -0.1, 'adam_beta1=-0.1 should be at least 0 and less than 1'),
    ('adam_beta2', nan, 'adam_beta2=nan should be'),
    ('adam_beta2', True, 'adam_beta2=True should be float'),
    ('adam_weight_decay', -1, 'should be at least 0'),
    ('adam_weight_decay', inf, 'should be finite'),
    ('adam_epsilon', -1e-8, 'adam_epsilon=-1e-08 should be at least 0'),
    ('adam_epsilon', nan, 'adam_epsilon=nan should be'),
    ('max_grad_norm', -1, 'should be greater than 0'),
    ('max_grad_norm', nan, 'max_grad_norm=nan should be greater than 0'),
    ('ema_max_decay', 1.5, 'ema_max_decay=1.5 should be at least 0 and at most 1'),
    ('ema_inv_gamma', 0, 'ema_inv_gamma=0 should be greater than 0'),
    ('ema_inv_gamma', nan, 'ema_inv_gamma=nan should be'),
    ('ema_power', -1, 'ema_power=-1 should be at least 0'),
    ('ema_power', inf, 'ema_power=inf should be finite'),
    ('seed', 2**64, 'should be at least -9,223,372,036,854,775,808 and less than 18,446,744,073,709,551,616'),
    ('seed', 0.5, 'seed=0.5 should be int'),
    ('mixed_precision', ['fp16'], "mixed_precision=['fp16'] is not known"),
    ('dataloader_num_workers', -1, 'dataloader_num_workers=-1 should be at least 0'),
    ('logging_steps', 0, 'should be greater than 0'),
    ('checkpointing_steps', -3, 'should be greater than 0'),
    ('checkpoints_total_limit', 0, 'should be greater than 0'),
    ('report_to', [['tensorboard']], "use 'tensorboard', 'wandb'"),
    ('report_to', 'tensorboard', 'should be list'),
    ('validation_steps', -1, 'validation_steps=-1 should be at least 0'),
    ('output_dir', 3, 'should be str or None'),
    ('custom_imports', ['a'], 'should be dict or None'),
]
OF_DIFFUSION = [
    ('model', 5, 'model=5 should be dict or None'),
    ('plug', 5, 'plug=5 should be dict or list or None'),
    ('snr_gamma', 0, 'should be greater than 0'),
    ('snr_gamma', nan, 'snr_gamma=nan should be'),
    ('num_inference_steps', 0, 'should be greater than 0'),
    ('guidance_scale', nan, 'guidance_scale=nan should be finite'),
    ('guidance_scale', inf, 'guidance_scale=inf should be finite'),
]
OF_FAR = [
    ('holdout', nan, 'holdout=nan should be a share between 0 and 1'),
    ('augment', [5], 'augment[0]=5 should be dict'),
    ('image_mean', ['a'], "image_mean[0]='a' should be float"),
    ('image_std', [0.0], 'image_std[0]=0.0 should be greater than 0'),
    ('image_std', [nan], 'image_std[0]=nan should be'),
    ('stages', [5], 'stages[0]=5 should be dict'),
    ('learns', 'head', "learns='head' is not known; Known: all, blocks"),
    ('task_weight', nan, 'task_weight=nan should be'),
    ('hoyer', -1, 'hoyer=-1 should be at least 0'),
    ('prune', dict(sparse=5), "prune['sparse']=5 should be dict"),
    ('epochs', inf, 'epochs=inf should be finite'),
    ('epochs', nan, 'epochs=nan should be'),
    ('warmup_epochs', -1, 'should be at least 0'),
    ('distance', 5, 'distance=5 should be dict or list or None'),
    ('distance', [dict(type='MSE'), 5], "distance=[{'type': 'MSE'}, 5] should be dict or list or None"),
]


@pytest.mark.parametrize(('key', 'value', 'message'), [*SHARED, *OF_DIFFUSION], ids=str)
def test_values_of_a_diffusion_config(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = write_diffusion(tmp_path)
    with pytest.raises(AsrError) as caught:
        DIFFUSION.load(path, {key: value})
    assert str(caught.value).startswith(f'{path}: {key}')
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('key', 'value', 'message'), [*SHARED, *OF_FAR], ids=str)
def test_values_of_a_far_config(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = write_far(tmp_path)
    with pytest.raises(AsrError) as caught:
        load_far(path, {key: value})
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('schema', 'key', 'value'),
    [
        (DIFFUSION, 'max_grad_norm', inf),
        (DIFFUSION, 'snr_gamma', inf),
        (DIFFUSION, 'seed', -1),
        (DIFFUSION, 'learning_rate', 1),
        (DIFFUSION, 'ema_max_decay', 1.0),
        (DIFFUSION, 'adam_epsilon', 0),
        (DIFFUSION, 'report_to', ()),
        (FAR, 'image_mean', (0.5,)),
    ],
)
def test_values_at_the_border_are_kept_as_they_are(tmp_path: Path, schema: Any, key: str, value: Any) -> None:
    write = write_diffusion if schema is DIFFUSION else write_far
    config = schema.load(write(tmp_path), {key: value})
    assert config[key] == value
    assert type(config[key]) is type(value)


def test_every_key_has_a_default_of_its_kind() -> None:
    for schema in (DIFFUSION, FAR):
        check_values(schema.kinds, schema.defaults, 'defaults')


def test_no_key_takes_nan() -> None:
    for schema in (DIFFUSION, FAR):
        for key, kind in schema.kinds.items():
            with pytest.raises(AsrError, match=key):
                check_values({key: kind}, {key: nan}, 'x')


@pytest.mark.parametrize(
    ('key', 'settings', 'message'),
    [
        ('model', {'layers_per_block': -1}, 'model: layers_per_block=-1 should be greater than 0'),
        ('model', {'layers_per_block': [1, 0]}, 'model: layers_per_block[1]=0 should be greater than 0'),
        ('model', {'layers_per_block': 'a'}, "model: layers_per_block='a' should be int or list or None"),
        ('model', {'block_out_channels': 5}, 'model: block_out_channels=5 should be list'),
        ('model', {'norm_num_groups': 0}, 'model: norm_num_groups=0 should be greater than 0'),
        ('noise_scheduler', {'num_train_timesteps': 0}, 'noise_scheduler: num_train_timesteps=0 should be greater'),
        ('noise_scheduler', {'beta_end': nan}, 'noise_scheduler: beta_end=nan should be at least 0 and at most 1'),
    ],
)
def test_values_of_models_and_schedules(tmp_path: Path, key: str, settings: dict[str, Any], message: str) -> None:
    path = write_diffusion(tmp_path)
    config = DIFFUSION.load(path, {f'{key}.{name}': value for name, value in settings.items()})
    with pytest.raises(AsrError) as caught:
        build_parts(config)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(('change', 'said'), [({'norm_num_groups': 7}, 'ValueError'), ({'act_fn': 'x'}, 'Error')])
def test_what_diffusers_does_not_take_is_one_line_with_the_spec(tmp_path: Path, change: Any, said: str) -> None:
    options = [f'model.{key}={value}' for key, value in change.items()]
    done = call('diffusion/train.py', write_diffusion(tmp_path), '--dry-run', '--cfg-options', *options)
    assert_refused(done, said, 'in model: UNet2DModel', 'ASR_DEBUG=1')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'max_bad_share': nan}, 'data: max_bad_share=nan should be at least 0 and at most 1'),
        ({'max_bad_share': -0.5}, 'data: max_bad_share=-0.5 should be'),
        ({'max_bad_share': 'all'}, "data: max_bad_share='all' should be float"),
        ({'resolution': 0}, 'data: resolution=0 should be greater than 0'),
        ({'resolution': 8.0}, 'data: resolution=8.0 should be int'),
        ({'random_flip': 1}, 'data: random_flip=1 should be bool'),
        ({'type': ['Digits']}, "data: expected a dict like dict(type='...')"),
    ],
)
def test_values_of_data(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AsrError) as caught:
        build_images({'type': 'Digits', 'resolution': 8, **settings}, 1)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(type='Crop', padding=-1), 'Crop: padding=-1 should be at least 0'),
        (dict(type='ResizedCrop', scale=(0.5, 2)), 'ResizedCrop: scale[1]=2 should be at least 0 and at most 1'),
        (dict(type='ResizedCrop', ratio=(0, 1)), 'ResizedCrop: ratio[0]=0 should be greater than 0'),
        (dict(type='ResizedCrop', ratio=(2, 1)), 'ResizedCrop: ratio=[2, 1] should be the least and the most'),
        (dict(type='ColorJitter', strength=nan), "augmentation 'ColorJitter': strength=nan should be"),
        (dict(type='ColorJitter', strength=2), 'ColorJitter: strength=2 should be'),
        (dict(type='Erasing', p=1.5), 'Erasing: p=1.5 should be'),
        (5, "augmentation: expected a dict like dict(type='...'), got 5"),
    ],
)
def test_values_of_augmentations(spec: Any, message: str) -> None:
    with pytest.raises(AsrError) as caught:
        build_augmentations([spec])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize('weight', [nan, inf, -1, 'much', True])
def test_values_of_a_distance(weight: Any) -> None:
    with pytest.raises(PlugError, match='distance: weight=.* should be a finite number of at least 0'):
        Distance(dict(type='MSE', weight=weight))


def test_annotations_are_read_from_inside() -> None:
    kinds = {
        'a': Annotated[float, Field(gt=0, lt=1)] | None,
        'b': list[Literal['x', 'y']],
        'c': dict[str, Annotated[int, Field(le=3)]],
    }
    good = {'a': None, 'b': ['x'], 'c': {}}
    check_values(kinds, good, 'here')
    for change, message in (
        ({'a': 1}, 'here: a=1 should be a share between 0 and 1'),
        ({'a': '1'}, "here: a='1' should be float or None"),
        ({'b': ['x', 'z']}, "here: b='z' is not known; use 'x', 'y'"),
        ({'c': {'n': 4}}, "here: c['n']=4 should be at most 3"),
    ):
        with pytest.raises(AsrError) as caught:
            check_values(kinds, {**good, **change}, 'here')
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ('option', 'value'), [('--workers', '-1'), ('--workers', '1.5'), ('--guidance-scale', 'nan'), ('--steps', '0')]
)
def test_options_of_an_evaluation(option: str, value: str) -> None:
    done = call('diffusion/evaluate.py', 'run', f'{option}={value}')
    assert done.returncode == 2
    assert f"argument {option}: '{value}' should be a" in done.stderr


def test_the_seed_of_the_command_line_is_checked_as_that_of_the_config(tmp_path: Path) -> None:
    done = call('diffusion/train.py', write_diffusion(tmp_path), '--seed', 2**64)
    assert_refused(done, f'seed={2**64} should be at least')
