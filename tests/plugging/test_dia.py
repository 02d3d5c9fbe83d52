"""The DIA plug: counts, sharing, groups, skip, norms, preserve, backbones and UNets, checkpointing, two processes."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import randomise
from helpers.cases import ATTENTIONS
from helpers.shared import ASR_DIA, DIA, NOISE, Net, assert_same, images, plugged, results, unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr_downstream import ATTENTIONS as REGISTRY
from asr_downstream import AsrError, PlugError, describe, fold, plug, pool, record, verify
from asr_downstream.attention import DIALSTM
from asr_downstream.models import resnet164

# Widths of the units, blocks a stage, parameters without and with DIA, r = 4 (official code; paper notes, 1.3). The
# plain totals and what the official code adds besides (a batch norm a block: `extra`) are given, the unit is computed.
PUBLISHED = {
    'ResNet-164': ((64, 128, 256), 1_727_284, 0, 1_946_132),
    'PreResNet-164': ((64, 128, 256), 1_726_388, 16_128, 1_961_364),
    'PreResNet-164 without extra norms': ((64, 128, 256), 1_726_388, 0, 1_945_236),
    'WRN-52-4': ((64, 128, 256), 12_072_500, 7_168, 12_298_516),
    'ResNeXt-101 8x32': ((128, 256, 512), 32_138_244, 0, 33_006_020),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_totals(name: str) -> None:
    widths, plain, extra, total = PUBLISHED[name]
    assert plain + extra + sum(count(DIALSTM(n)) for n in widths) == total


def test_resnet164_has_the_published_total() -> None:
    model = resnet164()
    assert count(model) == 1_727_284
    found = plug(model, DIA)
    assert count(model) == 1_946_132
    assert found.parameters == 218_848
    assert [(u.name, len(u.sites)) for u in found.shared] == [('layer1', 18), ('layer2', 18), ('layer3', 18)]


@pytest.mark.parametrize('n', [64, 256, 320, 2048])
@pytest.mark.parametrize('r', [4, 16, 20])
def test_count_of_the_cell(n: int, r: int) -> None:
    m = n // r
    assert count(DIALSTM(n, reduction=r)) == 2 * (5 * n * m + m + 4 * n)


def test_fresh_cells_gate_near_a_quarter() -> None:
    gates = DIALSTM(256)(torch.randn(8, 256))
    assert gates.shape == (8, 256)
    assert 0.2 < float(gates.detach().mean()) < 0.3


def test_the_halves_of_several_steps_at_once_make_the_same_steps() -> None:
    cell, inputs = randomise(DIALSTM(8, reduction=2)).double(), torch.randn(3, 2, 8, dtype=torch.float64)
    whole = halves = None
    for y, drive in zip(inputs, cell.drive(inputs.flatten(0, 1)).view(3, 2, 32), strict=True):
        gates, whole = cell.step(y, whole)
        again, halves = cell.advance(drive, halves)
        torch.testing.assert_close(again, gates, rtol=1e-12, atol=0)
    assert float(gates.detach().std()) > 0.01


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('kind', ['DIA', 'ASR'])
def test_any_attention_can_be_shared(attention: str, kind: str) -> None:
    model = Net().double()
    stock = copy.deepcopy(model)
    found = plug(model, dict(type=kind, attention=dict(type=attention), share='stage'))
    assert len(found.sites) == 9
    assert len(found.shared) == 3
    randomise(model).train()
    x = images()
    results(model, x)
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    constant = attention in ('LayerScale', 'SigmoidVector')
    assert not unused
    assert not any('running' in n for n, _ in model.shared_attention.named_buffers())
    model.eval()
    if kind == 'ASR' or constant:
        folded, _ = fold(model)
        assert verify(model, folded, x).relative < 1e-10
        assert verify(stock.eval(), folded, x).relative > 1e-3
        assert [type(m) for m in folded.modules()] == [type(m) for m in stock.modules()]
        assert vars(folded).keys() == vars(stock).keys()
        assert not folded._forward_hooks


def test_one_unit_serves_all_sites_of_a_stage_and_no_other() -> None:
    model = plugged(dict(type='DIA', attention=dict(type='SE')), training=False)
    own = model.layer2[0].bn3.dynamic[0].attention
    assert own.attention is model.layer2[2].bn3.dynamic[0].attention.attention
    assert own.attention is model.shared_attention['layer2'].attention
    assert own.attention is not model.layer1[0].bn3.dynamic[0].attention.attention


@pytest.mark.parametrize('attention', ['SRM', 'CBAM'])
def test_normalisation_stays_with_its_site(attention: str) -> None:
    model = Net()
    plug(model, dict(type='DIA', attention=dict(type=attention)))
    norms = [n for n, m in model.named_modules() if '.own.' in n and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 9
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.shared_attention.modules())
    randomise(model).train()(torch.randn(4, 3, 12, 12))
    means = [model.get_submodule(n).running_mean for n in norms[:3]]
    assert not torch.equal(means[0], means[1])
    other = Net()
    plug(other, dict(type='DIA', attention=dict(type=attention)))
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 12, 12)
    assert verify(other.eval(), model.eval(), x).absolute == 0


def test_share_by_width_resets_at_every_stage() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = (nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(2)) for _ in 'ab')

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.down, *self.up):
                x = x + block(x)
            return x

    spec = dict(DIA, sites=['*.0'])
    model = Wide()
    assert [len(u.sites) for u in plug(model, spec).shared] == [2, 2]
    model = Wide()
    rows = plug(model, dict(spec, share='width')).shared
    assert [(u.name, len(u.sites)) for u in rows] == [('width4', 4)]
    positions = [m[0].dynamic[0].attention.position for m in (*model.down, *model.up)]
    assert positions == [0, 1, 0, 1]
    model = Wide()
    plug(model, dict(spec, share=[['down.*', 'up.1.*'], ['up.0.*']]))
    positions = [m[0].dynamic[0].attention.position for m in (*model.down, *model.up)]
    assert positions == [0, 1, 0, 2]
    assert list(model.shared_attention) == ['group0', 'group1']


def test_skipped_sites_neither_read_nor_advance_the_state() -> None:
    model = randomise(Net().double()).eval()
    plug(model, dict(DIA, skip=['layer2.1.*']))
    assert not hasattr(model.layer2[1].bn3, 'dynamic')
    assert model.layer2[2].bn3.dynamic[0].attention.position == 1
    with record(model) as seen:
        model(images())
    assert 'layer2.1.bn3' not in seen.states
    first, second = seen.states['layer2.0.bn3'][0], seen.states['layer2.2.bn3'][0]
    member = model.layer2[2].bn3.dynamic[0].attention
    assert member.place.length == 2
    assert not torch.equal(first[1], second[1])


def test_groups_may_have_names() -> None:
    groups = {'early': ['layer1.*'], 'late': ['layer2.*'], 'last': ['layer3.*']}
    named, numbered = (plugged(dict(DIA, share=share)) for share in (groups, list(groups.values())))
    assert {key.split('.')[1] for key in named.state_dict() if key.startswith('shared_attention')} == set(groups)
    assert {key.split('.')[1] for key in numbered.state_dict() if key.startswith('shared_attention')} == {
        'group0', 'group1', 'group2',
    }  # fmt: skip


def test_a_shared_attention_with_norms_of_the_sites_follows_the_mode_of_the_model() -> None:
    """Its views are copies, one a site."""

    @REGISTRY.register_module()
    class Dropping(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(channels, channels), nn.LayerNorm(channels)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.fc(pool(x)))
            return nn.functional.dropout(y, 0.5, self.training).sigmoid()

    try:
        model = plugged(dict(type='DIA', attention=dict(type='Dropping'))).eval()
        x = images()
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
            assert not torch.equal(model.train()(x), model(x))
    finally:
        REGISTRY.module_dict.pop('Dropping')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(share='stages'), r"share='stages' is not known: use 'stage', 'width'"),
        (dict(share=None), 'DIA shares an attention'),
        (dict(share=['layer1.*']), 'should be a list of groups'),
        (dict(share=[['layer1.*'], ['layer9.*']]), r"'layer9\.\*' matches none of the sites"),
        (dict(share=[['layer1.*']]), r'layer2.0.bn3.*are in no group'),
        (dict(share=[['layer1.*', 'layer2.*'], ['layer3.*']]), 'sites of 32, 64 channels'),
        (dict(share=[['layer1.*'], ['layer1.0.*', 'layer1.1.*']]), 'would be in two groups'),
        (dict(share=[['layer1.*'], []]), 'group 1 is empty'),
        (dict(skip=['layer9.*']), r"skip: 'layer9\.\*' matches none of the 9 sites"),
        (dict(skip=['*']), 'leaves out all 9 sites'),
        (dict(skip='layer1.*'), r"should be a list of patterns, \['layer1"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    model = Net()
    keys = model.state_dict().keys()
    with pytest.raises(PlugError, match=message):
        plug(model, {**DIA, **change})
    assert model.state_dict().keys() == keys
    assert not hasattr(model, 'shared_attention')


@pytest.mark.parametrize(
    'spec',
    [DIA, dict(DIA, memory='low'), ASR_DIA, dict(DIA, attention=dict(type='SE'))],
    ids=['DIA', 'DIA-low', 'ASR-DIA', 'DIA-SE'],
)
@pytest.mark.parametrize('training', [False, True])
def test_preserve_changes_nothing_at_the_start_and_then_learns(spec: dict, training: bool) -> None:
    stock = randomise(Net().double()).train(training)
    model = copy.deepcopy(stock)
    plug(model, dict(spec, preserve=True))
    x = images()
    fused = spec.get('memory') == 'low'  # another order of summation in the batch norm
    assert float((model(x) - stock(x)).abs().max()) <= (1e-12 if fused else 0)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        results(model, x)
        optimiser.step()
    gates = [p for n, p in model.named_parameters() if 'shared_attention' in n]
    assert all(p.grad.abs().max() > 0 for p in gates if p.dim() > 1)


def test_repeat_multiplies_units() -> None:
    model = Net().double()
    found = plug(model, dict(ASR_DIA, repeat=2))
    assert found.sites[0].plug == 'ASR(DIALSTM) x2'
    assert list(model.shared_attention) == ['layer1', 'layer1_2', 'layer2', 'layer2_2', 'layer3', 'layer3_2']
    randomise(model).eval()
    assert verify(model, fold(model)[0], images()).relative < 1e-10


def test_a_sequential_is_a_root_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    stock = copy.deepcopy(model)
    plug(model, dict(ASR_DIA, sites=['1.*']))
    x = torch.randn(2, 4, 3, 3)
    folded, _ = fold(model.eval())
    assert verify(folded, model, x).relative < 1e-5
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in stock.named_modules()]


def test_constant_gates_are_the_same_inside_and_outside_of_a_forward() -> None:
    model = plugged(ASR_DIA, training=False)
    seen: list[Tensor] = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.bn3.gate[0].register_forward_hook(lambda m, i, v: seen.append(v))
    with torch.no_grad():
        model(images())
        inside = list(seen)
        seen.clear()
        outside = [block.bn3.constant() for s in (model.layer3, model.layer1, model.layer2) for block in s]
    for a, b in zip(inside, outside[3:] + outside[:3], strict=True):
        torch.testing.assert_close(a, b)


# diffusers


def unet_results(model: nn.Module) -> list[Tensor]:
    return results(model, NOISE[0], run=lambda x: model(x, NOISE[1]).sample)


def test_unet_stages_are_its_blocks() -> None:
    model = unet()
    found = plug(model, DIA)
    assert len(found.sites) == 18
    assert {u.name: len(u.sites) for u in found.shared} == {
        'down_blocks.0.resnets': 2,
        'down_blocks.1.attentions': 2,
        'down_blocks.1.resnets': 2,
        'mid_block.attentions': 1,
        'mid_block.resnets': 2,
        'up_blocks.0.attentions': 3,
        'up_blocks.0.resnets': 3,
        'up_blocks.1.resnets': 3,
    }
    wide = plug(unet(), dict(DIA, share='width'))
    assert {u.name: len(u.sites) for u in wide.shared} == {'width32': 5, 'width64': 13}


@pytest.mark.parametrize('spec', [DIA, ASR_DIA], ids=['DIA', 'ASR-DIA'])
def test_unet_gradient_checkpointing(spec: dict) -> None:
    model = unet().double()
    plug(model, spec)
    randomise(model)
    expected = unet_results(model)
    model.enable_gradient_checkpointing()
    assert_same(unet_results(model), expected)
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    if spec is DIA:
        with pytest.raises(AsrError, match=r'resnets: .*use_reentrant=False'):
            unet_results(model)
    else:  # learned inputs need no forward
        assert_same(unet_results(model), expected)


def test_unet_asr_dia_folds_and_saves(tmp_path: Path) -> None:
    model = unet().double()
    plug(model, ASR_DIA)
    randomise(model).eval()
    folded, _ = fold(model)
    assert verify(model, folded, NOISE).relative < 1e-10
    stock = randomise(unet().double()).eval()
    folded.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path, torch_dtype=torch.float64).eval()
    assert verify(loaded, folded, NOISE).relative < 1e-10
    bare = unet().double().eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in bare.state_dict()})
    assert verify(model, bare, NOISE).relative > 1e-3


# Two processes


def train_on_a_part(rank: int, world: int, file: str, out: str, spec: dict, checkpointed: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=world)
    torch.manual_seed(0)
    model = plugged(spec, training=False)
    if checkpointed:
        model.around = partial(checkpoint, use_reentrant=False)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD(ddp.parameters(), lr=1e-4)
    torch.manual_seed(1)
    for _ in range(3):
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64).chunk(world)[rank]
        optimiser.zero_grad()
        ddp(x).square().mean().backward()
        optimiser.step()
    if rank == 0:
        torch.save(model.state_dict(), out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('spec', 'checkpointed'),
    [
        pytest.param(DIA, False, id='DIA'),
        pytest.param(DIA, True, id='DIA-cp'),
        pytest.param(ASR_DIA, True, id='ASR-DIA-cp'),
    ],
)
def test_two_processes_give_the_weights_of_one(spec: dict, checkpointed: bool, tmp_path: Path) -> None:
    weights = []
    for world in (1, 2):
        args = (world, str(tmp_path / f'init{world}'), str(tmp_path / f'{world}.pth'), spec, checkpointed)
        mp.start_processes(train_on_a_part, args, nprocs=world, start_method='spawn')
        weights.append(torch.load(tmp_path / f'{world}.pth', weights_only=True))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-10, atol=1e-10)
    torch.manual_seed(0)
    start = plugged(spec, training=False).state_dict()
    moved = [k for k in start if 'shared_attention' in k and not torch.equal(start[k], weights[0][k])]
    assert len(moved) == len([k for k in start if 'shared_attention' in k])


def test_describe_lists_shared_units() -> None:
    model = plugged(DIA)
    text = str(describe(model))
    assert 'DIA(DIALSTM)' in text
    assert 'shared DIALSTM' in text
    assert describe(model).parameters == count(model) - count(Net())
