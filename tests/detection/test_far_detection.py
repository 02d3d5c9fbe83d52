"""FAR in MMDetection: LSTMs in PVT and DETR, stock checkpoints, a teacher, and what is refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint
from mmengine.structures import InstanceData

from asr_downstream.detection.config import load_config, stock_config
from asr_downstream.detection.models.detectors import build_detector, load_detector
from asr_downstream.detection.training.train import pretrained
from asr_downstream.errors import AsrError, CheckpointError, FoldError, PlugError
from asr_downstream.far.model.describe import mixers

FAR = dict(type='FAR', layers='all')
SMALL = dict(embed_dims=8, num_layers=[1, 1, 2, 1], num_heads=[1, 2, 4, 2], drop_path_rate=0.0, init_cfg=None)
PVTS = ('PyramidVisionTransformer', 'PyramidVisionTransformerV2')


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmdet')


def pvt(name: str = PVTS[1], **extra: Any) -> Any:
    return MODELS.build(dict(SMALL, type=name, **extra)).eval()


def far(name: str = PVTS[1], spec: Any = FAR, **extra: Any) -> Any:
    return pvt(f'asr_downstream.{name}', replace=spec, **extra)


def retinanet(tmp_path: Path, **distil: Any) -> Config:
    """A detector with a teacher; the files of the teacher are written."""
    model = dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=dict(SMALL, type=PVTS[1]),
        neck=dict(type='FPN', in_channels=[8, 16, 32, 16], out_channels=8, num_outs=4, norm_cfg=dict(type='BN')),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[4, 8, 16, 32],
            ),
        ),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
        ),
        test_cfg=dict(nms_pre=10, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=3),
    )
    teacher = dict(config=str(tmp_path / 'teacher.py'), checkpoint=str(tmp_path / 'teacher.pth'))
    Config(dict(model=model)).dump(teacher['config'])
    torch.save({'state_dict': MODELS.build(copy.deepcopy(model)).state_dict()}, teacher['checkpoint'])
    model['type'] = 'asr_downstream.RetinaNet'
    model['backbone'] = dict(SMALL, type=f'asr_downstream.{PVTS[1]}', replace=FAR)
    spec = dict(teacher=teacher, distance=dict(type='MSE', feature='attention'))
    Config(dict(model=dict(model, distil={**spec, **distil}))).dump(tmp_path / 'student.py')
    return Config.fromfile(tmp_path / 'student.py')


def batch(count: int = 2, side: int = 64, shapes: Any = None) -> dict[str, Any]:
    samples = []
    for index in range(count):
        shape = (shapes or [(side, side)] * count)[index]
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=(side, side), batch_input_shape=(side, side))
        sample = DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
        boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 24.0, 60.0, 60.0]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
        samples.append(sample)
    return {'inputs': [torch.rand(3, side, side) * 255 for _ in range(count)], 'data_samples': samples}


def step(model: Any, data: dict[str, Any]) -> dict[str, Any]:
    """One optimiser step with MMEngine's wrapper, as its loop does it."""
    wrapper = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1))
    )
    model.train()
    return model.train_step(data, wrapper)


@pytest.mark.parametrize('name', PVTS)
def test_pvt_without_attention_has_finite_maps_of_the_same_shapes(name: str) -> None:
    model = far(name)
    assert len(list(mixers(model))) == 5
    x = torch.randn(2, 3, 96, 64)
    maps, stock = model(x), pvt(name)(x)
    assert [m.shape for m in maps] == [m.shape for m in stock]
    assert all(m.isfinite().all() for m in maps)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if '.mixer.' in n)


def test_pvt_reads_columns_of_maps_that_are_no_squares() -> None:
    model = far(spec={**FAR, 'layers': [1, 2, 3, 4], 'scan': 'cross'})  # the first stage has one head
    sizes: dict[str, tuple[int, ...]] = {}
    for path, mixer in mixers(model):
        mixer.register_forward_hook(lambda m, args, out, path=path: sizes.__setitem__(path, tuple(args[1])))
    x = torch.randn(2, 3, 96, 64)
    cross = [m.detach() for m in model(x)]
    assert sorted(sizes.values()) == [(3, 2), (6, 4), (6, 4), (12, 8)]
    raster = far(spec={**FAR, 'layers': [1, 2, 3, 4]})
    raster.load_state_dict(model.state_dict())
    assert [bool(torch.equal(a, b)) for a, b in zip(raster(x), cross, strict=True)] == [True, False, False, False]
    with pytest.raises(PlugError, match="scan='cross' needs 2 heads"):
        far(spec={**FAR, 'scan': 'cross'})


@pytest.mark.parametrize('name', PVTS)
def test_a_stock_checkpoint_lacks_the_lstms_and_nothing_else(name: str, tmp_path: Path) -> None:
    stock = pvt(name)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'stock.pth')
    model = far(name)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    result = model.load_state_dict(stock.state_dict(), strict=False)
    places = [path for path, _ in mixers(model)]
    assert set(result.missing_keys) == {key for key in start if '.mixer.' in key}
    gone = ('attn.in_proj_weight', 'attn.in_proj_bias', 'sr.weight', 'sr.bias', 'norm.weight', 'norm.bias')
    wanted = {f'{path}.{key}' for path in places for key in gone} & set(stock.state_dict())
    assert set(result.unexpected_keys) == wanted
    assert len(wanted) == 2 * 5 + 4 * 4  # the last stage has no reduction
    for by_init in (True, False):
        loaded = far(name, convert_weights=False)
        start = {key: value.clone() for key, value in loaded.state_dict().items()}
        if by_init:
            loaded.init_cfg = Config(dict(type='Pretrained', checkpoint=str(tmp_path / 'stock.pth')))._cfg_dict
            loaded.init_weights()
        else:
            load_checkpoint(loaded, str(tmp_path / 'stock.pth'))
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, start[key] if '.mixer.' in key else stock.state_dict()[key]), key


class Said(logging.Handler):
    """Keeps what MMEngine's logger says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[Said]:
    logger, handler = MMLogger.get_current_instance(), Said()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_what_is_missing_besides_is_named(said: Said) -> None:
    state = pvt().state_dict()
    model = far()
    lstms = sum('.mixer.' in key for key in model.state_dict())
    model.load_state_dict(state, strict=False)
    assert said.lines == [
        f'PyramidVisionTransformerV2: 5 attentions are replaced; of their new {lstms} weights {lstms} are not in the '
        f'checkpoint and keep their start; 26 of the attentions there are not used'
    ]
    state.pop('layers.0.0.projection.weight')
    state['layers.9.weight'] = torch.zeros(1)
    model.load_state_dict(state, strict=False)
    assert [line.partition('besides, ')[2] for line in said.lines[2:]] == [
        '1 weights are not in the checkpoint: layers.0.0.projection.weight',
        '1 weights of the checkpoint are not used: layers.9.weight',
    ]
    said.lines.clear()
    model.load_state_dict(model.state_dict())
    assert not said.lines


def test_a_checkpoint_of_its_own_loads_strictly_and_stock_weights_leave_fresh_projections() -> None:
    for variant in ('M1', 'M2', 'M3'):
        model = far(spec=dict(FAR, variant=variant))
        before = model.state_dict()['layers.0.1.0.attn.attn.out_proj.weight'].clone() if variant == 'M2' else None
        model.load_state_dict(pvt().state_dict(), strict=False)
        if before is not None:
            assert torch.equal(model.state_dict()['layers.0.1.0.attn.attn.out_proj.weight'], before)
        other = far(spec=dict(FAR, variant=variant))
        other.load_state_dict(model.state_dict(), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize('mixer', ['lstm', 'linear'])
def test_initialisation_leaves_the_start_of_the_lstms(mixer: str) -> None:
    model = far(spec=dict(FAR, mixer=mixer))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    now = model.state_dict()
    assert all(torch.equal(now[key], start[key]) for key in now if '.mixer.' in key)
    assert not torch.equal(now['layers.0.0.projection.weight'], start['layers.0.0.projection.weight'])


def test_windows_plugs_and_unknown_keys_are_refused() -> None:
    swin = dict(type='asr_downstream.SwinTransformer', embed_dims=8, depths=(1, 1), num_heads=(1, 1), strides=(4, 2))
    swin |= dict(out_indices=(0, 1))
    with pytest.raises(PlugError, match='relative positions.*masks'):
        MODELS.build(dict(swin, replace=FAR))
    plug = dict(type='ASR', attention=dict(type='SE', reduction=4))
    with pytest.raises(PlugError, match='plug or replace, not both'):
        far(plug=plug)
    with pytest.raises(PlugError, match="takes no 'layer'"):
        far(spec=dict(type='FAR', layer='all'))
    with pytest.raises(PlugError, match='no self-attention'):
        MODELS.build(dict(type='asr_downstream.ResNet', depth=18, base_channels=8, replace=FAR))


def detr(layers: Any) -> Any:
    config = load_config(Path('det_configs/detr/detr_r50_8xb2-150e_coco.py'), needs_data=False)
    model = config.model
    model.type = 'asr_downstream.DETR'
    model.replace = dict(type='FAR', layers=layers)
    model.backbone.update(depth=18, base_channels=8)
    model.neck.in_channels = [64]
    model.num_queries = 7
    model.test_cfg.max_per_img = 5
    model.encoder.num_layers = model.decoder.num_layers = 1
    return build_detector(config)


def test_the_encoder_of_detr_without_padding_and_not_with_it() -> None:
    model = detr(['encoder.*.self_attn.attn'])
    assert [path for path, _ in mixers(model)] == ['encoder.layers.0.self_attn.attn']
    start = {key: value.clone() for key, value in model.state_dict().items() if '.mixer.' in key}
    model.init_weights()  # draws every matrix of the encoder anew
    assert all(torch.equal(model.state_dict()[key], value) for key, value in start.items())
    data = model.data_preprocessor(batch())
    with torch.no_grad():
        classes, boxes = model(**data, mode='tensor')
        assert classes.shape[-2:] == (7, 81)
        assert boxes.isfinite().all()
        assert classes.isfinite().all()
        assert len(model(**data, mode='predict')) == 2
    padded = model.data_preprocessor(batch(side=128, shapes=[(128, 128), (64, 128)]))
    with pytest.raises(PlugError, match='mask that hides tokens'):
        model(**padded, mode='tensor')


def test_attentions_of_detr_that_cannot_be_replaced() -> None:
    with pytest.raises(PlugError, match='cross-attention'):
        detr(['decoder.*.cross_attn.attn'])
    assert [path for path, _ in mixers(detr('all'))] == [
        'encoder.layers.0.self_attn.attn',
        'decoder.layers.0.self_attn.attn',
    ]


def test_deformable_attention_is_not_replaced() -> None:
    config = load_config(Path('det_configs/deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'), needs_data=False)
    model = config.model
    model.type = 'asr_downstream.DeformableDETR'
    model.backbone.update(depth=18, base_channels=8)
    model.neck.in_channels = [16, 32, 64]
    model.encoder.num_layers = model.decoder.num_layers = 1
    model.num_queries = 7
    model.replace = dict(type='FAR', layers='all')
    assert [path for path, _ in mixers(build_detector(config))] == ['decoder.layers.0.self_attn.attn']
    model.replace = dict(type='FAR', layers=['encoder.layers.0.self_attn'])
    with pytest.raises(PlugError, match='MultiScaleDeformableAttention'):
        build_detector(config)


@pytest.mark.parametrize('learns', ['replacements', 'all'])
def test_a_step_moves_what_learns_and_the_weights_are_those_of_the_plain_student(learns: str, tmp_path: Path) -> None:
    config = retinanet(tmp_path, learns=learns)
    assert list(pretrained(config.model)) == [str(tmp_path / 'teacher.pth')]
    model = MODELS.build(copy.deepcopy(config.model))
    load_checkpoint(model, str(tmp_path / 'teacher.pth'))
    model.distil.load(model)
    teacher = {key: value.clone() for key, value in model.distil.teacher.state_dict().items()}
    start = {key: value.clone() for key, value in model.state_dict().items()}
    data = batch()
    logs = step(model, data)
    assert {'loss', 'loss_cls', 'loss_bbox', 'loss_far'} <= set(logs)
    assert logs['loss'].item() == pytest.approx(sum(logs[k].item() for k in ('loss_cls', 'loss_bbox', 'loss_far')))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    own = {key for key in start if '.mixer.' in key}
    assert moved >= {key for key in own if 'weight' in key}
    assert (moved <= own) == (learns == 'replacements')  # norms of the neck keep their statistics too
    assert not model.distil.teacher.training
    assert all(torch.equal(value, teacher[key]) for key, value in model.distil.teacher.state_dict().items())
    assert not any(p.requires_grad for p in model.distil.teacher.parameters())

    plain = copy.deepcopy(config)
    plain.model.pop('distil')
    torch.save({'state_dict': get_state_dict(model)}, tmp_path / 'student.pth')
    student, _ = load_detector(plain, tmp_path / 'student.pth')  # strictly
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(model.extract_feat(x), student.extract_feat(x), strict=True):
        assert torch.equal(a, b)
    reloaded, _ = load_detector(config, tmp_path / 'student.pth')
    assert reloaded.distil.teacher is None  # a test needs none
    assert copy.deepcopy(model).distil is model.distil


def test_the_distance_is_that_to_the_teacher(tmp_path: Path) -> None:
    config = retinanet(tmp_path, distance=dict(type='MSE', feature='block', weight=3.0), task_weight=0.5)
    model = MODELS.build(copy.deepcopy(config.model))
    model.train()
    data = model.data_preprocessor(batch(), True)
    model.init_weights()
    assert model.distil.teacher is not None
    losses = model(**data, mode='loss')
    stages: dict[str, list[torch.Tensor]] = {'own': [], 'teacher': []}
    for name, net in (('own', model), ('teacher', model.distil.teacher)):
        for layer in net.backbone.layers:
            for block in layer[1]:
                block.register_forward_hook(lambda m, args, out, name=name: stages[name].append(out))
        net.backbone(data['inputs'])
    wanted = sum((a - b).square().mean() for a, b in zip(stages['own'], stages['teacher'], strict=True))
    torch.testing.assert_close(losses['loss_far'], 3 * wanted)
    model.distil, kept = None, model.distil
    for name, value in model(**data, mode='loss').items():
        torch.testing.assert_close(sum(losses[name]), 0.5 * sum(value))
    assert kept.places[0].path == 'backbone.layers.0.1.0.attn'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(teacher=None), 'go together'),
        (dict(teacher=dict(config='a.py')), 'expected teacher='),
        (dict(learns='nothing'), "learns='nothing'"),
        (dict(distance=dict(type='MSE', feature='head')), "feature='head'"),
        (dict(distance=dict(type='L1')), 'L1'),
        (dict(wight=1), "takes no 'wight'"),
    ],
)
def test_keys_of_distil_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AsrError, match=message):
        MODELS.build(retinanet(tmp_path, **change).model)


def test_teachers_that_do_not_fit_are_refused_before_the_first_step(tmp_path: Path) -> None:
    config = retinanet(tmp_path, distance=dict(type='MSE', feature='heads'))
    with pytest.raises(PlugError, match='cannot be seen'):
        MODELS.build(copy.deepcopy(config.model)).init_weights()
    config = retinanet(tmp_path)
    config.model.backbone.pop('replace')
    with pytest.raises(PlugError, match='is replaced; give replace'):
        MODELS.build(copy.deepcopy(config.model))
    config = retinanet(tmp_path)
    (tmp_path / 'teacher.pth').unlink()
    with pytest.raises(CheckpointError, match='no such checkpoint'):
        MODELS.build(copy.deepcopy(config.model)).init_weights()


def test_the_stock_config_is_that_of_the_teacher_and_nothing_folds(tmp_path: Path) -> None:
    from asr_downstream.detection.export import fold_checkpoint

    config = retinanet(tmp_path)
    plain = stock_config(config)
    assert plain.model == Config.fromfile(tmp_path / 'teacher.py').model
    torch.save({'state_dict': build_detector(config).state_dict()}, tmp_path / 'student.pth')
    with pytest.raises(FoldError, match='is replaced, as in no stock detector'):
        fold_checkpoint(config, tmp_path / 'student.pth', tmp_path / 'out.pth')
