"""Diffusion models in which only a part learns: from a stock pipeline, resumed, averaged, planned, shipped."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import randomise
from helpers.diffusion import (
    ASR,
    DIA,
    UNET,
    assert_refused,
    assert_same,
    call,
    config_for,
    launch,
    losses,
    weights,
    write_config,
)
from helpers.engine import change_progress

from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.training.plan import plan
from asr_downstream.diffusion.training.task import Denoising
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.state.ema import EMA
from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.folding.adapters.base import BASE_FILE, read_base
from asr_downstream.modules.slots import GATES

KEPT = dict(ASR, preserve=True)


@pytest.fixture(scope='module')
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock pipeline with random weights."""
    folder = tmp_path_factory.mktemp('pipe') / 'pipe'
    torch.manual_seed(0)
    unet = randomise(diffusers.UNet2DModel(**UNET))
    for parameter in unet.parameters():
        parameter.data.mul_(0.7)  # random networks amplify
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule='squaredcos_cap_v2')
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return folder


def base_of(pipe: Path) -> dict[str, torch.Tensor]:
    return diffusers.UNet2DModel.from_pretrained(pipe / 'unet').state_dict()


def tuned(folder: Path, pipe: Path, **settings: Any) -> Any:
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(pipe))
    return config_for(folder, **{'model': model, 'noise_scheduler': ..., 'plug': KEPT, 'learns': 'gates', **settings})


def is_norm(name: str) -> bool:
    return not GATES.search(name) and any('norm' in part for part in name.split('.')[:-1])


IN = {
    'gates': lambda name: bool(GATES.search(name)),
    'norms': is_norm,
    'gates+norms': lambda name: bool(GATES.search(name)) or is_norm(name),
    'bias': lambda name: name.endswith('bias') and not GATES.search(name),
    'conv_out.*': lambda name: name.startswith('conv_out.'),
}
FAST = ('gates', 'norms')


@pytest.mark.parametrize(
    'spec',
    [pytest.param(KEPT, id='ASR'), pytest.param(dict(DIA, preserve=True), id='DIA', marks=pytest.mark.slow)],
)
@pytest.mark.parametrize('learns', [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in IN])
def test_only_what_was_named_changes(tmp_path: Path, pipe: Path, spec: Any, learns: str) -> None:
    config = tuned(tmp_path, pipe, plug=spec, learns=learns, use_ema=True, max_train_steps=3)
    start = copy.deepcopy(build_parts(config).model.state_dict())
    last = train(config)
    after = weights(last)
    changed = {name for name, value in start.items() if not torch.equal(after[name], value)}
    task = Denoising(config, build_parts(config))
    expected = {name for name, _ in task.model.named_parameters() if IN[learns](name)}
    assert expected
    assert changed <= expected
    still = {name for name in expected - changed if 'shared_attention' not in name}  # DIA starts behind zeros
    assert not still
    assert len(changed) > len(expected) / 2
    assert {n for n, v in start.items() if not torch.equal(after[f'ema.{n}'], v)} == changed
    optimiser = torch.load(last / 'optimizer.bin', weights_only=True)
    assert len(optimiser['state']) == sum(len(group['params']) for group in optimiser['param_groups']) == len(expected)
    base = base_of(pipe)
    assert all(torch.equal(start[name], value) for name, value in base.items())


def test_all_is_what_it_was(tmp_path: Path, pipe: Path) -> None:
    one = train(tuned(tmp_path / 'one', pipe, learns=..., max_train_steps=2))
    other = train(tuned(tmp_path / 'other', pipe, learns='all', max_train_steps=2))
    assert_same(one, other)
    assert not (other.parent / BASE_FILE).exists()


def test_the_start_is_the_base_bit_for_bit(tmp_path: Path, pipe: Path) -> None:
    task = Denoising(config := tuned(tmp_path, pipe), build_parts(config))
    stock = diffusers.UNet2DModel.from_pretrained(pipe / 'unet')
    task.train_mode()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 60])
    assert torch.equal(task.model(x, t).sample, stock.train()(x, t).sample)
    plain = build_parts(tuned(tmp_path / 'plain', pipe, plug=ASR)).model.train()
    assert not torch.equal(plain(x, t).sample, stock(x, t).sample)


@pytest.mark.parametrize('learns', [pytest.param('gates', marks=pytest.mark.slow), ['gates', 'conv_out.*']])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, pipe: Path, learns: Any) -> None:
    settings = {'learns': learns, 'gradient_accumulation_steps': 2, 'train_batch_size': 4}
    train(tuned(tmp_path / 'whole', pipe, **settings))
    config = tuned(tmp_path / 'parts', pipe, **settings)
    whole, run = tmp_path / 'whole/run', tmp_path / 'parts/run'
    shutil.copytree(whole, run)
    shutil.rmtree(run / 'checkpoint-6')
    noted = (run / BASE_FILE).read_text()
    assert train(config, 'latest') == run / 'checkpoint-6'
    assert_same(whole / 'checkpoint-6', run / 'checkpoint-6')
    assert losses(whole) == losses(run)
    assert (run / BASE_FILE).read_text() == noted
    assert set(read_base(run / BASE_FILE).heads) == (
        {'conv_out.weight', 'conv_out.bias'} if learns != 'gates' else set()
    )


def test_another_choice_does_not_resume_and_the_same_in_other_words_does(tmp_path: Path, pipe: Path) -> None:
    train(tuned(tmp_path, pipe, learns='gates+norms', max_train_steps=3))
    with pytest.raises(CheckpointError, match=r'was trained with learns=gates\+norms, the config says gates;'):
        train(tuned(tmp_path, pipe), 'latest')
    assert train(tuned(tmp_path, pipe, learns=['gates', 'norms']), 'latest').name == 'checkpoint-6'


def test_a_checkpoint_from_before_there_was_a_choice_goes_on(tmp_path: Path, pipe: Path) -> None:
    last = train(tuned(tmp_path, pipe, learns='all', max_train_steps=3))
    change_progress(last, lambda content: content['settings'].pop('learns'))
    assert train(tuned(tmp_path, pipe, learns='all'), 'latest').name == 'checkpoint-6'


def test_half_precision_and_recomputed_activations(tmp_path: Path, pipe: Path) -> None:
    config = tuned(tmp_path, pipe, mixed_precision='bf16', gradient_checkpointing=True, max_train_steps=2)
    start = copy.deepcopy(build_parts(config).model.state_dict())
    after = weights(train(config))
    changed = {name for name, value in start.items() if not torch.equal(after[name], value)}
    assert changed
    assert all(GATES.search(name) for name in changed)


def test_an_average_takes_no_memory_for_what_is_frozen(tmp_path: Path, pipe: Path) -> None:
    task = Denoising(config := tuned(tmp_path, pipe), build_parts(config))
    ema = EMA(task.model)
    own = {name: value.data_ptr() for name, value in task.model.state_dict().items()}
    frozen = {name for name, p in task.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert {name for name, value in ema.state.items() if value.data_ptr() == own[name]} == frozen
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    ema.update(task.model, 1000)
    gate = next(name for name in own if name.endswith('psi'))
    with ema.applied_to(task.model):
        assert not torch.equal(task.model.state_dict()[gate], before[gate] + 1)
    assert torch.equal(task.model.state_dict()[gate], before[gate] + 1)
    assert all(torch.equal(task.model.state_dict()[name], before[name]) for name in frozen)
    ema.load({name: value + 5 for name, value in before.items()})
    assert all(torch.equal(task.model.state_dict()[name], before[name]) for name in frozen)
    assert torch.equal(ema.state[gate], before[gate] + 5)


def test_the_plan_says_what_learns_and_counts_memory_for_that(tmp_path: Path, pipe: Path) -> None:
    config = tuned(tmp_path, pipe, use_ema=False)
    model = build_parts(config).model
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    gates = sum(n for name, n in numbers.items() if GATES.search(name))
    text = ' '.join(plan(config).replace('│', ' ').split())
    total = sum(numbers.values())
    assert f'gates: {sum(map(bool, map(GATES.search, numbers)))} weights, {gates:,} of {total:,} numbers' in text
    assert f'saves {(total - gates) * 4 / 1000:.3g} kB of gradients' in text
    whole = ' '.join(plan(tuned(tmp_path, pipe, learns='all')).replace('│', ' ').split())
    assert f'all: {len(numbers)} weights, {total:,} of {total:,} numbers (100.00%)' in whole


def test_a_start_that_is_not_the_base_is_said(tmp_path: Path, pipe: Path) -> None:
    config = tuned(tmp_path, pipe, plug=ASR)
    with pytest.warns(UserWarning, match='do not start at 1'):
        Denoising(config, build_parts(config))


def test_what_means_nothing_is_refused(tmp_path: Path, pipe: Path) -> None:
    with pytest.raises(PlugError, match='UNet2DModel has no gates, it is a stock model'):
        train(tuned(tmp_path, pipe, plug=None))
    with pytest.raises(PlugError, match=r"'conv_uot.\*' matches no weight of UNet2DModel; the nearest are conv_out"):
        train(tuned(tmp_path, pipe, learns='conv_uot.*'))
    with pytest.raises(AsrError, match='learns=3 should be str or list'):
        tuned(tmp_path, pipe, learns=3)


def test_the_command_trains_and_ships_what_learnt(tmp_path: Path, pipe: Path) -> None:
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(pipe))
    path = write_config(tmp_path, model=model, noise_scheduler=..., plug=KEPT, max_train_steps=2)
    run = tmp_path / 'run'
    done = call('diffusion/train.py', path, '--output-dir', run, '--learns', 'gates', 'norms')
    assert done.returncode == 0, done.stderr
    assert list(load_config(run / 'config.py').learns) == ['gates', 'norms']
    done = call('tools/fold.py', run, tmp_path / 'shipped')
    assert done.returncode == 0, done.stderr
    shipped, base = diffusers.UNet2DModel.from_pretrained(tmp_path / 'shipped/unet').state_dict(), base_of(pipe)
    assert shipped.keys() == base.keys()
    changed = {name for name, value in base.items() if not torch.equal(shipped[name], value)}
    assert changed
    assert all(is_norm(name) or 'conv2' in name or 'to_out' in name for name in changed)
    assert_refused(
        call('diffusion/train.py', path, '--output-dir', tmp_path / 'other', '--learns', 'gaets'), "'gaets' matches no"
    )


@pytest.mark.slow
def test_two_processes_train_the_gates_alone(tmp_path: Path, pipe: Path) -> None:
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(pipe))
    settings = dict(model=model, noise_scheduler=..., plug=KEPT, learns='gates', max_train_steps=3)
    path = write_config(tmp_path, **settings, train_batch_size=4)
    done = launch(path, '--output-dir', tmp_path / 'two', processes=2)
    assert done.returncode == 0, done.stderr
    alone = train(config_for(tmp_path / 'one', **settings, train_batch_size=8))
    two, one, base = weights(tmp_path / 'two/checkpoint-3'), weights(alone), base_of(pipe)
    assert all(torch.equal(two[name], value) for name, value in base.items())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
