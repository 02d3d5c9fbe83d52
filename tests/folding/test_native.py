"""fold_native: attention that stock models have by themselves becomes constant, folds, and is gone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.native_models import DATA, constant, gates_of, only, ready
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
    conv,
    host,
    transformers_block,
)
from helpers.plugged import assert_untouched, snapshot
from torch import Tensor, nn

from asr_downstream import (
    FoldError,
    fold_native,
    verify,
)
from asr_downstream.folding.native import fold as fold_module
from asr_downstream.folding.native import places

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
