"""plug: each wrong spec or unfit model has its own message, and the model stays as it was."""

from __future__ import annotations

import warnings

import pytest
from helpers.plugged import ASR, CLASSIC, assert_untouched, snapshot, tiny
from torch import Tensor, nn

import asr_downstream
from asr_downstream import PlugError, plug
from asr_downstream.models.resnet_cifar import ResNet
from asr_downstream.registry import ATTENTIONS as REGISTRY


class Ramp(nn.Module):
    """An attention whose gates have the wrong number of channels."""

    def __init__(self, channels: int, extra: int = 1) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels + extra)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(asr_downstream.pool(x)).sigmoid()


def shared(model: ResNet) -> None:
    model.layer1[0].bn3.weight = model.layer1[1].bn3.weight


def not_affine(model: ResNet) -> None:
    model.layer1[0].bn3 = nn.BatchNorm2d(32, affine=False)


class MyNorm(nn.BatchNorm2d):
    """A subclass may compute anything."""


def subclassed(model: ResNet) -> None:
    model.layer1[0].bn3 = MyNorm(32)


def computed(model: ResNet) -> None:
    nn.utils.prune.l1_unstructured(model.fc, 'weight', 0.5)


def transformer(model: ResNet) -> None:
    model.fc = nn.TransformerEncoderLayer(8, 2, 16)


def plugged_before(model: ResNet) -> None:
    plug(model, ASR)


BAD = [
    (dict(type='ASRR', attention=dict(type='SE')), None, "unknown plug 'ASRR'.*did you mean 'ASR'"),
    (dict(type='ASR', attention=dict(type='SEE')), None, "unknown attention 'SEE'.*did you mean 'SE'"),
    (dict(type='ASR', attention='SE'), None, r"attention=dict\(type='SE'\)"),
    (dict(type='ASR'), None, 'attention'),
    (dict(ASR, repeat=0), None, 'repeat'),
    (dict(ASR, reduction=3), None, 'reduction'),
    (dict(type='ASR', attention=dict(type='SE', r=3)), None, "'r'"),
    (dict(ASR, sites=['layer9.*']), None, r"nothing in ResNet matches 'layer9"),
    (dict(ASR, sites=['layer1']), None, 'Sequential'),
    (dict(ASR, sites='everything'), None, "'residual', 'all'"),
    (dict(type='ASR', attention=dict(type='LayerScale', init_value=0.0), preserve=True), None, 'preserve'),
    (dict(type='ASR', attention=dict(type='Ramp')), None, r'\(1, 33\), expected \(1, 32\)'),
    ([CLASSIC, ASR], None, 'put the ASR first'),
    ([], None, 'empty'),
    (ASR, plugged_before, 'plugged already'),
    (ASR, shared, 'shared with another layer'),
    (ASR, not_affine, 'affine=False'),
    (ASR, subclassed, 'test_refusals.MyNorm is not a layer that can be folded'),
    (dict(ASR, sites=['fc']), computed, 'weight is computed from other tensors'),
    (dict(ASR, sites=['fc.linear2']), transformer, 'TransformerEncoderLayer reads its weights past'),
    (
        dict(type='Attention', attention=dict(type='CBAM'), sites=['fc']),
        None,
        'fc: .*CBAM.*spatial=False',
    ),
    (dict(type='ASR', attention=dict(type='SE', reduction=0)), None, 'SE.*arguments'),
]


@pytest.mark.parametrize(('spec', 'damage', 'message'), BAD, ids=[m for *_, m in BAD])
def test_refusals_name_the_cause_and_leave_the_model_alone(spec: dict, damage: object, message: str) -> None:
    if 'Ramp' not in REGISTRY.module_dict:
        REGISTRY.register_module(module=Ramp)
    model = tiny()
    if damage is not None:
        damage(model)
    before = snapshot(model)
    with pytest.raises(PlugError, match=message):
        plug(model, spec)
    assert_untouched(model, before)


def test_no_known_block_lists_what_there_is() -> None:
    with pytest.raises(PlugError, match=r'no residual block.*register_site.*sites=\[.*0, 1'):
        plug(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ASR)


def test_layer_norm_over_several_axes_has_no_channels() -> None:
    with pytest.raises(PlugError, match='last axis'):
        plug(nn.Sequential(nn.LayerNorm((4, 8))), dict(ASR, sites=['0']))


def test_frozen_blocks_are_left_out_with_a_warning() -> None:
    model = tiny()
    model.layer1.requires_grad_(False)
    with pytest.warns(UserWarning, match=r'2 sites.*not plugged: layer1.0.bn3, layer1.1.bn3.*frozen_stages'):
        rows = plug(model, ASR).sites
    assert rows[0].path == 'layer2.0.bn3'


def test_frozen_blocks_named_by_the_user_are_plugged_with_a_warning() -> None:
    model = tiny()
    model.layer1.requires_grad_(False)
    with pytest.warns(UserWarning, match='may never train'):
        assert len(plug(model, dict(ASR, sites=['layer1.*.bn3'])).sites) == 2


def test_all_sites_frozen_is_an_error_and_all_parameters_frozen_is_not() -> None:
    model = tiny().requires_grad_(False)
    model.fc.requires_grad_(True)
    with pytest.raises(PlugError, match='all 6 sites lie in frozen blocks'):
        plug(model, ASR)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(plug(tiny().requires_grad_(False), ASR).sites) == 6  # only the gates are to be trained
