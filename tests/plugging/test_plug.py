"""plug: what it attaches, what it refuses, what it leaves alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.utils.prune
from conftest import randomise
from helpers.cases import ATTENTIONS
from helpers.plugged import ASR, CLASSIC, X, tiny
from torch import Tensor, nn

import asr_downstream
from asr_downstream import PlugError, describe, plug, rebind, register_site, verify
from asr_downstream.models.resnet_cifar import BasicBlock, Bottleneck
from asr_downstream.registry import ATTENTIONS as REGISTRY


@pytest.mark.parametrize(('block', 'end'), [(BasicBlock, 'bn2'), (Bottleneck, 'bn3')])
def test_residual_sites_end_the_branches(block: type, end: str) -> None:
    rows = plug(tiny(block), ASR).sites
    assert [row.path for row in rows] == [f'layer{s}.{b}.{end}' for s in (1, 2, 3) for b in (0, 1)]
    assert {row.plug for row in rows} == {'ASR(SE)'}
    assert all(row.folds and row.layer == 'BatchNorm2d' for row in rows)


def test_stock_names_identities_and_isinstance_stay() -> None:
    model = tiny()
    parameters = dict(model.named_parameters())
    plug(model, ASR)
    for name, p in parameters.items():
        assert model.get_parameter(name) is p
    assert isinstance(model.layer1[0].bn3, nn.BatchNorm2d)
    missing, unexpected = model.load_state_dict(tiny().state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all('.gate.' in key for key in missing)


def test_the_global_random_state_stays_and_gates_differ_between_sites() -> None:
    torch.manual_seed(5)
    model = tiny()
    after_stock = torch.rand(3)
    torch.manual_seed(5)
    plugged = tiny()
    plug(plugged, ASR)
    torch.testing.assert_close(torch.rand(3), after_stock, rtol=0, atol=0)
    assert torch.equal(model.conv1.weight, plugged.conv1.weight)
    first, second = (plugged.layer1[i].bn3.gate[0].attention.fc1.weight for i in (0, 1))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    again = tiny()
    plug(again, ASR)
    assert torch.equal(first, again.layer1[0].bn3.gate[0].attention.fc1.weight)


def test_patterns_and_all() -> None:
    model = tiny()
    assert [r.path for r in plug(model, dict(ASR, sites=['layer1.*.bn3', 'fc'])).sites] == [
        'layer1.0.bn3',
        'layer1.1.bn3',
        'fc',
    ]
    model = tiny()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    assert [r.path for r in plug(model, dict(ASR, sites='all')).sites] == layers
    model(torch.randn(X))


def test_repeat_and_composition() -> None:
    model = tiny()
    rows = plug(model, [dict(ASR, repeat=2), CLASSIC]).sites
    assert rows[0].plug == 'ASR(SE) x2 + Attention(SE)'
    assert not rows[0].folds
    layer = model.layer1[0].bn3
    x = torch.randn(2, layer.num_features, 4, 4)
    model.eval()
    y = nn.BatchNorm2d.forward(layer, x) * (layer.gate[0]() * layer.gate[1]()).view(1, -1, 1, 1)
    y = y * layer.dynamic[0].attention(y)[..., None, None]
    torch.testing.assert_close(layer(x), y)


def test_classic_attention_on_tokens_gates_the_last_axis() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    plain = copy.deepcopy(model)
    plug(model, dict(type='Attention', attention=dict(type='SE', reduction=2), sites=['0']))
    x = torch.randn(2, 5, 6)
    y = plain(x)
    gates = model[0].dynamic[0].attention(y.mean(1))  # (B, C)
    torch.testing.assert_close(model(x), y * gates[:, None])


@pytest.mark.parametrize('attention', [a for a in ATTENTIONS if a != 'LayerScale'])
@pytest.mark.parametrize('kind', ['ASR', 'Attention'])
@pytest.mark.parametrize('training', [False, True])
def test_preserve_changes_nothing_at_the_start(attention: str, kind: str, training: bool) -> None:
    stock = randomise(tiny().double()).train(training)
    model = copy.deepcopy(stock)
    spec = dict(type=kind, attention=dict(type=attention), preserve=True)
    plug(model, spec)
    x = torch.randn(X, dtype=torch.float64)
    if training and kind == 'Attention':  # the fused form sums the batch statistics in another order
        low, other = copy.deepcopy(stock), copy.deepcopy(stock)
        plug(low, dict(spec, memory='low'))
        assert verify(copy.deepcopy(low).eval(), copy.deepcopy(stock).eval(), x).absolute == 0
        torch.testing.assert_close(low(x), other(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(model(x), stock(x))


def test_preserve_holds_for_weights_that_are_loaded_later_and_after_reloading() -> None:
    stock, model = randomise(tiny()).eval(), tiny().eval()
    plug(model, dict(ASR, preserve=True))
    model.load_state_dict(stock.state_dict(), strict=False)
    x = torch.randn(X)
    assert verify(model, stock, x).absolute == 0
    nn.init.normal_(model.layer1[0].bn3.gate[0].psi)
    other = tiny().eval()
    plug(other, dict(ASR, preserve=True))
    other.load_state_dict(model.state_dict())
    assert verify(model, other, x).absolute == 0
    assert verify(model, stock, x).absolute > 1e-4


def test_without_preserve_fresh_se_gates_scale_the_branches() -> None:
    stock = randomise(tiny()).eval()
    model = copy.deepcopy(stock)
    plug(model, ASR)
    assert verify(model, stock, torch.randn(X)).relative > 0.01


def test_five_lines_register_an_attention_and_a_site() -> None:
    @asr_downstream.ATTENTIONS.register_module()
    class Mean(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.fc = nn.Linear(channels, channels)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(asr_downstream.pool(x)).sigmoid()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    register_site(Block, 'branch.1')
    try:
        model = randomise(nn.Sequential(Block(), Block())).eval()
        assert [r.path for r in plug(model, dict(type='ASR', attention=dict(type='Mean'))).sites] == [
            '0.branch.1',
            '1.branch.1',
        ]
        folded, _ = asr_downstream.fold(model)
        assert verify(model, folded, torch.randn(2, 4, 5, 5)).relative < 1e-5
    finally:
        REGISTRY.module_dict.pop('Mean')


@pytest.mark.parametrize('spec', [ASR, CLASSIC, [ASR, CLASSIC]], ids=['ASR', 'Attention', 'both'])
def test_copies_pickles_and_state_dicts(spec: object) -> None:
    model = randomise(tiny())
    plug(model, spec)
    model.eval()
    x = torch.randn(X)
    assert verify(copy.deepcopy(model), model, x).absolute == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert verify(torch.load(buffer, weights_only=False), model, x).absolute == 0
    other = tiny().eval()
    plug(other, spec)
    other.load_state_dict(model.state_dict(), strict=True)
    assert verify(other, model, x).absolute == 0


def test_torch_compile_gives_the_same() -> None:
    model = randomise(tiny(BasicBlock)).eval()
    plug(model, ASR)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x = torch.randn(X)
    torch.testing.assert_close(compiled(x), model(x))


def test_gates_stay_in_full_precision_under_autocast() -> None:
    model = randomise(tiny())
    plug(model, ASR)
    layer = model.layer1[0].bn3
    full = layer.constant()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(layer.constant(), full)


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('preserve', [False, True])
def test_feature_maps_keep_their_precision_under_autocast(attention: str, preserve: bool) -> None:
    if attention == 'LayerScale' and preserve:
        attention = 'SE'
    model = nn.Sequential(nn.Conv2d(3, 32, 3))
    plug(model, dict(type='Attention', attention=dict(type=attention), sites=['0'], preserve=preserve))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert model(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16


def test_initialising_the_model_leaves_the_gates_alone() -> None:
    model = tiny()
    plug(model, dict(ASR, preserve=True))
    before = model.layer1[0].bn3.constant()
    model.apply(lambda m: [nn.init.zeros_(p) for p in m.parameters(recurse=False)])
    assert torch.equal(model.layer1[0].bn3.constant(), before)
    assert not model.conv1.weight.any()


def test_a_second_plug_on_other_sites_is_remembered() -> None:
    model = tiny()
    plug(model, dict(ASR, sites=['layer1.*.bn3']))
    plug(model, dict(ASR, sites=['layer2.*.bn3']))
    assert [s['sites'] for s in model.plug_spec] == [['layer1.*.bn3'], ['layer2.*.bn3']]
    assert len(describe(model).sites) == 4


def test_layers_keep_their_call_forms() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, stride=2), nn.InstanceNorm2d(4, affine=True))
    plain = copy.deepcopy(model)
    plug(model, dict(ASR, sites=['0', '1'], preserve=True))
    x = torch.randn(1, 4, 4, 4)
    assert torch.equal(model[0](input=x, output_size=(10, 10)), plain[0](x, output_size=(10, 10)))
    torch.testing.assert_close(model[1](x[0]), plain[1](x[0]))


def test_gates_take_the_dtype_and_mode_of_their_layer() -> None:
    model = tiny().double().eval()
    plug(model, [ASR, CLASSIC])
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert not any(m.training for m in model.modules())


def test_conversion_to_sync_bn_loses_no_gate_unseen() -> None:
    model = randomise(tiny()).eval()
    plug(model, ASR)
    x = torch.randn(X)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    for lost in (describe, asr_downstream.fold):
        with pytest.raises(PlugError, match=r'rebind\(model\)'):
            lost(converted)
    assert len(rebind(converted)) == 6
    torch.testing.assert_close(converted(x), expected)
    folded, _ = asr_downstream.fold(converted)
    assert type(folded.layer1[0].bn3) is nn.SyncBatchNorm
    torch.testing.assert_close(folded(x), expected)


def test_describe_prints_a_table_and_says_when_there_is_none() -> None:
    model = tiny()
    assert str(describe(model)).startswith("ResNet: no plugged sites; sites='residual' means layer1.0.bn3, ")
    assert len(describe(model).candidates) == 6
    assert str(describe(nn.ReLU())) == 'ReLU: no plugged sites; no residual block is known'
    text = str(plug(model, ASR))
    assert 'layer1.0.bn3' in text
    assert 'exactly' in text
    assert describe(model).parameters == sum(p.numel() for n, p in model.named_parameters() if '.gate.' in n)
