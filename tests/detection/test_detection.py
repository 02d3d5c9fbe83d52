"""The MMDetection adapter: plugged backbones, live detectors, configs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.backbones import ASR, BACKBONES, IDS, X, in_eval, plugged, tiny
from mmcv.transforms import LoadImageFromFile as StockLoad
from mmdet.models import backbones as stock_backbones
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import PretrainedInit, revert_sync_batchnorm
from mmengine.registry import init_default_scope

import asr_downstream
from asr_downstream import describe, fold, plug, verify
from asr_downstream.detection.config import load_config, set_data_root, stock_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.data.loading import name_files
from asr_downstream.detection.evaluation.evaluate import metrics_of
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.detection.models.plugged import PluggedModel, is_pretrained
from asr_downstream.errors import AsrError, DataError
from asr_downstream.plugging.attach import rebind


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmdet')


@pytest.mark.parametrize(('backbone', 'end', 'sites'), BACKBONES, ids=IDS)
def test_backbone_plugs_trains_folds_and_loads_into_stock(backbone: dict, end: str, sites: int) -> None:
    model = randomise(plugged(backbone, norm_eval=False).double())
    rows = describe(model).sites
    assert len(rows) == sites
    assert all(row.path.endswith(end) and row.path.startswith('layer') for row in rows)

    stock = tiny(backbone).double()
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all('.gate.' in key for key in missing)

    randomise(model).train()
    x = torch.randn(X, dtype=torch.float64)
    sum(y.square().mean() for y in model(x)).backward()
    gates = {n: p for n, p in model.named_parameters() if '.gate.' in n}
    assert len(gates) == 5 * sites
    assert all(p.grad is not None for p in gates.values())
    assert all(p.grad.abs().max() > 0 for n, p in gates.items() if 'fc2' in n)

    model.eval()
    folded, _ = fold(model)
    assert type(folded) is getattr(stock_backbones, backbone['type'])
    in_eval(stock).load_state_dict(folded.state_dict(), strict=True)
    assert verify(model, stock, x).relative < 1e-10
    bare = in_eval(tiny(backbone).double())
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if '.gate.' not in k})
    assert verify(model, bare, x).relative > 1e-3


@pytest.mark.parametrize(('backbone', 'end', 'sites'), BACKBONES, ids=IDS)
def test_plug_on_a_live_backbone_does_the_same(backbone: dict, end: str, sites: int) -> None:
    torch.manual_seed(1)
    live = tiny(backbone)
    plug(live, ASR)
    torch.manual_seed(1)
    from_config = plugged(backbone)
    assert describe(live).sites == describe(from_config).sites
    for key, value in from_config.state_dict().items():
        assert torch.equal(live.state_dict()[key], value), key


def test_initial_stock_weights_are_those_of_the_stock_class() -> None:
    for spec in (ASR, dict(type='Attention', attention=dict(type='CBAM'))):
        torch.manual_seed(3)
        stock = tiny(BACKBONES[1][0])
        stock.init_weights()
        torch.manual_seed(3)
        model = plugged(BACKBONES[1][0], spec)
        gates = {k: v.clone() for k, v in model.state_dict().items() if '.gate.' in k or '.dynamic.' in k}
        model.init_weights()
        for key, value in stock.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        for key, value in gates.items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize('kind', ['ASR', 'Attention'])
def test_pretrained_stock_weights_with_preserve_start_where_stock_stands(kind: str, tmp_path: Path) -> None:
    stock = in_eval(randomise(tiny(BACKBONES[0][0])))
    path = tmp_path / 'stock.pth'
    torch.save(stock.state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    spec = dict(type=kind, attention=dict(type='SE', reduction=4), preserve=True)
    model = plugged(BACKBONES[0][0], spec, init_cfg=init_cfg)
    model.init_weights()
    x = torch.randn(X)
    assert verify(in_eval(model), stock, x).absolute == 0
    plain = plugged(BACKBONES[0][0], dict(spec, preserve=False), init_cfg=init_cfg)
    plain.init_weights()
    assert verify(in_eval(plain), stock, x).relative > 1e-2


def test_pretrained_plugged_weights_fill_the_gates(tmp_path: Path) -> None:
    source = in_eval(randomise(plugged(BACKBONES[0][0])))
    path = tmp_path / 'plugged.pth'
    torch.save(source.state_dict(), path)
    model = plugged(BACKBONES[0][0], init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    assert verify(in_eval(model), source, torch.randn(X)).absolute == 0


def test_a_frozen_stage_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r'2 sites.*layer1.0.bn2.*frozen_stages'):
        model = plugged(BACKBONES[0][0], frozen_stages=1)
    assert describe(model).sites[0].path == 'layer2.0.bn2'
    model.train()
    assert all(p.requires_grad for n, p in model.named_parameters() if '.gate.' in n)


def test_sync_bn_conversion_keeps_the_gates() -> None:
    model = in_eval(randomise(plugged(BACKBONES[0][0])))
    x = torch.randn(X)
    expected = model(x)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    in_eval(converted)  # the switch of mode attaches them again
    assert not rebind(converted)
    for a, b in zip(converted(x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_mmengines_own_sync_bn_plugs_reverts_and_folds() -> None:
    backbone = dict(BACKBONES[0][0], norm_cfg=dict(type='SyncBN'))
    model = in_eval(randomise(plugged(backbone)))
    assert describe(model).sites[0].layer == 'SyncBatchNorm'
    x = torch.randn(X)
    expected = model(x)
    reverted = revert_sync_batchnorm(copy.deepcopy(model))  # what mmdet's inference does with one process
    in_eval(reverted)
    assert len(describe(reverted).sites) == 8
    for source in (model, reverted):
        folded, _ = fold(source)
        in_eval(folded)
        for a, b in zip(folded(x), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_live_plugged_backbone_is_initialised_as_stock_and_keeps_its_gates() -> None:
    torch.manual_seed(3)
    stock = tiny(BACKBONES[0][0])
    stock.init_weights()
    torch.manual_seed(3)
    model = tiny(BACKBONES[0][0])
    plug(model, dict(ASR, preserve=True))
    model.init_weights()
    for key, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model.layer2[0].bn2.constant(), torch.ones(16))


def test_a_start_outlives_the_initialisation_and_pretrained_weights_and_is_not_taken_twice(tmp_path: Path) -> None:
    half = dict(type='Start', value=0.5)
    ends = [f'layer{stage}.{block}.bn2' for stage in (1, 2, 3, 4) for block in (0, 1)]

    def halved(model: torch.nn.Module, stock: torch.nn.Module) -> None:
        for name, value in stock.state_dict().items():
            factor = 0.5 if name.rpartition('.')[0] in ends and name.endswith(('weight', 'bias')) else 1
            assert torch.equal(model.state_dict()[name], factor * value), name

    ones = dict(BACKBONES[0][0], zero_init_residual=False)
    torch.manual_seed(3)
    stock = tiny(ones)
    stock.init_weights()
    assert all(stock.get_submodule(end).weight.all() for end in ends)
    torch.manual_seed(3)
    model = plugged(ones, half)
    assert type(model).stock_class is type(stock)
    model.init_weights()
    halved(model, stock)
    model.init_weights()
    halved(model, stock)

    path = tmp_path / 'stock.pth'
    torch.save(randomise(stock).state_dict(), path)
    model = plugged(ones, half, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.warns(UserWarning, match=r'Start\(0.5\) scales pretrained weights at 8 sites: layer1.0.bn2, '):
        model.init_weights()
    halved(model, stock)
    model.load_state_dict(stock.state_dict())  # a checkpoint to go on from
    assert verify(in_eval(model), in_eval(stock), torch.randn(X)).absolute == 0


def test_a_start_says_that_it_changes_nothing_where_branches_start_at_zero() -> None:
    model = plugged(BACKBONES[0][0], dict(type='Start', value=0.5))
    with pytest.warns(UserWarning, match=r'Start\(0.5\) changes nothing at 8 of 8 .*zero_init_residual=False'):
        model.init_weights()


def test_norm_eval_does_not_freeze_the_norms_of_an_attention() -> None:
    model = plugged(BACKBONES[0][0], dict(type='Attention', attention=dict(type='SRM')), norm_eval=True)
    model.train()
    assert not model.bn1.training
    inner = model.layer1[0].bn2.dynamic[0].attention.norm
    model(torch.randn(X))
    assert inner.num_batches_tracked == 1
    in_eval(model)
    assert not inner.training


def test_named_sites_in_a_frozen_stage_are_frozen_from_the_start() -> None:
    with pytest.warns(UserWarning, match='may never train'):
        model = plugged(BACKBONES[0][0], dict(ASR, sites=['layer*.bn2']), frozen_stages=1)
    trained = {n.split('.')[0] for n, p in model.named_parameters() if '.gate.' in n and p.requires_grad}
    assert trained == {'layer2', 'layer3', 'layer4'}


def test_the_stock_config_does_not_import_the_users_attentions() -> None:
    config = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py')
    config.custom_imports = dict(imports=['mine.attention', 'mine.data'])
    mine = type('Mine', (torch.nn.Module,), {'__module__': 'mine.attention'})
    asr_downstream.ATTENTIONS.register_module(module=mine)
    try:
        assert stock_config(config).custom_imports.imports == ['mine.data']
    finally:
        asr_downstream.ATTENTIONS.module_dict.pop('Mine')


@pytest.mark.parametrize(
    'kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit, 'mmengine.model.weight_init.PretrainedInit']
)
def test_a_checkpoint_to_start_from_is_known_by_name_scope_and_class(kind: Any) -> None:
    assert is_pretrained(dict(type=kind, checkpoint='a.pth'))
    assert is_pretrained([dict(type='Kaiming', layer='Conv2d'), dict(type=kind, checkpoint='a.pth')])
    assert not is_pretrained([dict(type='Kaiming', layer='Conv2d')])


@pytest.mark.parametrize('kind', ['LoadImageFromFile', StockLoad, 'mmcv.transforms.loading.LoadImageFromFile'])
def test_images_are_loaded_by_name_scope_and_class(kind: Any) -> None:
    pipeline = [dict(type=kind), dict(type='theirs.LoadImageFromFile')]
    config = Config(dict(train_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=pipeline))))
    name_files(config)
    types = [step['type'] for step in config.train_dataloader.dataset.pipeline]
    assert types == ['asr_downstream.LoadImageFromFile', 'theirs.LoadImageFromFile']


PLUG = '_base_/plugs/asr-se.py'


def test_a_plug_of_the_bases_is_in_the_model_and_nowhere_else(tmp_path: Path) -> None:
    bases = [str(ROOT / 'det_configs' / name) for name in ('digits/retinanet_r18-w16_fpn_digits.py', PLUG)]
    path = tmp_path / 'mine.py'
    text = f"_base_ = {bases}\nmodel = dict(backbone=dict(type='asr_downstream.ResNet', plug=PLUG))"
    path.write_text(text.replace('PLUG)', 'dict(_base_.plug, preserve=True))'))
    config = load_config(path, options={'model.backbone.plug.attention.reduction': 4})
    assert config.model.backbone.plug == dict(type='ASR', attention=dict(type='SE', reduction=4), preserve=True)
    assert 'plug' not in config
    assert 'plug' not in stock_config(Config.fromfile(path))
    with pytest.raises(AsrError, match=r'model\.backbone\.plug'):
        load_config(path, options={'plug.preserve': False})
    path.write_text(text.replace(', plug=PLUG', ''))
    with pytest.raises(AsrError, match=r'no part of the model takes it; write .*plug=_base_\.plug'):
        load_config(path)


def test_other_metrics_are_refused_and_no_detection_is_zero() -> None:
    with pytest.raises(DataError, match='pascal_voc/mAP'):
        metrics_of({'pascal_voc/mAP': 0.7})
    assert set(metrics_of({}).values()) == {0.0}


def test_a_backbone_without_plug_is_stock() -> None:
    model = MODELS.build(dict(type='asr_downstream.ResNet', depth=18, base_channels=8))
    assert isinstance(model, PluggedModel)
    assert not describe(model).sites


def test_a_wrong_spec_in_a_config_is_an_error_with_the_right_name() -> None:
    with pytest.raises(Exception, match="did you mean 'SE'"):
        plugged(BACKBONES[0][0], dict(type='ASR', attention=dict(type='SEE')))


def sample_inputs(x: torch.Tensor) -> dict[str, Any]:
    """Arguments for ``detector(..., mode='tensor')`` on a batch of images ``(B, 3, H, W)``."""
    shape = tuple(x.shape[-2:])
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), shape)
    samples = [DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0)}) for _ in x]
    return {'inputs': x, 'data_samples': samples, 'mode': 'tensor'}


def test_data_root_reaches_loaders_and_evaluators(tmp_path: Path) -> None:
    config = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py')
    set_data_root(config, tmp_path)
    assert config.train_dataloader.dataset.data_root == f'{tmp_path}/'
    assert config.test_evaluator.ann_file == f'{tmp_path}/annotations/val.json'
    with pytest.raises(DataError, match='no such data folder'):
        set_data_root(config, tmp_path / 'nowhere')


def test_asr_data_root_holds_the_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('ASR_DATA_ROOT', str(tmp_path))
    make_digits(tmp_path / 'digits', sizes={'train': 1, 'val': 1})
    config = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py')
    assert config.train_dataloader.dataset.data_root == f'{tmp_path}/digits/'
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    own = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py', options={'data_root': 'here/'})
    assert own.data_root == 'here/', 'what is there is not looked for elsewhere'


def test_plug_on_a_live_detector_finds_the_backbone_and_takes_patterns_elsewhere() -> None:
    config = load_config(ROOT / 'det_configs/retinanet/retinanet_r18_fpn_1x_coco.py')
    config.model.backbone.base_channels = 8
    config.model.neck.in_channels = [8, 16, 32, 64]
    config.model.backbone.frozen_stages = -1
    stock = in_eval(randomise(build_detector(config)).double())
    model = build_detector(config).double()
    model.load_state_dict(stock.state_dict())
    rows = plug(
        in_eval(model), dict(ASR, sites=['backbone.*.bn2', 'neck.fpn_convs.*.conv', 'bbox_head.retina_reg'])
    ).sites
    assert len(rows) == 8 + 5 + 1
    assert rows[-1].path == 'bbox_head.retina_reg'
    folded, _ = fold(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert verify(model, folded, sample_inputs(x)).relative < 1e-10
    assert verify(model, stock, sample_inputs(x)).relative > 1e-3
    stock.load_state_dict(folded.state_dict(), strict=True)
    live = build_detector(config)
    assert [r.path for r in plug(live, ASR).sites] == [
        f'backbone.layer{s}.{b}.bn2' for s in (1, 2, 3, 4) for b in (0, 1)
    ]
