"""fold_native: attention that stock models have by themselves becomes constant, folds, and is gone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from helpers.natives import (
    C,
    CecaModule,
    ChannelsLast,
    EcaModule,
    EffectiveSEModule,
    Host,
    SEModule,
    SqueezeExcitation,
    SqueezeExcite,
    SqueezeExciteCl,
    batches,
    conv,
    host,
    transformers_block,
)
from helpers.plugged import assert_untouched, snapshot
from PIL import Image
from torch import Tensor, nn

from asr_downstream import (
    CheckpointError,
    FoldError,
    fold,
    fold_native,
    load_plugged,
    plug,
    register_native,
    remove_native,
    transfer_weights,
    verify,
)
from asr_downstream.folding.native import fold as fold_module
from asr_downstream.folding.native import places
from asr_downstream.folding.native.blocks import Constant, find_blocks
from asr_downstream.modules.native import NATIVE, known_natives, native_of

DATA = batches()
BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    'torchvision': (SqueezeExcitation, 'se'),
    'timm-SEModule': (SEModule, 'se'),
    'timm-SqueezeExcite': (SqueezeExcite, 'se'),
    'timm-EffectiveSEModule': (EffectiveSEModule, 'se'),
    'timm-SqueezeExciteCl': (lambda: ChannelsLast(SqueezeExciteCl()), 'se.inner'),
    'timm-EcaModule': (EcaModule, 'se'),
    'timm-CecaModule': (CecaModule, 'se'),
    'RegNet': (lambda: transformers_block('RegNetSELayer'), 'se'),
    'EfficientNet': (lambda: transformers_block('EfficientNetSqueezeExciteLayer'), 'se'),
    'PPLCNet': (lambda: transformers_block('PPLCNetSqueezeExcitationModule'), 'se'),
    'mmdet-SELayer': (lambda: mmdet_block('SELayer'), 'se'),
    'mmdet-ChannelAttention': (lambda: mmdet_block('ChannelAttention'), 'se'),
}
NEED_MMDET = {name: [pytest.mark.det] for name in BLOCKS if name.startswith('mmdet')}


def mmdet_block(name: str) -> nn.Module:
    layers = pytest.importorskip('mmdet.models.layers.se_layer')
    return layers.SELayer(C, ratio=2) if name == 'SELayer' else layers.ChannelAttention(C)


def ready(model: nn.Module) -> Any:
    return randomise(model).double().eval()


def gates_of(model: nn.Module, path: str, data: list[Tensor] = DATA) -> Tensor:
    """Gates of a block, seen from outside: what it makes of its input."""
    found: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        ones = torch.ones_like(args[0])
        axis = 3 if isinstance(module, SqueezeExciteCl) else 1
        share = (output / torch.where(args[0] == 0, ones, args[0])).movedim(axis, 1).flatten(2)
        found.append(share.gather(2, share.abs().argmax(2, keepdim=True)).squeeze(2))

    handle = model.get_submodule(path).register_forward_hook(watch)
    for x in data:
        model(x)
    handle.remove()
    return torch.cat(found)


def constant(model: nn.Module, path: str, gates: Tensor) -> nn.Module:
    """A copy with constant gates in the place of a block."""
    found = copy.deepcopy(model)
    native = native_of(found.get_submodule(path))
    parent, _, name = path.rpartition('.')
    setattr(found.get_submodule(parent), name, Constant(gates.detach(), native.axis))
    return found


def only(report: Any) -> Any:
    (block,) = report.blocks
    return block


@pytest.mark.parametrize('activation', [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize('name', [pytest.param(name, marks=NEED_MMDET.get(name, [])) for name in BLOCKS])
def test_each_class_folds_its_mean_gates(name: str, activation: type) -> None:
    build, inner = BLOCKS[name]
    model = ready(host(build(), activation))
    before = snapshot(model)
    path = f'block.{inner}'
    mean = gates_of(model, path).mean(0)
    folded, report = fold_native(model, DATA, rounds=0)
    assert_untouched(model, before)
    assert report.removed == (path,)
    assert type(folded.get_submodule(path)) is nn.Identity
    block = only(report)
    assert (block.side, block.layer) == (
        ('outputs', 'block.before.1') if activation is nn.ReLU else ('inputs', 'block.after.0')
    )
    assert verify(folded, constant(model, path, mean), DATA).relative < 1e-10
    assert verify(folded, model, DATA).relative > 1e-4  # the gates do move
    assert verify(folded, constant(model, path, mean.flip(0)), DATA).relative > 1e-4
    assert block.error < 1e-10
    assert report.checked.relative < 1e-10


def test_what_does_not_take_the_gates_stays_bit_for_bit() -> None:
    for activation, changed in ((nn.ReLU, {'block.before.1.weight', 'block.before.1.bias'}),
                                (nn.SiLU, {'block.after.0.weight'})):  # fmt: skip
        model = ready(host(SqueezeExcitation(), activation))
        old = model.state_dict()
        new = fold_native(model, DATA, rounds=0)[0].state_dict()
        assert old.keys() - new.keys() == {k for k in old if k.startswith('block.se.')}
        assert not new.keys() - old.keys()
        assert {k for k in new if not torch.equal(new[k], old[k])} == changed


PLACES: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str, int]] = {
    'conv-with-bias': (lambda se: Host([conv(3, bias=True), nn.ReLU()], se, [nn.SiLU()], True),
                       'outputs', 'block.before.0', 1),
    'depthwise': (lambda se: Host([conv(3, groups=C, bias=True), nn.ReLU()], se, [nn.SiLU()], True),
                  'outputs', 'block.before.0', 1),
    'end-of-branch': (lambda se: Host([conv(), nn.BatchNorm2d(C)], se, [], True), 'outputs', 'block.before.1', 1),
    'group-norm': (lambda se: Host([conv(), nn.GroupNorm(2, C), nn.LeakyReLU()], se, [nn.SiLU()], True),
                   'outputs', 'block.before.1', 1),
    'transposed-before': (lambda se: Host([nn.ConvTranspose2d(C, C, 3, groups=4), nn.ReLU()], se, [nn.SiLU()], False),
                          'outputs', 'block.before.0', 1),
    'pixel-shuffle': (lambda se: Host([nn.Conv2d(C, 4 * C, 1), nn.PixelShuffle(2)], se, [nn.SiLU()], False),
                      'outputs', 'block.before.0', 4),
    'depthwise-after': (lambda se: Host([nn.SiLU()], se, [conv(3, groups=C)], True), 'inputs', 'block.after.0', 1),
    'groups-after': (lambda se: Host([nn.SiLU()], se, [conv(3, groups=4, bias=True)], True),
                     'inputs', 'block.after.0', 1),
    'transposed-after': (lambda se: Host([nn.SiLU()], se, [nn.ConvTranspose2d(C, C, 3, groups=2)], False),
                         'inputs', 'block.after.0', 1),
    'pool-pad-dropout': (lambda se: Host([nn.SiLU()], se, [nn.MaxPool2d(3, 2), nn.ZeroPad2d(1), nn.Dropout(), conv()],
                                         False), 'inputs', 'block.after.3', 1),
    'relu-pool-flatten': (lambda se: Host([nn.SiLU()], se, [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                                            nn.Linear(4 * C, C), nn.Unflatten(1, (C, 1, 1))], False),
                          'inputs', 'block.after.3', 4),
    'head': (lambda se: Host([nn.SiLU()], se, [], False), 'inputs', 'head', 1),
    'relu6': (lambda se: Host([conv(), nn.BatchNorm2d(C), nn.ReLU6()], se, [conv()], True),
              'inputs', 'block.after.0', 1),
    'unit-norm-in-training': (lambda se: Host([conv(), nn.BatchNorm2d(C, affine=False)], se, [conv()], True),
                              'inputs', 'block.after.0', 1),
}  # fmt: skip


@pytest.mark.parametrize('name', PLACES)
def test_where_gates_go(name: str) -> None:
    build, side, layer, repeat = PLACES[name]
    model = ready(build(SqueezeExcitation()))
    if name == 'relu6':  # real data do not come near 6
        model.block.before[1].weight.data.mul_(0.01)
        model.block.before[1].bias.data.mul_(0.01)
    if name == 'unit-norm-in-training':
        model.block.before[1].train()  # divides by the statistics of a batch, so nothing goes through it
    mean = gates_of(copy.deepcopy(model), 'block.se').mean(0)
    folded, report = fold_native(model, DATA, rounds=0)
    block = only(report)
    assert (block.side, block.layer, block.kept) == (side, layer, '')
    assert block.error < 1e-10
    assert verify_training(folded, constant(model, 'block.se', mean)) < 1e-10
    old, new = model.get_submodule(layer).weight, folded.get_submodule(layer).weight
    per_channel = mean.repeat_interleave(repeat)
    if name == 'depthwise-after':
        torch.testing.assert_close(new, old * per_channel.view(-1, 1, 1, 1))
    elif name == 'head':
        torch.testing.assert_close(new, old * per_channel)
    elif name == 'pixel-shuffle':
        torch.testing.assert_close(new, old * per_channel.view(-1, 1, 1, 1))


def verify_training(a: nn.Module, b: nn.Module) -> float:
    """`verify` for models with a part in training mode, whose statistics of a batch are the same in both."""
    with torch.no_grad():
        return max(float(((m := b(x)) - a(x)).abs().max() / m.abs().max()) for x in DATA)


class TwoReaders(Host):
    """After SiLU, the convolution and a second one read the gated map."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__([nn.SiLU()], se, [conv()], False)
        self.other = conv()

    def forward(self, x: Tensor) -> Tensor:
        gated = self.block.se(self.block.before(self.stem(x)))
        return self.head((self.block.after(gated) * self.other(gated).tanh()).mean((2, 3)))


class Shared(Host):
    """The layer before the attention runs a second time elsewhere."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__([conv()], se, [nn.SiLU()], False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.block(x) + self.block.before(x.tanh())).mean((2, 3)))


class Tied(Host):
    """The layer before the attention has the weight of another."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__([conv()], se, [nn.SiLU()], False)
        self.other = conv()
        self.other.weight = self.block.before[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.block(x) + self.other(x)).mean((2, 3)))


class Deaf(Host):
    """Nothing that comes out depends on the attention."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__([conv()], se, [conv()], False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gated = self.block.after(self.block.se(self.block.before(x)))
        return self.head((x + 0 * gated).mean((2, 3)))


class Twice(Host):
    """One attention in two places."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__([conv()], se, [conv()], False)
        self.again = se

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(self.stem(x)).mean((1, 2, 3))[:, None]


def between(*after: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return lambda se: Host([conv(), nn.SiLU()], se, list(after), False)


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    'silu-on-both-sides': (between(nn.SiLU(), conv()), 'do not go through'),
    'residual-reader': (lambda se: Host([conv(), nn.SiLU()], se, [], True), 'do not go through'),
    'norm-after': (between(nn.BatchNorm2d(C), nn.Tanh(), conv()), 'do not go through'),
    'reflecting-norm': (between(nn.GroupNorm(2, C), conv()), 'do not go through'),
    'two-readers': (TwoReaders, 'do not go through'),
    'ran-twice': (Shared, 'do not go through'),
    'tied': (Tied, 'do not go through'),
    'nothing-to-see': (Deaf, 'do not depend on it'),
    'registered-twice': (Twice, 'several places'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_folded_stays_and_is_named(name: str) -> None:
    build, reason = REFUSED[name]
    model = ready(build(SqueezeExcitation()))
    with pytest.warns(UserWarning, match='none of the 1 attention blocks'):
        folded, report = fold_native(model, DATA, rounds=0)
    assert reason in only(report).kept
    assert report.removed == ()
    assert 'kept block.se: ' in str(report)
    assert verify(folded, model, DATA).absolute == 0
    assert folded.state_dict().keys() == model.state_dict().keys()


def test_a_norm_in_training_lets_nothing_through() -> None:
    model = ready(Host([conv(), nn.BatchNorm2d(C, affine=False)], SqueezeExcitation(), [nn.SiLU(), conv()], False))
    model.block.before[1].train()
    statistics = model.block.before[1].running_mean.clone()
    with pytest.warns(UserWarning, match='none of'):
        _, report = fold_native(model, DATA, rounds=0)
    assert 'outputs of block.before.0' in only(report).kept
    assert torch.equal(model.block.before[1].running_mean, statistics)


def test_a_model_that_draws_numbers_cannot_be_tried() -> None:
    model = ready(Host([conv()], SqueezeExcitation(), [nn.Dropout(), conv()], False))
    model.block.after[0].train()
    with pytest.warns(UserWarning, match='none of'):
        _, report = fold_native(model, DATA, rounds=0)
    assert 'something else each time' in only(report).kept


def test_gates_of_both_signs_do_not_go_through_a_maximum() -> None:
    def build() -> Any:
        se = SqueezeExcitation(scale_activation=nn.Tanh)
        return ready(Host([nn.SiLU()], se, [nn.MaxPool2d(2), conv()], False))

    model = build()
    model.block.se.fc2.bias.data = torch.linspace(-2, 2, C).double()
    with pytest.warns(UserWarning, match='none of'):
        _, report = fold_native(model, DATA, rounds=0)
    assert 'do not go through' in only(report).kept
    model.block.se.fc2.bias.data = torch.linspace(9, 10, C).double()  # positive on all data
    assert fold_native(model, DATA, rounds=0)[1].removed == ('block.se',)


class Odd(SqueezeExcitation):
    """Known by its base, but it adds something."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Lacking(SqueezeExcitation):
    def __init__(self) -> None:
        super().__init__()
        self.excite = self.scale_activation
        del self.scale_activation

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.fc2(self.fc1(self.avgpool(x))))


class Unused(Host):
    def __init__(self, se: nn.Module) -> None:
        super().__init__([conv()], SqueezeExcitation(), [conv()], False)
        self.idle = se


def test_blocks_that_are_not_what_their_name_says_or_do_not_run() -> None:
    cases = ((host(Odd()), 'does not return its input times'), (host(Lacking()), "has no 'scale_activation'"))
    for model, reason in cases:
        with pytest.warns(UserWarning, match='none of'):
            _, report = fold_native(ready(model), DATA, rounds=0)
        assert reason in only(report).kept
    _, report = fold_native(ready(Unused(SqueezeExcitation())), DATA, rounds=0)
    assert [b.kept for b in report.blocks] == ['', 'was not reached by the calibration data']


def test_a_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(host(SqueezeExcitation()))
    right = places.constants_of
    with monkeypatch.context() as patch:
        patch.setattr(places, 'constants_of', lambda side, repeat, gates: right(side, repeat, gates.flip(0)))
        with pytest.warns(UserWarning, match='none of'):
            _, report = fold_native(model, DATA, rounds=0)
    assert 'do not go through' in only(report).kept
    wrong = {'block.se': places.Place('block.after.1', 'outputs', 1, 0.0)}
    with monkeypatch.context() as patch:
        patch.setattr(fold_module, 'find_places', lambda *_: (wrong, {}))
        with pytest.raises(FoldError, match='computes something else than its mean gates'):
            fold_native(model, DATA, rounds=0)


def regnet(**options: Any) -> Any:
    transformers = pytest.importorskip('transformers')
    found = transformers.RegNetForImageClassification(
        transformers.RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], groups_width=4, num_labels=5, **options
        )
    )
    return ready(found)


def logits(model: Any, x: Tensor) -> Tensor:
    return model(x).logits


IMAGES = [torch.randn(4, 3, 32, 32, dtype=torch.float64) for _ in range(2)]


def uneven() -> Any:
    """A RegNet-Y whose gates move more from block to block."""
    model = regnet(layer_type='y')
    for number, path in enumerate(find_blocks(model)):
        block = model.get_submodule(path)
        block.attention[2].weight.data.mul_(3 * number)
    return model


def test_the_budget_keeps_the_least_constant_blocks() -> None:
    model = uneven()
    names = list(find_blocks(model))
    everything, report = fold_native(model, IMAGES, step=logits, rounds=0)
    assert report.removed == tuple(names)
    assert all(b.error < 1e-10 for b in report.blocks)
    ratios = [b.ratio for b in report.blocks]
    budget = report.calibration.change / 4
    folded, report = fold_native(model, IMAGES, step=logits, max_drop=budget, rounds=0)
    kept = [b.path for b in report.blocks if b.kept]
    assert 0 < len(kept) < len(names)
    by_ratio = sorted(names, key=lambda name: ratios[names.index(name)])
    assert set(kept) == set(by_ratio[-len(kept):])  # fmt: skip
    assert all('max_drop' in b.kept and b.layer for b in report.blocks if b.kept)
    assert report.calibration.change <= budget
    assert set(find_blocks(folded)) == set(kept)
    none, report = fold_native(model, IMAGES, step=logits, max_drop=-1.0, rounds=0)
    assert report.removed == ()
    assert verify(none, model, IMAGES).absolute == 0

    def metric(m: Any) -> float:
        return -float((logits(m, IMAGES[0]) - logits(model, IMAGES[0])).detach().abs().max())

    drop = -metric(everything)
    _, report = fold_native(model, IMAGES, step=logits, metric=metric, max_drop=drop / 2, rounds=0)
    assert report.calibration.metric_before == 0
    assert 0 > report.calibration.metric_after >= -drop / 2
    assert 0 < len(report.removed) < len(names)


def test_the_report() -> None:
    model = uneven()
    folded, report = fold_native(model, IMAGES, step=logits, metric=lambda m: 1.0, rounds=2)
    found = json.loads(json.dumps(report.as_dict()))
    assert found['removed'] == list(report.removed)
    assert found['parameters_before'] == sum(p.numel() for p in model.parameters())
    assert found['parameters_after'] == sum(p.numel() for p in folded.parameters())
    assert found['parameters_before'] > found['parameters_after']
    assert found['latency_ratio']['median'] > 0
    assert found['fold_difference'] < 1e-10
    assert found['calibration']['metric_after'] == 1.0
    text = str(report)
    for word in ('stripe ratio', 'removed 4 of 4', 'parameters', 'layer.1.normalization', 'metric: 1.0000', '(4, 3, '):
        assert word in text
    ratio = found['blocks'][1]['ratio']
    gates = gates_of(model, found['blocks'][1]['path'], IMAGES)
    expected = gates.std(0, unbiased=False).mean() / gates.mean(0).std(unbiased=False)
    assert ratio == pytest.approx(float(expected.detach()))


def test_float32_is_rounded_once() -> None:
    model = uneven().float()
    data = [x.float() for x in IMAGES]
    folded, report = fold_native(model, data, step=logits, rounds=0)
    wide = fold_native(copy.deepcopy(model).double(), IMAGES, step=logits, rounds=0)[0]
    assert all(p.dtype == torch.float32 for p in folded.parameters())
    assert verify(folded.double(), wide, IMAGES).relative < 1e-5
    assert report.checked.relative < 1e-10  # the algebra is tried in float64


def test_two_blocks_may_fold_into_one_layer() -> None:
    before = [conv(), nn.ReLU()]
    inner = Host(before, SqueezeExcitation(), [conv(bias=True), SqueezeExcitation(), nn.SiLU()], False)
    inner.block.before[0] = nn.Sequential(nn.SiLU())  # nothing to fold into before
    inner.block.before[1] = nn.SiLU()
    model = ready(inner)
    folded, report = fold_native(model, DATA, rounds=0)
    assert [(b.layer, b.side) for b in report.blocks] == [('block.after.0', 'inputs'), ('block.after.0', 'outputs')]
    means = {path: gates_of(model, path).mean(0) for path in ('block.se', 'block.after.1')}
    other = model
    for path, mean in means.items():
        other = constant(other, path, mean)
    assert verify(folded, other, DATA).relative < 1e-10


def test_what_is_refused_outright() -> None:
    model = ready(host(SqueezeExcitation()))
    with pytest.raises(FoldError, match='training mode'):
        fold_native(copy.deepcopy(model).train(), DATA)
    with pytest.raises(FoldError, match='no attention that is known .*RegNetSELayer.*register_native'):
        fold_native(ready(host(nn.Identity())), DATA)
    with pytest.raises(FoldError, match='not an iterator'):
        fold_native(model, iter(DATA))
    with pytest.raises(FoldError, match='no data'):
        fold_native(model, [])
    with pytest.raises(FoldError, match='rounds'):
        fold_native(model, DATA, rounds=-1)
    with pytest.raises(FoldError, match='max_drop'):
        fold_native(model, DATA, max_drop='a little')
    plugged = copy.deepcopy(model)
    plug(plugged, dict(type='ASR', attention=dict(type='SE', reduction=4), sites=['block.after.1']))
    with pytest.raises(FoldError, match='is plugged; fold the model first'):
        fold_native(plugged, DATA)
    diverged = copy.deepcopy(model)
    diverged.block.se.fc2.bias.data[0] = float('nan')
    with pytest.raises(FoldError, match='not finite'):
        fold_native(diverged, DATA)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(x)


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('asr_downstream.modules.native.NATIVE', dict(NATIVE))
    model = ready(host(Mine()))
    with pytest.raises(FoldError, match='no attention that is known'):
        fold_native(model, DATA)
    register_native(Mine, 'excite')
    assert fold_native(model, DATA, rounds=0)[1].removed == ('block.se',)
    for wrong in ((Mine, ''), (3, 'excite'), (Mine, 'excite', True)):
        with pytest.raises(FoldError, match='register_native'):
            register_native(*wrong)


def test_known_classes_are_those_of_the_libraries() -> None:
    names = known_natives()
    assert 'timm.layers.eca.EcaModule' in names
    assert 'torchvision.ops.misc.SqueezeExcitation' in names
    transformers = [name for name in names if name.startswith('transformers.')]
    pytest.importorskip('transformers')
    for name in transformers:
        module, _, cls = name.rpartition('.')
        __import__(module)
        assert hasattr(__import__(module, fromlist=[cls]), cls), name


def test_a_regnet_y_without_its_attention_is_a_regnet_x(tmp_path: Any) -> None:
    transformers = pytest.importorskip('transformers')
    model = regnet(layer_type='y')
    folded, report = fold_native(model, IMAGES, step=logits, rounds=0)
    stock = regnet(layer_type='x')
    found = transfer_weights(folded, stock)
    assert type(found) is transformers.RegNetForImageClassification
    found.load_state_dict(found.state_dict())
    assert verify(found, folded, IMAGES).absolute == 0
    assert verify(found, stock, IMAGES).relative > 1e-3
    found.save_pretrained(tmp_path)
    plain = transformers.RegNetForImageClassification.from_pretrained(tmp_path).eval()
    assert verify(plain, folded, IMAGES).absolute == 0
    with pytest.raises(FoldError, match='is still there'):
        transfer_weights(model, stock)
    with pytest.raises(FoldError, match='not the same in order and shape'):
        transfer_weights(folded, nn.Linear(2, 2))


def test_what_is_left_is_built_again(tmp_path: Any) -> None:
    pytest.importorskip('transformers')
    model = uneven()
    budget = fold_native(model, IMAGES, step=logits, rounds=0)[1].calibration.change / 4
    folded, report = fold_native(model, IMAGES, step=logits, max_drop=budget, rounds=0)
    fresh = remove_native(regnet(layer_type='y'), report.removed)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert verify(fresh, folded, IMAGES).absolute == 0
    for again in (folded, fresh, copy.deepcopy(folded)):
        with pytest.warns(UserWarning, match='attention that was removed.*load_plugged'):
            again.save_pretrained(tmp_path)
        assert not (tmp_path / 'model.safetensors').exists()  # the plain library would fill the blocks at random
        assert verify(load_plugged(tmp_path), folded, IMAGES).absolute == 0
    twice, second = fold_native(folded, IMAGES, step=logits, rounds=0)
    assert {*report.removed, *second.removed} == set(find_blocks(model))
    with pytest.warns(UserWarning, match='attention that was removed'):
        twice.save_pretrained(tmp_path)
    assert verify(load_plugged(tmp_path), twice, IMAGES).absolute == 0
    for wrong in (['regnet.nothing'], ['regnet'], [''], ['classifier.1']):
        with pytest.raises(CheckpointError, match='no attention block'):
            remove_native(regnet(layer_type='y'), wrong)


def test_plugging_what_is_left_and_folding_again(tmp_path: Any) -> None:
    pytest.importorskip('transformers')
    folded, _ = fold_native(regnet(layer_type='y'), IMAGES, step=logits, rounds=0)
    plug(folded, dict(type='ASR', attention=dict(type='SE', reduction=4), sites=['*layer.3.normalization']))
    again, _ = fold(randomise(folded).double().eval())
    with pytest.warns(UserWarning, match='attention that was removed'):
        again.save_pretrained(tmp_path)
    assert verify(load_plugged(tmp_path), again, IMAGES).absolute == 0


@pytest.mark.slow
def test_the_program_trains_goes_on_and_tabulates(tool: Any, tmp_path: Any) -> None:
    draw = np.random.default_rng(0)
    for kind in ('cell', 'dust'):
        (tmp_path / 'images' / kind).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / kind / f'{number}.png')
    options = ('--data', tmp_path / 'images', '--out', tmp_path)
    assert 'epoch 1' in tool('native', *options, '--epochs', 2, '--minutes', 0).stdout
    done = tool('native', *options, '--epochs', 2)
    assert done.returncode == 0, done.stderr
    assert 'epoch 1' not in done.stdout
    assert 'epoch 2' in done.stdout
    found = json.loads((tmp_path / 'regnet-y-0.json').read_text())
    assert found['images'] == {'training': 72, 'held_out': 8, 'calibration': 72}
    assert len(found['budgets'][0]['removed']) == 6
