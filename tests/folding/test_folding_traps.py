"""fold: weights that are shared, read elsewhere, computed or not there, and gates that have gone to an end."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from asr_downstream import FoldError, PlugError, fold, plug, verify
from asr_downstream.models.resnet_cifar import Bottleneck, ResNet

SE = dict(type='SE', reduction=2)
ASR = dict(type='ASR', attention=SE, sites=['a'])


class Net(nn.Module):
    """Two linear maps and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class ReadsElsewhere(Net):
    """Reads the weight of a layer past its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(x, self.a.weight, self.a.bias).relu())


def net(cls: type[Net] = Net, spec: dict = ASR) -> Any:
    model = randomise(cls())
    plug(model, spec)
    return randomise(model)


X = torch.randn(4, 6, dtype=torch.float64)


def same_parameter(model: Any) -> None:
    model.b.weight = model.a.weight


def other_way(model: Any) -> None:
    model.a.weight = model.b.weight


def view_of_it(model: Any) -> None:
    model.b.weight = nn.Parameter(model.a.weight.detach().t())


def part_of_it(model: Any) -> None:
    model.c = nn.Linear(6, 2)
    model.c.weight = nn.Parameter(model.a.weight.detach()[4:])


def buffer(model: Any) -> None:
    model.register_buffer('table', model.a.weight.detach()[0])


def bias(model: Any) -> None:
    model.b.bias = model.a.bias


def attribute(model: Any) -> None:
    model.table = model.a.weight.detach()


@pytest.mark.parametrize('tie', [same_parameter, other_way, view_of_it, part_of_it, buffer, bias, attribute])
def test_weights_tied_after_plugging_are_refused(tie: Callable[[Any], None]) -> None:
    model = net()
    tie(model)
    with pytest.raises(FoldError, match=r'a: its (weight|bias) .*shared with (b\.weight|b\.bias|c\.weight|table)'):
        fold(model)


@pytest.mark.parametrize('tie', [view_of_it, part_of_it, buffer])
def test_views_tied_before_plugging_are_refused(tie: Callable[[Any], None]) -> None:
    model = randomise(Net())
    tie(model)
    with pytest.raises(PlugError, match='a: its weight is shared'):
        plug(model, ASR)


def test_weights_side_by_side_in_one_storage_fold() -> None:
    model = net()
    flat = torch.cat([model.a.weight.detach().flatten(), model.b.weight.detach().flatten()])
    model.a.weight = nn.Parameter(flat[:36].view(6, 6))
    model.b.weight = nn.Parameter(flat[36:].view(6, 6))
    assert verify(model, fold(model)[0], X).relative < 1e-10


def test_a_layer_that_is_called_at_two_places_folds() -> None:
    model = net()
    model.again = model.a
    assert verify(model, fold(model)[0], X).relative < 1e-10


def test_check_compares_on_real_inputs_and_refuses() -> None:
    good, bad = net(), net(ReadsElsewhere)
    assert fold(good, check=X)[1].checked.relative < 1e-10  # type: ignore[union-attr]
    assert fold(good)[1].checked is None
    with pytest.raises(FoldError, match=r'computes something else.*read.*elsewhere'):
        fold(bad, check=[X, X])
    fold(bad)  # not asked for


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_check_holds_for_calibrated_folds_too(dtype: torch.dtype) -> None:
    spec = dict(type='Attention', attention=SE)
    x, bound = X.to(dtype), 1e-10 if dtype == torch.float64 else 1e-5
    good = net(spec=dict(spec, sites=['a'])).to(dtype)
    assert fold(good, calibrate=[x], check=x)[1].checked.relative < bound  # type: ignore[union-attr]
    bad = net(ReadsElsewhere, ASR)  # its constant gates are ignored, those of b are not
    plug(bad, dict(spec, sites=['b']))
    with pytest.raises(FoldError, match='computes something else'):
        fold(bad.eval().to(dtype), calibrate=[x], check=[x], step=lambda model, batch: model(batch))


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, 'weight', 0.5)


def weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nn.utils.weight_norm(layer)


def spectral_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        nn.utils.spectral_norm(layer)


COMPUTED = [pruned, weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]


@pytest.mark.parametrize('change', COMPUTED)
def test_computed_weights_of_a_site_are_refused_by_fold(change: Callable[[nn.Module], None]) -> None:
    model = net()
    change(model.a)
    model(X)
    with pytest.raises(FoldError, match=r'a: its weight is computed.*remove') as error:
        fold(model)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('change', COMPUTED)
def test_computed_weights_of_a_site_are_refused_by_plug(change: Callable[[nn.Module], None]) -> None:
    model = randomise(Net())
    change(model.a)
    with pytest.raises(PlugError, match=r'a(: its weight is computed.*remove| \(.*not a layer)') as error:
        plug(model, ASR)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('change', COMPUTED)
def test_computed_weights_elsewhere_are_no_hindrance(change: Callable[[nn.Module], None]) -> None:
    model = net()
    change(model.b)
    model.eval()(X)
    assert verify(model, fold(model)[0], X).relative < 1e-10


def test_tensors_with_a_graph_are_copied() -> None:
    model = net()
    table = nn.Parameter(torch.ones(3)) * 2  # as CLRNet's priors: made from an embedding when it is built
    model.register_buffer('priors', table)
    model.lists = {'a': [table, (table * 3,)]}
    folded, _ = fold(model)
    assert torch.equal(folded.priors, table)
    assert folded.priors is not table
    assert folded.lists['a'][0] is folded.priors
    assert model.priors is table
    assert table.grad_fn is not None


@pytest.mark.det
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_clrnet_of_mmdet_folds() -> None:
    mmdet = pytest.importorskip('mmdet')
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    file = Path(mmdet.__file__).parent / '.mim/configs/clrnet/clrnet.py'
    config = Config.fromfile(file).model
    config.data_preprocessor = dict(type='DetDataPreprocessor')
    config.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config)
    with pytest.raises(RuntimeError, match='graph leaves'):
        copy.deepcopy(model)
    plug(model, dict(type='ASR', attention=dict(type='SE')))
    model.eval()
    folded, report = fold(model)
    assert len(report.sites) == 13
    x = torch.randn(1, 3, 64, 64)
    assert verify(Features(model), Features(folded), x).relative < 1e-4


class Features(nn.Module):
    """A detector up to its neck."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.detector.extract_feat(x)  # type: ignore[operator]


def test_the_meta_device_has_nothing_to_plug_or_fold() -> None:
    with pytest.raises(PlugError, match=r'a\.weight: is on the meta device.*load its weights first'):
        plug(Net().to('meta'), ASR)
    with pytest.raises(FoldError, match=r'a\.weight: is on the meta device.*load its weights first'):
        fold(net().to('meta'))


@pytest.mark.parametrize('dtype', [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    model = randomise(Net())
    model.a.weight = nn.Parameter(torch.zeros(6, 6).to(dtype), requires_grad=False)
    with pytest.raises(PlugError, match=rf'a: its weight is quantised \({dtype}\).*plug and fold first'):
        plug(model, ASR)
    model = net()
    model.a.weight = nn.Parameter(torch.zeros(6, 6).to(dtype), requires_grad=False)
    with pytest.raises(FoldError, match=rf'a: its weight is quantised \({dtype}\).*fold first'):
        fold(model)


@pytest.mark.filterwarnings('ignore')
def test_quantised_gates_are_refused() -> None:
    model = randomise(Net().float())
    plug(model, ASR)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(FoldError, match='a: its gates cannot be computed.*before') as error:
        fold(quantised)
    assert '\n' not in str(error.value)


def resnet(attention: dict, **spec: Any) -> nn.Module:
    model = ResNet(Bottleneck, 1, width=8)
    plug(model, dict(dict(type='ASR', attention=attention), **spec))
    return model.eval()


def set_gates(model: nn.Module, value: float) -> None:
    """Let all gates of layer1 be sigmoid(value), or value itself."""
    layer: Any = model.get_submodule('layer1.0.bn3')
    attention = layer.gate[0].attention
    with torch.no_grad():
        for p in attention.parameters():
            p.zero_()
        last = attention.fc2.bias if hasattr(attention, 'fc2') else next(attention.parameters())
        last.fill_(value)


LAYER_SCALE, VECTOR = dict(type='LayerScale'), dict(type='SigmoidVector')
ENDS = [
    (SE, {}, -20.0, r'layer1\.0\.bn3.*below 0\.001'),
    (SE, {}, 20.0, r'layer1\.0\.bn3.*above 0\.999'),
    (VECTOR, {}, -20.0, 'below 0.001'),
    (VECTOR, {}, 20.0, 'above 0.999'),
    (LAYER_SCALE, {}, 0.0, 'are all 0'),
    (dict(type='LayerScale', init_value=0.1), dict(preserve=True), 1e-5, 'below 0.001'),
    (SE, dict(preserve=True), 20.0, 'above 0.999'),
    (SE, dict(preserve=True), -20.0, 'below 0.001'),
]


@pytest.mark.parametrize(('attention', 'spec', 'value', 'words'), ENDS)
def test_gates_at_an_end_are_named(attention: dict, spec: dict, value: float, words: str) -> None:
    model = resnet(attention, **spec)
    set_gates(model, value)
    with pytest.warns(UserWarning, match=words) as seen:
        _, report = fold(model)
    ours = [w for w in seen if 'layer1.0.bn3' in str(w.message)]
    assert len(ours) == 1
    assert 'layer2' not in str(ours[0].message)
    assert [site.path for site in report.sites if site.saturated] == ['layer1.0.bn3']


@pytest.mark.parametrize(
    ('attention', 'spec', 'value'),
    [
        (LAYER_SCALE, {}, 1e-6),  # where LayerScale starts in deep networks
        (LAYER_SCALE, {}, 1.0),
        (dict(type='LayerScale', init_value=0.1), dict(preserve=True), 0.2),
        (SE, {}, 0.0),
        (SE, dict(preserve=True), 1.0),
        (SE, dict(repeat=3), 0.0),
    ],
)
def test_ordinary_gates_fold_without_a_word(attention: dict, spec: dict, value: float) -> None:
    model = resnet(attention, **spec)
    set_gates(model, value)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fold(model)


def test_fresh_preserved_gates_fold_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fold(resnet(SE, preserve=True))


def test_folded_models_are_plain_objects() -> None:
    model = net()
    folded = copy.deepcopy(pickle.loads(pickle.dumps(fold(model)[0])))
    assert vars(folded).keys() == vars(Net()).keys()
    assert type(folded) is Net
    assert verify(model, folded, X).relative < 1e-10


class Extra(nn.Module):
    """A model with a second output."""

    def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.second = second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, self.second(y)


def test_check_knows_rounding_and_chance_from_folding() -> None:
    def checked(second: Callable[[Tensor], Tensor]) -> None:
        model = Extra(second).eval()
        plug(model, {**ASR, 'sites': ['conv']})
        fold(model, check=torch.randn(2, 3, 8, 8))

    checked(lambda y: (y - y.mean()).mean())  # nothing but rounding
    with pytest.raises(FoldError, match='Extra itself computes something else each time'):
        checked(lambda y: y + torch.randn_like(y))
