"""Plugs with ``shift=True`` and ``side='input'``: where they go, what is refused, and that everyone knows of them."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.plugged import ASR, CLASSIC, X, assert_untouched, snapshot, tiny
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import Tensor, nn

from asr_downstream import PlugError, describe, fold, plug, record, verify
from asr_downstream.engine.optim import decaying_groups
from asr_downstream.measure.cost import saved_bytes
from asr_downstream.plugging.gating.gates import ConstantGate

SHIFT = {**ASR, 'shift': True}
INPUT = {**ASR, 'side': 'input', 'sites': ['layer*.conv[123]']}
FREE = dict(type='Attention', attention=dict(type='LayerScale', init_value=0.5))


def plugged(spec: Any) -> Any:
    model = randomise(tiny()).eval()
    plug(model, spec)
    randomise(model)
    return model


BAD = [
    (dict(ASR, side='inputs'), "side='inputs' is not known: use 'output' or 'input'"),
    (dict(ASR, side=1), "should be str|side=1"),
    (dict(ASR, shift='yes'), "shift='yes'"),
    (dict(CLASSIC, shift=True), r"Attention: shift=True folds with constant gates only, and those of SE depend.*'ASR'"),
    (dict(CLASSIC, side='input'), r"Attention: side='input' folds with constant gates only, and those of SE depend"),
    (dict(type='DIA', attention=dict(type='DIALSTM'), shift=True), 'DIA: shift=True folds with constant gates only'),
    (dict(INPUT, shift=True), r'a shift of what a layer reads has no fold where zeros are padded; give two plugs'),
    (dict(SHIFT, sites=['layer1.0.*']), r'layer1\.0\.conv1.*: no bias, which shift=True folds into'),
    (dict(ASR, side='input'), r"layer1\.0\.bn3.*side='input' has no effect on a norm.*name convolutions"),
    (dict(INPUT, sites=['layer1.0.*']), r"layer1\.0\.bn1.*side='input' has no effect on a norm"),
    ([CLASSIC, SHIFT], r'put the ASR first in the list'),
]  # fmt: skip


@pytest.mark.parametrize(('spec', 'message'), BAD)
def test_what_has_no_fold_is_refused(spec: Any, message: str) -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(PlugError, match=message):
        plug(model, spec)
    assert_untouched(model, before)


def test_all_means_what_can_be_scaled() -> None:
    model = tiny()
    plug(model, {**INPUT, 'sites': 'all'})
    assert {row.layer for row in describe(model).sites} == {'Conv2d', 'Linear'}
    norms = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
    with pytest.raises(PlugError, match=r"0, 1: side='input' has no effect on a norm"):
        plug(norms, {**INPUT, 'sites': 'all'})


@pytest.mark.parametrize(
    'spec',
    [
        SHIFT,
        INPUT,
        {**FREE, 'shift': True},
        {**FREE, 'side': 'input', 'sites': ['*.conv2', 'fc']},
        [SHIFT, INPUT],
        [CLASSIC, INPUT],
        {**INPUT, 'attention': dict(type='DIALSTM', reduction=2)},
        {**SHIFT, 'attention': dict(type='DIALSTM', reduction=2)},
        {**INPUT, 'share': 'width'},
    ],
)
def test_models_fold_to_what_they_compute(spec: Any) -> None:
    model = plugged(spec).double()
    x = torch.randn(X, dtype=torch.float64)
    classic = isinstance(spec, list) and CLASSIC in spec
    folded, report = fold(model, dynamic='keep' if classic else 'error')
    assert verify(model, folded, x).relative < 1e-10
    stock = tiny()
    assert classic or folded.state_dict().keys() == stock.state_dict().keys()
    assert len(report.sites) == sum(row.folds or classic for row in describe(model).sites if 'ASR' in row.plug)
    for gate in model.modules():  # negative control
        if isinstance(gate, ConstantGate):
            randomise(gate)
    assert verify(model, folded, x).relative > 1e-6


def test_a_stage_of_gates_of_inputs_has_one_width_of_inputs() -> None:
    model = tiny()
    plug(model, {**INPUT, 'attention': dict(type='DIALSTM'), 'sites': ['layer2.*.conv1']})
    widths = [unit.sites for unit in describe(model).shared]
    assert widths == [('layer2.0.conv1',), ('layer2.1.conv1',)]
    assert [row.channels for row in describe(model).sites] == [32, 64]


def test_keys_without_a_shift_stay() -> None:
    model, shifted = tiny(), tiny()
    plug(model, ASR)
    plug(shifted, SHIFT)
    added = shifted.state_dict().keys() - model.state_dict().keys()
    assert added == {f'{row.path}.gate.0.bias' for row in describe(model).sites}
    assert not any('bias' in name.partition('.gate.0.')[2].split('.')[:1] for name in model.state_dict())


def test_description_and_record_know_both_sides() -> None:
    model = plugged([{**SHIFT, 'repeat': 2}, {**FREE, 'shift': True}, {**INPUT, 'sites': ['layer1.*.conv3']}])
    rows = {row.path: row for row in describe(model).sites}
    assert rows['layer1.0.bn3'].plug == 'ASR(SE) x2 + shift + ASR(LayerScale) + shift'
    assert rows['layer1.0.conv3'].plug == 'input ASR(SE)'
    assert (rows['layer1.0.bn3'].side, rows['layer1.0.conv3'].side) == ('output', 'input')
    assert (rows['layer1.0.bn3'].channels, rows['layer1.0.conv3'].channels) == (32, 8)
    text = str(describe(model))
    assert 'side' in text
    assert 'side' not in str(describe(plugged(ASR)))
    with record(model) as seen, torch.no_grad():
        model(torch.randn(X))
    assert seen.inputs.keys() == {'layer1.0.conv3', 'layer1.1.conv3'}
    constants = model.layer1[0].conv3.constants()
    torch.testing.assert_close(seen.inputs['layer1.0.conv3'][0][0], constants.inputs)
    torch.testing.assert_close(seen.gates['layer1.0.bn3'][0][0], model.layer1[0].bn3.constant())
    assert 'layer1.0.conv3' not in seen.gates
    assert 'layer1.0.conv3 (input)' in str(seen)


def test_a_record_of_a_site_with_both() -> None:
    model = plugged([{**INPUT, 'repeat': 2}, {**ASR, 'sites': ['layer1.0.conv3']}])
    with record(model) as seen, torch.no_grad():
        model(torch.randn(X))
    constants = model.layer1[0].conv3.constants()
    torch.testing.assert_close(seen.inputs['layer1.0.conv3'][0][0], constants.inputs)
    torch.testing.assert_close(seen.gates['layer1.0.conv3'][0][0], constants.gate)
    assert describe(model).sites[2].side == 'both'


def test_closed_gates_of_inputs_are_named() -> None:
    model = plugged(INPUT)
    with torch.no_grad():
        model.layer1[0].conv2.gate[0].attention.fc2.bias.fill_(-30)
        model.layer1[0].conv2.gate[0].attention.fc2.weight.zero_()
    with pytest.warns(UserWarning, match=r'layer1\.0\.conv2: the gates of all channels are below'):
        _, report = fold(model)
    assert [site.path for site in report.sites if site.saturated] == ['layer1.0.conv2']


def test_shifts_that_are_not_finite_are_refused() -> None:
    model = plugged(SHIFT)
    with torch.no_grad():
        model.layer1[0].bn3.gate[0].bias[3] = float('nan')
    with pytest.raises(ValueError, match=r'layer1\.0\.bn3: 1 of 32 shifts are not finite'):
        fold(model)


def test_a_shift_is_treated_like_a_bias() -> None:
    model = plugged(SHIFT)
    shifts = [p for name, p in model.named_parameters() if name.endswith('gate.0.bias')]
    assert len(shifts) == 6
    decay = {id(p): group['weight_decay'] for group in decaying_groups(model, 0.1) for p in group['params']}
    assert {decay[id(p)] for p in shifts} == {0.0}
    constructor = DefaultOptimWrapperConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1)),
        paramwise_cfg=dict(bias_decay_mult=0.0),
    )
    decay = {id(g['params'][0]): g['weight_decay'] for g in constructor(model).optimizer.param_groups}
    assert {decay[id(p)] for p in shifts} == {0.0}
    assert {decay[id(p)] for name, p in model.named_parameters() if name.endswith('psi')} == {0.1}


def test_gates_that_were_pickled_before_there_were_shifts() -> None:
    model = plugged(ASR)
    old = copy.deepcopy(model)
    for gate in old.modules():
        if isinstance(gate, ConstantGate):
            del gate._parameters['bias'], gate.__dict__['side']
    old = pickle.loads(pickle.dumps(old))
    x = torch.randn(X)
    assert torch.equal(old(x), model(x))
    assert torch.equal(fold(old)[0](x), fold(model)[0](x))


def test_while_statistics_are_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the output is scaled and shifted; of one process the statistics are those of its batch."""
    model = nn.Sequential(nn.SyncBatchNorm(8)).double()
    plug(model, [dict(SHIFT, sites=['0']), dict(SHIFT, sites=['0'])])
    randomise(model).train()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    expected = model(x)
    stock = nn.BatchNorm2d(8).double().train()
    stock.load_state_dict({name: value for name, value in model[0].state_dict().items() if 'gate' not in name})
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(nn.SyncBatchNorm, 'forward', lambda layer, y: stock(y))
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    assert (stock(x) - expected).abs().max() > 1e-2


@pytest.mark.slow
def test_compiled_and_transformed() -> None:
    model = plugged([SHIFT, {**INPUT, 'sites': ['*.conv2', 'fc']}]).double()
    x = torch.randn(X, dtype=torch.float64)
    compiled = torch.compile(model, backend='aot_eager')
    torch.testing.assert_close(compiled(x), model(x), atol=1e-10, rtol=1e-10)
    state = dict(model.named_parameters())

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (x[None],)).square().mean()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    whole = torch.autograd.grad(loss(state, x[0]), list(model.parameters()))
    for (name, _), found in zip(model.named_parameters(), whole, strict=True):
        torch.testing.assert_close(each[name][0], found, atol=1e-9, rtol=1e-9)


def test_scaled_weights_are_not_kept() -> None:
    stock = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Tanh()) for _ in range(3)))
    x = torch.randn(1, 16, 4, 4)
    model, both = copy.deepcopy(stock), copy.deepcopy(stock)
    plug(model, dict(ASR, sites=['*.0'], side='input'))
    plug(both, [dict(ASR, sites=['*.0'], shift=True), dict(ASR, sites=['*.0'], side='input')])
    kept = [saved_bytes(m, lambda m=m: m(x).square().mean()) for m in (stock, model, both)]
    gates = 3 * 16 * 16 * 4  # bytes: 16 vectors a site and side is plenty
    assert kept[1] - kept[0] < gates < stock[0][0].weight.nbytes
    assert kept[2] - kept[0] < 2 * gates


@pytest.mark.parametrize('side', ['output', 'input'])
def test_scaled_weights_are_not_kept_where_gates_alone_learn(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()) for _ in range(3))).double()
    plug(model, dict(ASR, sites=['*.0'], side=side))
    randomise(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('.gate.' in name)
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)

    def found() -> tuple[int, list[Tensor]]:
        wanted = [p for p in model.parameters() if p.requires_grad]
        kept = saved_bytes(model, lambda: model(x).square().mean())
        return kept, list(torch.autograd.grad(model(x).square().mean(), wanted))

    kept, gradients = found()
    monkeypatch.setattr(type(model[0][0]), 'recomputes', False)
    plain, expected = found()
    assert plain - kept >= 3 * model[0][0].weight.nbytes
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_a_fresh_model_is_the_base_and_gates_alone_learn() -> None:
    stock = randomise(tiny()).eval()
    model: Any = copy.deepcopy(stock)
    plug(model, [{**SHIFT, 'preserve': True}, {**INPUT, 'preserve': True}])
    x = torch.randn(X)
    assert torch.equal(model(x), stock(x))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('.gate.' in name)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        loss = (model(x) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    folded, _ = fold(model)
    assert verify(model, folded, x).relative < 1e-5
    changed = [name for name, value in stock.state_dict().items() if not torch.equal(value, folded.state_dict()[name])]
    assert {name.rpartition('.')[0].rpartition('.')[2] for name in changed} == {'bn3', 'conv1', 'conv2', 'conv3'}


def test_what_comes_after_geglu() -> None:
    """The gate multiplies what diffusers' feed-forward reads after GEGLU, or GELU in a DiT, where no output ends."""
    diffusers = pytest.importorskip('diffusers')
    from helpers.diffusion import conditional_unet
    from helpers.far import dit

    pixels, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 5])
    cases = [
        (conditional_unet(), dict(sample=pixels, timestep=t, encoder_hidden_states=torch.randn(2, 5, 24).double())),
        (dit(), dict(hidden_states=pixels[:, :1, :4, :4], timestep=t, class_labels=torch.tensor([0, 4]))),
    ]
    kinds = set()
    for stock, inputs in cases:
        randomise(stock.double()).eval()
        model = copy.deepcopy(stock)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            rows = plug(model, dict(ASR, sites=['*.net.2'], side='input', preserve=True)).sites
        assert rows
        assert torch.equal(model(**inputs)[0], stock(**inputs)[0])
        with torch.no_grad():
            for row in rows:
                for parameter in model.get_submodule(row.path).gate.parameters():
                    parameter.add_(torch.randn_like(parameter))
        assert all(row.channels == stock.get_submodule(row.path).in_features for row in rows)
        kinds |= {type(stock.get_submodule(row.path.removesuffix('.2') + '.0')) for row in rows}
        plain = stock(**inputs)[0]
        hooks = []
        for row in rows:
            u = model.get_submodule(row.path).constants().inputs
            hooks.append(stock.get_submodule(row.path).register_forward_pre_hook(lambda _, args, u=u: (args[0] * u,)))
        expected = stock(**inputs)[0]
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-10, rtol=1e-10)
        folded, _ = fold(model)
        torch.testing.assert_close(folded(**inputs)[0], expected, atol=1e-10, rtol=1e-10)
        assert type(folded) is type(stock)
        assert (plain - expected).abs().max() > 1e-4 * expected.abs().max()
    assert kinds == {diffusers.models.activations.GEGLU, diffusers.models.activations.GELU}
