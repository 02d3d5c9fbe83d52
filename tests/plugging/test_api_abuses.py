"""Abuses of the API, as a table: each is refused in one line, by an error of this package, and changes nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import randomise
from helpers.far import vit
from torch import Tensor, nn

import asr_downstream
from asr_downstream import (
    AsrError,
    CheckpointError,
    FoldError,
    PlugError,
    describe,
    fold,
    fuse_conv_bn,
    plug,
    rebind,
    record,
    register_site,
    verify,
)  # fmt: skip
from asr_downstream.far import Budget, cut, load_far, replace, save_far
from asr_downstream.models.resnet_cifar import Bottleneck, ResNet

SE = dict(type='SE', reduction=4)
ASR = dict(type='ASR', attention=SE)
DIA = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))
FAR = dict(type='FAR', variant='M3', layers='all')
X = torch.randn(2, 3, 8, 8)


class Abuse(NamedTuple):
    """One row of the table."""

    what: str
    call: Callable[[], Any]
    error: type[AsrError]
    words: str


def net() -> ResNet:
    return randomise(ResNet(Bottleneck, 1, width=8)).eval()  # type: ignore[return-value]


def plugged(spec: Any = ASR) -> nn.Module:
    model = net()
    plug(model, spec)
    return model.eval()


def asr(**changes: Any) -> dict[str, Any]:
    return {**ASR, **changes}


def attention(**changes: Any) -> dict[str, Any]:
    return asr(attention=dict(type='SE', **changes))


def with_gates(value: float) -> nn.Module:
    model = plugged()
    with torch.no_grad():
        model.get_submodule('layer1.0.bn3').gate[0].psi.fill_(value)  # type: ignore[union-attr, operator, index]
    return model


def recorded(model: Any) -> Any:
    with record(model):
        return None


def far(**changes: Any) -> Callable[[], Any]:
    return lambda: replace(vit(), {**FAR, **changes})


class Reader(nn.Module):
    """Reads a weight past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.weight


def checked_reader() -> Any:
    model = Reader().eval()
    plug(model, asr(sites=['a']))
    return fold(model, check=torch.randn(2, 4))


PLUG = [
    Abuse('a model that is none', lambda: plug(None, ASR), PlugError, r'plug: expected a torch\.nn\.Module, got None'),
    Abuse('a class of models', lambda: plug(ResNet, ASR), PlugError, r'expected a torch\.nn\.Module'),
    Abuse('a state dict', lambda: plug(net().state_dict(), ASR), PlugError, r'expected a torch\.nn\.Module'),
    Abuse('model and spec swapped', lambda: plug(ASR, net()), PlugError, r'expected a torch\.nn\.Module'),
    Abuse('spec None', lambda: plug(net(), None), PlugError, r'expected a dict like .*got None'),
    Abuse('spec a number', lambda: plug(net(), 5), PlugError, 'expected a dict like .*got 5'),
    Abuse('spec a name', lambda: plug(net(), 'ASR'), PlugError, "expected a dict like .*got 'ASR'"),
    Abuse('spec a list with None', lambda: plug(net(), [ASR, None]), PlugError, 'expected a dict like .*got None'),
    Abuse('spec empty', lambda: plug(net(), {}), PlugError, 'expected a dict like'),
    Abuse('spec an empty list', lambda: plug(net(), []), PlugError, 'empty'),
    Abuse('spec a set', lambda: plug(net(), {'ASR'}), PlugError, 'expected a dict like'),
    Abuse('spec a module', lambda: plug(net(), nn.Linear(2, 2)), PlugError, 'expected a dict like'),
    Abuse('type a number', lambda: plug(net(), dict(type=5)), PlugError, 'expected a dict like'),
    Abuse('type a class', lambda: plug(net(), dict(ASR, type=nn.Linear)), PlugError, 'expected a dict like'),
    Abuse('keys that are no names', lambda: plug(net(), {**ASR, 5: 1}), PlugError, "'ASR'.*takes no 5"),
    Abuse('a misspelt key', lambda: plug(net(), asr(preserv=True)), PlugError, "'preserv'.*did you mean 'preserve'"),
    Abuse('attention a name', lambda: plug(net(), asr(attention='SE')), PlugError, r"attention=dict\(type='SE'\)"),
    Abuse('attention None', lambda: plug(net(), asr(attention=None)), PlugError, r'attention=None should be a dict'),
    Abuse('attention without a type', lambda: plug(net(), asr(attention=dict(reduction=4))), PlugError, 'type='),
    Abuse('attention type a list', lambda: plug(net(), asr(attention=dict(type=['SE']))), PlugError, 'attention'),
    Abuse('attention misspelt', lambda: plug(net(), asr(attention=dict(type='SSE'))), PlugError, "mean 'SE'"),
    Abuse('attention with channels', lambda: plug(net(), attention(channels=3)), PlugError, 'channels'),
    Abuse('preserve a text', lambda: plug(net(), asr(preserve='no')), PlugError, "preserve='no' should be True or"),
    Abuse('preserve a number', lambda: plug(net(), asr(preserve=1)), PlugError, 'preserve=1 should be True or False'),
    Abuse('preserve None', lambda: plug(net(), asr(preserve=None)), PlugError, 'preserve=None should be True or'),
    Abuse('init a text', lambda: plug(net(), asr(init='x')), PlugError, "init='x' should be a number"),
    Abuse('init None', lambda: plug(net(), asr(init=None)), PlugError, 'init=None should be a number'),
    Abuse('init True', lambda: plug(net(), asr(init=True)), PlugError, 'init=True should be a number'),
    Abuse('init nan', lambda: plug(net(), asr(init=math.nan)), PlugError, 'init=nan.*finite'),
    Abuse('init a tensor', lambda: plug(net(), asr(init=torch.ones(3))), PlugError, 'init=.*should be a number'),
    Abuse('repeat 0', lambda: plug(net(), asr(repeat=0)), PlugError, 'repeat=0'),
    Abuse('repeat True', lambda: plug(net(), asr(repeat=True)), PlugError, 'repeat=True should be a whole number'),
    Abuse('repeat a float', lambda: plug(net(), asr(repeat=2.0)), PlugError, r'repeat=2\.0 should be a whole number'),
    Abuse('share a number', lambda: plug(net(), asr(share=7)), PlugError, 'share=7'),
    Abuse('share True', lambda: plug(net(), asr(share=True)), PlugError, 'share=True'),
    Abuse('share a list of numbers', lambda: plug(net(), dict(DIA, share=[[1, 2]])), PlugError, r'share=\[\[1, 2\]\]'),
    Abuse('share a list of names', lambda: plug(net(), dict(DIA, share=['x'])), PlugError, 'list of groups'),
    Abuse('share with an empty group', lambda: plug(net(), dict(DIA, share=[[]])), PlugError, 'group 0 is empty'),
    Abuse('share misspelt', lambda: plug(net(), dict(DIA, share='stages')), PlugError, "share='stages'"),
    Abuse('sites a number', lambda: plug(net(), asr(sites=5)), PlugError, 'sites=5 should be'),
    Abuse('sites None', lambda: plug(net(), asr(sites=None)), PlugError, 'sites=None should be'),
    Abuse('sites a list of numbers', lambda: plug(net(), asr(sites=[5])), PlugError, r'sites=\[5\] should be'),
    Abuse('sites an empty list', lambda: plug(net(), asr(sites=[])), PlugError, r'sites=\[\] .*empty'),
    Abuse('sites a pattern alone', lambda: plug(net(), asr(sites='layer1.*')), PlugError, r"\['layer1\.\*'\]"),
    Abuse('sites a dict', lambda: plug(net(), asr(sites={'a': 1})), PlugError, 'sites=.* should be'),
    Abuse('sites that match nothing', lambda: plug(net(), asr(sites=['nope.*'])), PlugError, 'matches'),
    Abuse('sites the root', lambda: plug(net(), asr(sites=[''])), PlugError, 'sites'),
    Abuse('skip a number', lambda: plug(net(), asr(skip=5)), PlugError, 'skip=5 should be a list of patterns'),
    Abuse('skip None', lambda: plug(net(), asr(skip=None)), PlugError, 'skip=None should be a list of patterns'),
    Abuse('skip a pattern alone', lambda: plug(net(), asr(skip='*bn3')), PlugError, r"skip='\*bn3' should be a list"),
    Abuse('skip a list of numbers', lambda: plug(net(), asr(skip=[1])), PlugError, r'skip=\[1\] should be a list'),
    Abuse('skip everything', lambda: plug(net(), asr(skip=['*'])), PlugError, 'leaves out all'),
    Abuse('reduction a text', lambda: plug(net(), attention(reduction='4')), PlugError, "reduction='4' should be a wh"),
    Abuse('reduction True', lambda: plug(net(), attention(reduction=True)), PlugError, 'reduction=True should be a wh'),
    Abuse('reduction a float', lambda: plug(net(), attention(reduction=4.0)), PlugError, r'reduction=4\.0 should be'),
    Abuse('reduction 0', lambda: plug(net(), attention(reduction=0)), PlugError, 'reduction=0.* at least 1'),
    Abuse('reduction negative', lambda: plug(net(), attention(reduction=-4)), PlugError, 'reduction=-4.* at least 1'),
    Abuse('bias a text', lambda: plug(net(), attention(bias='no')), PlugError, "bias='no' should be True or False"),
    Abuse('norm a number', lambda: plug(net(), asr(attention=dict(type='SRM', norm=3))), PlugError, 'norm=3 should be'),
    Abuse('init_value a text', lambda: plug(net(), asr(attention=dict(type='LayerScale', init_value='x'))), PlugError,
          "init_value='x' should be a number"),
    Abuse('kernel_size even', lambda: plug(net(), asr(attention=dict(type='ECA', kernel_size=4))), PlugError, 'odd'),
    Abuse('repeat of another plug', lambda: plug(net(), dict(DIA, repeat=2)), PlugError, "'DIA'.*takes no 'repeat'"),
    Abuse('twice', lambda: plug(plugged(), ASR), PlugError, 'plugged already'),
    Abuse('twice in one list', lambda: plug(net(), [DIA, ASR]), PlugError, 'put the ASR first'),
    Abuse('a compiled model', lambda: plug(torch.compile(net()), ASR), PlugError, 'plug first, then compile'),
    Abuse('a scripted model', lambda: plug(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), asr(sites=['0'])),
          PlugError, 'TorchScript|scripted'),
    Abuse('register_site of nothing', lambda: register_site(None, 'a'), PlugError, 'register_site'),
    Abuse('register_site without a path', lambda: register_site(nn.Linear, None), PlugError, 'register_site'),
]  # fmt: skip

FOLD = [
    Abuse('fold None', lambda: fold(None), FoldError, r'fold: expected a torch\.nn\.Module, got None'),
    Abuse('fold a state dict', lambda: fold(net().state_dict()), FoldError, r'expected a torch\.nn\.Module'),
    Abuse('fold in training mode', lambda: fold(plugged().train()), FoldError, r'model\.eval\(\)'),
    Abuse('dynamic misspelt', lambda: fold(plugged(), dynamic='drop'), FoldError, "'error' or 'keep'"),
    Abuse('dynamic True', lambda: fold(plugged(), dynamic=True), FoldError, "'error' or 'keep'"),
    Abuse('dynamic a list', lambda: fold(plugged(), dynamic=['keep']), FoldError, "'error' or 'keep'"),
    Abuse('dynamic gates', lambda: fold(plugged(DIA)), FoldError, 'depend on the input'),
    Abuse('step without calibrate', lambda: fold(plugged(), step=print, refine_norms=True), FoldError, 'calibrate'),
    Abuse('calibrate a number', lambda: fold(plugged(DIA), calibrate=64), FoldError, 'calibrate=64 .*batches'),
    Abuse('calibrate a tensor', lambda: fold(plugged(DIA), calibrate=X), FoldError, r'calibrate.*\[x\]'),
    Abuse('calibrate nothing', lambda: fold(plugged(DIA), calibrate=[]), FoldError, 'no data'),
    Abuse('calibrate an iterator', lambda: fold(plugged(DIA), calibrate=iter([X])), FoldError, 'more than once'),
    Abuse('calibrate with texts', lambda: fold(plugged(DIA), calibrate=['a']), FoldError, 'calibrate'),
    Abuse('step no function', lambda: fold(plugged(DIA), calibrate=[X], step=3), FoldError, 'step=3 .*function'),
    Abuse('refine_norms a text', lambda: fold(plugged(DIA), calibrate=[X], refine_norms='no'), FoldError,
          "refine_norms='no' should be True or False"),
    Abuse('max_drop a text', lambda: fold(plugged(DIA), calibrate=[X], max_drop='1%'), FoldError, "max_drop='1%'"),
    Abuse('max_drop nan', lambda: fold(plugged(DIA), calibrate=[X], max_drop=math.nan), FoldError, 'max_drop=nan'),
    Abuse('metric a number', lambda: fold(plugged(DIA), calibrate=[X], metric=0.5), FoldError, r'metric=0\.5'),
    Abuse('metric that returns text', lambda: fold(plugged(DIA), calibrate=[X], metric=lambda m: 'good'), FoldError,
          'metric'),
    Abuse('gates that are nan', lambda: fold(with_gates(math.nan)), FoldError, 'not finite'),
    Abuse('check on what reads weights', checked_reader, FoldError, 'computes something else'),
    Abuse('check with other inputs', lambda: fold(plugged(), check='x'), FoldError, 'check'),
    Abuse('check nothing', lambda: fold(plugged(), check=[]), FoldError, 'inputs'),
]  # fmt: skip

OTHERS = [
    Abuse('verify None', lambda: verify(None, net(), X), AsrError, r'verify: expected a torch\.nn\.Module, got None'),
    Abuse('verify with a report', lambda: verify(net(), fold(plugged()), X), AsrError, r'got a tuple.*folded, report'),
    Abuse('verify in training mode', lambda: verify(net().train(), net(), X), AsrError, 'training mode'),
    Abuse('verify without inputs', lambda: verify(net(), net(), None), AsrError, 'inputs'),
    Abuse('verify with no inputs', lambda: verify(net(), net(), []), AsrError, 'inputs'),
    Abuse('verify with a text', lambda: verify(net(), net(), 'x'), AsrError, 'inputs'),
    Abuse('verify with wrong keys', lambda: verify(net(), net(), {'y': X}), AsrError, "ResNet.*'y'"),
    Abuse('verify with wrong shapes', lambda: verify(net(), net(), torch.randn(2, 4, 8, 8)), AsrError, 'ResNet'),
    Abuse('verify models of other outputs', lambda: verify(net(), nn.Identity().eval(), X), AsrError, 'shapes'),
    Abuse('describe None', lambda: describe(None), AsrError, r'describe: expected a torch\.nn\.Module'),
    Abuse('describe a spec', lambda: describe(ASR), AsrError, r'describe: expected a torch\.nn\.Module'),
    Abuse('record None', lambda: recorded(None), AsrError, r'record: expected a torch\.nn\.Module'),
    Abuse('rebind None', lambda: rebind(None), AsrError, r'rebind: expected a torch\.nn\.Module'),
    Abuse('fuse None', lambda: fuse_conv_bn(None, X), AsrError, r'fuse_conv_bn: expected a torch\.nn\.Module'),
    Abuse('fuse a plugged model', lambda: fuse_conv_bn(plugged(), X), FoldError, 'fold the model first'),
    Abuse('fuse in training mode', lambda: fuse_conv_bn(net().train(), X), FoldError, r'model\.eval\(\)'),
    Abuse('fuse with no inputs', lambda: fuse_conv_bn(net(), []), AsrError, 'inputs'),
    Abuse('fuse without inputs', lambda: fuse_conv_bn(net(), None), AsrError, 'inputs'),
    Abuse('fuse with wrong inputs', lambda: fuse_conv_bn(net(), {'y': X}), AsrError, "'y'"),
    Abuse('load_plugged None', lambda: asr_downstream.load_plugged(None), CheckpointError, 'folder'),
    Abuse('load_plugged of nothing', lambda: asr_downstream.load_plugged('/nowhere'), CheckpointError, '/nowhere'),
]

REPLACE = [
    Abuse('replace None', lambda: replace(None, FAR), PlugError, r'replace: expected a torch\.nn\.Module'),
    Abuse('replace without a spec', lambda: replace(vit(), None), PlugError, r"dict\(type='FAR'"),
    Abuse('replace with a plug', lambda: replace(vit(), ASR), PlugError, r"dict\(type='FAR'"),
    Abuse('a misspelt key', far(variantt='M3'), PlugError, "'variantt'.*did you mean 'variant'"),
    Abuse('variant unknown', far(variant='M4'), PlugError, "variant='M4'"),
    Abuse('variant a number', far(variant=3), PlugError, 'variant=3'),
    Abuse('variant a list', far(variant=['M3']), PlugError, r"variant=\['M3'\]"),
    Abuse('layers a number', far(layers=0), PlugError, 'layers=0'),
    Abuse('layers None', far(layers=None), PlugError, 'layers=None'),
    Abuse('layers empty', far(layers=[]), PlugError, r'layers=\[\]'),
    Abuse('layers negative', far(layers=[-1]), PlugError, r'layers has \[-1\]'),
    Abuse('layers of booleans', far(layers=[True]), PlugError, r'layers=\[True\]'),
    Abuse('layers mixed', far(layers=[0, 'vit.*']), PlugError, r"layers=\[0, 'vit"),
    Abuse('heads a text', far(layers=['*.attention'], heads='2'), PlugError, "heads='2'"),
    Abuse('heads True', far(layers=['*.attention'], heads=True), PlugError, 'heads=True'),
    Abuse('heads that do not divide', far(layers=['*.attention'], heads=3), PlugError, '16 channels.*3 heads'),
    Abuse('heads negative', far(layers=['*.attention'], heads=-2), PlugError, 'heads'),
    Abuse('projection a number', far(layers=['*.attention'], projection=3), PlugError, 'projection=3'),
    Abuse('execution unknown', far(execution='fast'), PlugError, "execution='fast'"),
    Abuse('execution a list', far(execution=['loop']), PlugError, 'execution='),
    Abuse('widths a number', far(widths=3), PlugError, 'widths=3'),
    Abuse('widths of another path', far(widths={'x': [[1, 1]]}), PlugError, 'widths has x'),
    Abuse('widths of texts', far(widths={'vit.layers.0.attention': [['a', 1], [1, 1]]}), PlugError, 'widths'),
    Abuse('widths a number for a path', far(widths={'vit.layers.0.attention': 3}), PlugError, 'widths'),
    Abuse('a model without attention', lambda: replace(net(), FAR), PlugError, 'no self-attention'),
    Abuse('replaced twice', lambda: [replace(m := vit(), FAR), replace(m, FAR)], PlugError, 'replacements already'),
    Abuse('cut of a stock model', lambda: cut(vit(), Budget('units', 0.5)), PlugError, 'no attention is replaced'),
    Abuse('budget unknown', lambda: Budget('unit', 0.5), AsrError, r'unit=0\.5.*one of units'),
    Abuse('budget of 2', lambda: Budget('units', 2.0), AsrError, r'2\.0'),
    Abuse('budget a text', lambda: Budget('units', 'half'), AsrError, "'half'"),
    Abuse('budget nan', lambda: Budget('units', math.nan), AsrError, 'nan'),
    Abuse('save_far None', lambda: save_far(None, Path('/nowhere')), AsrError, 'save_far: expected a torch'),
    Abuse('load_far None', lambda: load_far(None), CheckpointError, 'folder'),
    Abuse('load_far of nothing', lambda: load_far('/nowhere'), CheckpointError, '/nowhere'),
]  # fmt: skip

TABLE = {'plug': PLUG, 'fold': FOLD, 'others': OTHERS, 'far': REPLACE}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    'abuse',
    [
        pytest.param(
            abuse,
            id=f'{part}: {abuse.what}',
        )
        for part, abuses in TABLE.items()
        for abuse in abuses
    ],
)
def test_an_abuse_is_refused_in_one_line(abuse: Abuse) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(AsrError, match=abuse.words) as error:
            abuse.call()
    assert isinstance(error.value, abuse.error), type(error.value)
    assert '\n' not in str(error.value)


def test_the_table_is_long_enough_and_its_names_are_unique() -> None:
    names = [(part, abuse.what) for part, abuses in TABLE.items() for abuse in abuses]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize('spec', [asr(preserve='no'), asr(init='x'), dict(DIA, share=7), asr(sites=5), None])
def test_refused_specs_leave_the_model_alone(spec: Any) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((PlugError, TypeError)):
        plug(model, spec)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert 'plug_spec' not in vars(model)


def test_numbers_of_numpy_and_whole_floats_where_floats_are_asked_are_taken() -> None:
    import numpy as np

    plug(
        net(),
        asr(repeat=np.int64(2), init=1, preserve=np.bool_(True), attention=dict(type='SE', reduction=np.int32(4))),
    )
    plug(net(), asr(init=np.float32(0.5), sites=('layer1.*.bn3',), skip=()))
