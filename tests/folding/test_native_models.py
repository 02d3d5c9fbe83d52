"""fold_native on whole models: budgets, reports, classes of one's own, shipping what is left."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from helpers.native_models import DATA, constant, gates_of, ready
from helpers.natives import (
    C,
    Host,
    SqueezeExcitation,
    conv,
    host,
)
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
from asr_downstream.folding.native.blocks import find_blocks
from asr_downstream.modules.native import NATIVE, known_natives


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
