"""Applying: an adapter gives the fold of its training to the bit, at strengths and after others; refusals."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise
from helpers.adapters import FREE, SE, SPECS, adapted, base, differing, same, saved
from helpers.plugged import ASR, X, tiny
from torch import nn

from asr_downstream import CheckpointError, FoldError, fold, plug, verify
from asr_downstream.folding.adapters.apply import apply_gates, apply_to_state, given
from asr_downstream.folding.adapters.base import base_state, remember
from asr_downstream.folding.adapters.file import list_gates
from asr_downstream.folding.adapters.save import save_gates


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64], ids=str)
def test_applying_gives_the_fold_to_the_bit(tmp_path: Path, spec: Any, dtype: torch.dtype) -> None:
    stock = base(dtype)
    before = copy.deepcopy(stock)
    model = adapted(stock, spec)
    save_gates(model, tmp_path / 'a.safetensors')
    ours, theirs = apply_gates(stock, tmp_path / 'a.safetensors'), fold(model)[0]
    assert differing(ours, theirs) == []
    assert vars(ours).keys() == vars(theirs).keys() == vars(stock).keys()
    assert differing(stock, before) == []
    changed = differing(ours, stock)  # negative control: all sites, and nothing else
    assert changed == [f'layer{i}.{j}.bn3.{w}' for i in (1, 2, 3) for j in (0, 1) for w in ('weight', 'bias')]
    state = apply_to_state(stock.state_dict(), given(tmp_path / 'a.safetensors'))
    assert all(same(value, theirs.state_dict()[name]) for name, value in state.items())


def test_a_resnet_50_takes_121_kb(tmp_path: Path) -> None:
    """15,104 numbers: the channels of 16 sites."""

    class Sites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for stage, (count, width) in enumerate(((3, 256), (4, 512), (6, 1024), (3, 2048))):
                blocks = (nn.Sequential(nn.Conv2d(4, width, 1), nn.BatchNorm2d(width)) for _ in range(count))
                self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
            for number in range(240):  # about as many tensors as the other layers have
                self.register_buffer(f'layer1_{number}_conv1_weight', torch.zeros(1))

    model = Sites().eval()
    plug(model, dict(type='ASR', attention=dict(type='SE'), sites=['*.1']))
    remember(model)
    adapter = save_gates(model, tmp_path / 'r50.safetensors')
    assert adapter.numbers == 15_104
    taken = (tmp_path / 'r50.safetensors').stat().st_size
    assert 120_832 < taken < 128_000
    assert '15,104 constants of 16 layers' in str(adapter)


# Where nothing else is installed -------------------------------------------------------------------------------------

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        package, *parts = name.split('.')
        rooms = ('plugging', 'attention', 'registry', 'engine', 'detection', 'diffusion', 'far')
        folding = parts[:1] == ['folding'] and parts[1:2] not in ([], ['adapters'])
        if package in OTHERS or (package == 'asr_downstream' and (folding or parts[:1] and parts[0] in rooms)):
            raise ModuleNotFoundError(f'{name} is blocked')

OTHERS = ('mmengine', 'mmcv', 'mmdet', 'diffusers', 'transformers', 'accelerate', 'rich', 'yaml', 'numpy', 'filelock')
sys.meta_path.insert(0, Blocked())
for name in ('asr_downstream.plugging.plug', 'mmengine', 'rich'):
    try:
        __import__(name)
    except ImportError as error:
        assert 'is blocked' in str(error), error
    else:
        raise AssertionError(name)

import torch
from safetensors.torch import load_file
from torch import nn

def block():
    return nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

import asr_downstream
stock = nn.Sequential(block(), block()).eval()
stock.load_state_dict(load_file('base.safetensors'))
found = asr_downstream.apply_gates(stock, 'a.safetensors', strength=1.0)
torch.save(found.state_dict(), 'applied.pth')  # safetensors needs NumPy to write
assert len(asr_downstream.list_gates('a.safetensors').sites) == 4
"""


def test_it_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    stock = randomise(nn.Sequential(block(), block())).eval()
    save_file(stock.state_dict(), tmp_path / 'base.safetensors')
    model = adapted(stock, dict(SE, sites=['*.1', '*.3'], preserve=False, attention=dict(type='SE', reduction=1)))
    save_gates(model, tmp_path / 'a.safetensors')
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(PROGRAM)],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, folded = torch.load(tmp_path / 'applied.pth'), fold(model)[0].state_dict()
    assert found.keys() == folded.keys()
    assert all(same(found[name], folded[name]) for name in folded)


# Strength and composition --------------------------------------------------------------------------------------------


def test_strength_1_is_the_adapter_and_0_the_base_to_the_bit(tmp_path: Path) -> None:
    stock = base()
    path = saved(tmp_path, stock, FREE, heads=('fc.weight',))
    whole = apply_gates(stock, path)
    assert differing(whole, apply_gates(stock, path, strength=1)) == []
    assert differing(stock, apply_gates(stock, path, strength=0)) == []
    assert 'fc.weight' in differing(stock, whole)
    assert differing(whole, apply_gates(stock, path, strength=0.999)) != []


@pytest.mark.parametrize('strength', [0.3, 0.7, 2.0, -1.0])
def test_strength_is_a_power_or_linear_where_a_gate_is_not_positive(tmp_path: Path, strength: float) -> None:
    stock = base(torch.float64)
    path = saved(tmp_path, stock, FREE)
    sites = list_gates(path).sites
    assert any(bool((site.constants.gate < 0).any()) for site in sites.values())
    found = apply_gates(stock, path, strength=strength)
    for at, site in sites.items():
        v = site.constants.gate
        wanted = [x**strength if x > 0 else 1 + strength * (x - 1) for x in v.tolist()]
        new, old = found.get_submodule(at), stock.get_submodule(at)
        for name in ('weight', 'bias'):
            assert close(getattr(new, name), getattr(old, name) * torch.tensor(wanted, dtype=torch.float64))


def test_half_an_adapter_twice_is_the_whole_of_positive_gates(tmp_path: Path) -> None:
    stock = base(torch.float64)
    path = saved(tmp_path, stock, SE)
    halves = apply_gates(stock, [path, path], strength=[0.5, 0.5])
    whole, once = apply_gates(stock, path), apply_gates(stock, path, strength=0.5)
    x = torch.randn(X, dtype=torch.float64)
    assert verify(halves, whole, x).relative < 1e-10
    assert verify(once, whole, x).relative > 1e-3


def test_several_work_one_after_another(tmp_path: Path) -> None:
    stock = base(torch.float64)
    a, b = saved(tmp_path, stock, SE, 'a'), saved(tmp_path, stock, FREE, 'b')
    both = apply_gates(stock, [a, b], strength=[1.0, 0.5])
    one = apply_gates(apply_gates(stock, a), b, strength=0.5, force=True)
    x = torch.randn(X, dtype=torch.float64)
    assert verify(both, one, x).relative < 1e-10
    for wrong in (apply_gates(stock, a), apply_gates(stock, [a, b]), apply_gates(stock, b, strength=0.5)):
        assert verify(both, wrong, x).relative > 1e-3
    with pytest.raises(CheckpointError, match='was made for another base: of ResNet, 12 of 112 tensors differ'):
        apply_gates(apply_gates(stock, a), b)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


@pytest.mark.parametrize(
    ('count', 'options', 'message'),
    [
        (0, {}, 'no adapter is given'),
        (2, {'strength': [1.0]}, '2 adapters, and strength for 1; give one a file'),
        (2, {'heads': [True] * 3}, '2 adapters, and heads for 3'),
        (1, {'strength': float('nan')}, 'should be a finite number'),
        (1, {'strength': 'much'}, "strength='much' should be a finite number"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, count: int, options: dict, message: str) -> None:
    stock = base()
    with pytest.raises(CheckpointError, match=message):
        apply_gates(stock, [saved(tmp_path, stock)] * count, **options)


# Heads ---------------------------------------------------------------------------------------------------------------


def test_heads_are_taken_whole_or_left_out(tmp_path: Path) -> None:
    stock = base()
    model = adapted(stock, SE, ('fc.weight', 'fc.bias'))
    save_gates(model, tmp_path / 'a.safetensors')
    folded, path = fold(model)[0], tmp_path / 'a.safetensors'
    assert differing(apply_gates(stock, path), folded) == []
    part = apply_gates(stock, path, strength=0.5)
    assert not {'fc.weight', 'fc.bias'} & {*differing(part, folded)}
    without = apply_gates(stock, path, heads=False)
    assert differing(without, folded) == ['fc.weight', 'fc.bias']
    other = copy.deepcopy(stock)
    nn.init.normal_(other.fc.weight)  # what a head replaces is no part of the base
    assert differing(apply_gates(other, path), folded) == []


def test_norms_of_sites_may_be_heads(tmp_path: Path) -> None:
    stock = base()
    names = tuple(n for n, _ in stock.named_parameters() if 'bn' in n)
    model = adapted(stock, SE, names)
    save_gates(model, tmp_path / 'a.safetensors')
    assert differing(apply_gates(stock, tmp_path / 'a.safetensors'), fold(model)[0]) == []


def test_a_head_of_two_adapters_is_asked_about(tmp_path: Path) -> None:
    stock = base()
    a, b = (saved(tmp_path, stock, SE, name, ('fc.bias',)) for name in 'ab')
    with pytest.raises(CheckpointError, match=r'fc.bias: is a head of .*a.safetensors and of .*b.safetensors'):
        apply_gates(stock, [a, b])
    first, second = (apply_gates(stock, [a, b], heads=which) for which in ([True, False], [False, True]))
    assert differing(first, second) == ['fc.bias']
    assert same(first.fc.bias, list_gates(a).heads['fc.bias'])
    assert differing(apply_gates(stock, [a, a], strength=[1, 0.0]), apply_gates(stock, a)) == []


def test_a_head_for_other_classes_is_for_a_model_with_them(tmp_path: Path) -> None:
    stock = base()
    other = copy.deepcopy(stock)
    other.fc = randomise(nn.Linear(stock.fc.in_features, 3))
    path = saved(tmp_path, other, SE, heads=('fc.weight', 'fc.bias'))
    with pytest.raises(CheckpointError, match=r'fc.bias: is of shape \(10,\) in ResNet, and a head of shape \(3,\)'):
        apply_gates(stock, path)
    assert apply_gates(other, path).fc.weight.shape[0] == 3
    assert apply_to_state(stock.state_dict(), given(path))['fc.weight'].shape[0] == 3


# Refusals ------------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_with_the_names_of_what_differs(tmp_path: Path) -> None:
    stock = base()
    path = saved(tmp_path, stock)
    other = copy.deepcopy(stock)
    other.layer2[1].conv2.weight.data[0, 0, 0, 0] += 1e-6
    other.bn1.num_batches_tracked += 5  # is no weight
    with pytest.raises(CheckpointError) as caught:
        apply_gates(other, path)
    message = str(caught.value)
    assert '1 of 112 tensors differ (layer2.1.conv2.weight)' in message
    assert 'force=True, --any-base' in message
    assert differing(apply_gates(other, path, force=True), apply_gates(stock, path)) == [
        'bn1.num_batches_tracked',
        'layer2.1.conv2.weight',
    ]
    with pytest.raises(CheckpointError, match='tensors differ'):  # said at any strength
        apply_gates(other, path, strength=0)


def test_two_bases_are_told_apart(tmp_path: Path) -> None:
    first, second = base(), base()
    a, b = saved(tmp_path, first, SE, 'a'), saved(tmp_path, second, SE, 'b')
    assert list_gates(a).base != list_gates(b).base
    for stock, path in ((first, b), (second, a)):
        with pytest.raises(CheckpointError, match='was made for another base'):
            apply_gates(stock, path)
    with pytest.raises(CheckpointError, match=r'b.safetensors: was made for another base'):
        apply_gates(first, [a, b])
    with pytest.raises(CheckpointError, match='was made for another base'):
        apply_gates(first.half(), a)


def test_other_models_are_refused(tmp_path: Path) -> None:
    stock = base()
    path = saved(tmp_path, stock)
    with pytest.raises(CheckpointError, match=r'112 other tensors than Linear has; there is no layer1.0.bn3, '):
        apply_gates(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match='has constants for layer1.0.bn3, and Linear has no such layer'):
        apply_gates(nn.Linear(2, 2), path, force=True)
    with pytest.raises(CheckpointError, match='ResNet is plugged'):
        apply_gates(adapted(stock), path)
    with pytest.raises(CheckpointError, match='expected a torch.nn.Module'):
        apply_gates(stock.state_dict(), path)
    wide = tiny()
    wide.layer1[0].bn3 = nn.BatchNorm2d(7)
    with pytest.raises(CheckpointError, match=r'layer1.0.bn3: the adapter does not fit it .*7 outputs'):
        apply_gates(wide, path, force=True)
    wide.layer1[0].bn3 = nn.PReLU(32)
    with pytest.raises(CheckpointError, match=r'layer1.0.bn3: is a PReLU'):
        apply_gates(wide, path, force=True)
    with pytest.raises(CheckpointError, match='layer1.0.bn3.weight: is not in these weights'):
        apply_to_state({'x': torch.zeros(1)}, given(path))


def test_weights_that_are_shared_are_refused(tmp_path: Path) -> None:
    stock = base()
    path = saved(tmp_path, stock)
    stock.layer1[0].bn1.weight = stock.layer3[0].bn1.weight  # at no site
    apply_gates(stock, path, force=True)
    stock.layer1[1].bn3.weight = stock.layer1[0].bn3.weight
    with pytest.raises(CheckpointError, match='layer1.0.bn3: its weight is shared with layer1.1.bn3.weight'):
        apply_gates(stock, path, force=True)
    stock.layer1[1].bn3 = stock.layer1[0].bn3
    with pytest.raises(CheckpointError, match='layer1.1.bn3: is the same layer as layer1.0.bn3'):
        apply_gates(stock, path, force=True)


# Saving --------------------------------------------------------------------------------------------------------------


def test_a_base_that_was_trained_is_refused(tmp_path: Path) -> None:
    stock, path = base(), tmp_path / 'a.safetensors'
    model = adapted(stock)
    model.layer3[0].conv1.weight.data += 1e-3
    model.bn1.running_mean += 1
    for given_base in (None, stock, stock.state_dict()):
        with pytest.raises(CheckpointError, match='2 of 112 weights differ .bn1.running_mean, layer3.0.conv1.weight'):
            save_gates(model, path, base=given_base)
    assert not path.exists()
    save_gates(model, path, heads='changed', base=stock)
    assert {*list_gates(path).heads} == {'bn1.running_mean', 'bn1.num_batches_tracked', 'layer3.0.conv1.weight'}
    assert differing(apply_gates(stock, path), fold(model)[0]) == []


def test_a_base_that_is_not_known_must_be_frozen(tmp_path: Path) -> None:
    model = base()
    plug(model, ASR)
    with pytest.raises(CheckpointError, match='its base is not known, and 68 of its weights learn beside the gates'):
        save_gates(model, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match="heads='changed' needs a base"):
        save_gates(model, tmp_path / 'a.safetensors', heads='changed')
    for p in base_state(model):
        if p in dict(model.named_parameters()):
            model.get_parameter(p).requires_grad_(p.startswith('fc'))
    save_gates(model, tmp_path / 'a.safetensors', heads=['fc'])
    assert {*list_gates(tmp_path / 'a.safetensors').heads} == {'fc.weight', 'fc.bias'}


def test_what_does_not_fold_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / 'a.safetensors'
    with pytest.raises(CheckpointError, match='ResNet has no gates; plug and train it first'):
        save_gates(base(), path)
    with pytest.raises(FoldError, match='depend on the input'):
        save_gates(adapted(base(), dict(type='Attention', attention=dict(type='SE', reduction=4))), path)
    with pytest.raises(FoldError, match='training mode'):
        save_gates(adapted(base()).train(), path)
    broken = adapted(base())
    broken.layer1[0].bn3.gate[0].psi.data[0, 0] = float('nan')
    with pytest.raises(FoldError, match=r'layer1.0.bn3: .* gates are not finite'):
        save_gates(broken, path)
    with pytest.raises(ValueError, match='should end in .safetensors'):
        save_gates(adapted(base()), tmp_path / 'a.pth')
    assert not list(tmp_path.iterdir())


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = adapted(base(), SPECS['DIA'])
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    save_gates(model, tmp_path / 'a.safetensors', about={'domain': 'night'})
    for name, t in model.state_dict(keep_vars=True).items():
        assert before[name][0] == t.data_ptr()
        assert same(before[name][1].detach(), t.detach())
    found = list_gates(tmp_path / 'a.safetensors')
    assert found.about == {'domain': 'night'}
    assert found.spec == {'': [SPECS['DIA']]}
    assert found.model == 'ResNet'
    assert {'torch', 'python'} <= found.versions.keys()
    assert 'machine' not in found.versions
    assert found.learnt == {}
    text = str(found)
    for part in ('layer1.0.bn3', 'BatchNorm2d', found.base.digest, 'DIALSTM', 'night', '448 constants of 6 layers'):
        assert part in text
