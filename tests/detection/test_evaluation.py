"""Evaluation of detectors: COCO scores by two tools, masks, classes, augmentation, pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from bench.coco import fake_set
from mmdet.evaluation import CocoMetric
from mmengine.evaluator import Evaluator
from pycocotools import mask as masks

from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.evaluation.augmented import augmented
from asr_downstream.detection.evaluation.evaluate import Evaluation, Seen, evaluate, scored
from asr_downstream.detection.evaluation.pictures import show_each
from asr_downstream.detection.evaluation.results import markdown, read_run
from asr_downstream.detection.evaluation.scores import NAMES, score
from asr_downstream.detection.evaluation.test import TestPlan, evaluate_checkpoint
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.errors import AsrError, DataError

CONFIG = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
Tool = Callable[..., Any]


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, sizes={'train': 8, 'val': 6})
    return root


@pytest.fixture(scope='module')
def fake() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return fake_set(images=30, per_image=20, classes=6)


def with_masks(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every box with an ellipse in it."""
    found = []
    for entry in entries:
        x, y, w, h = entry['bbox']
        rows, columns = np.ogrid[:480, :640]
        inside = ((columns - x - w / 2) / (w / 2 + 1)) ** 2 + ((rows - y - h / 2) / (h / 2 + 1)) ** 2 <= 1
        code = masks.encode(np.asfortranarray(inside.astype(np.uint8)))
        found.append({**entry, 'segmentation': {'size': code['size'], 'counts': code['counts'].decode()}})
    return found


def test_scores_are_those_of_mmdetections_metric(fake: Any, tmp_path: Path) -> None:
    truth, detections = fake
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    ours, theirs = (Evaluator(CocoMetric(ann_file=str(tmp_path / 'truth.json'), metric='bbox')) for _ in range(2))
    for image in truth['images']:
        own = [d for d in detections if d['image_id'] == image['id']]
        boxes = torch.tensor([d['bbox'] for d in own], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        found = {'bboxes': boxes, 'scores': torch.tensor([d['score'] for d in own], dtype=torch.float64)}
        found['labels'] = torch.tensor([d['category_id'] - 1 for d in own])
        for evaluator in (ours, theirs):
            evaluator.dataset_meta = {'classes': [c['name'] for c in truth['categories']]}
            sample = {'img_id': image['id'], 'ori_shape': (480, 640), 'pred_instances': found}
            evaluator.metrics[0].process({}, [sample])
    found = scored(ours, len(truth['images']), fast=False).summary
    expected = theirs.evaluate(len(truth['images']))
    for name, key in {'AP': 'mAP', 'AP50': 'mAP_50', 'AP75': 'mAP_75', 'APs': 'mAP_s', 'APl': 'mAP_l'}.items():
        assert found[name] == expected[f'coco/bbox_{key}'], name
    assert 0.05 < found['AP'] < 0.9


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_the_fast_tool_gives_the_numbers_of_the_reference(fake: Any, kind: str) -> None:
    truth, detections = fake
    if kind == 'segm':
        truth = {**truth, 'annotations': with_masks(truth['annotations'])}
        detections = with_masks(detections)
    before = json.dumps([truth, detections])
    reference = score(truth, {kind: detections})
    assert score(truth, {kind: detections}, fast=True) == reference
    assert json.dumps([truth, detections]) == before, 'nothing is added to what was given'
    prefix = {'bbox': '', 'segm': 'segm_'}[kind]
    assert list(reference.summary) == [prefix + name for name in NAMES]
    assert set(reference.classes) == {str(c) for c in range(1, 7)}
    some_classes = score(truth, {kind: detections}, classes=['2', '5'])
    assert some_classes.classes == {k: v for k, v in reference.classes.items() if k in ('2', '5')}
    mean = np.mean([v[f'{prefix}AP'] for v in reference.classes.values()])
    assert reference.summary[f'{prefix}AP'] == pytest.approx(mean, abs=1e-3)
    if kind == 'segm':
        assert list(reference.summary.values()) != list(score(truth, {'bbox': detections}).summary.values())


def test_the_limits_of_a_config_are_kept(fake: Any) -> None:
    truth, detections = fake
    usual, other = (score(truth, {'bbox': detections}, max_detections=m) for m in ((100, 300, 1000), (100, 1, 10)))
    assert other.summary == usual.summary  # AR is of 100 detections in both, and no image here has more
    assert score(truth, {'bbox': detections}, max_detections=(1, 2, 100), fast=True) == other


def test_no_detections_score_zero(fake: Any) -> None:
    found = score(fake[0], {'bbox': [], 'segm': []}, fast=True)
    assert set(found.summary.values()) == {0.0}
    assert found.classes['1'] == {'AP': 0.0, 'segm_AP': 0.0}


def test_a_missing_fast_tool_says_how_to_get_it(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'faster_coco_eval', None)
    with pytest.raises(AsrError, match='pip install faster-coco-eval'):
        score(*fake[:1], {'bbox': fake[1]}, fast=True)


def test_other_metrics_keep_their_names(digits: Path) -> None:
    config = load_config(ROOT / CONFIG, digits, {'test_dataloader.num_workers': 0})
    config.test_evaluator = dict(type='VOCMetric', metric='mAP', eval_mode='11points')
    model = randomise(build_detector(config))
    assert 'mAP' in evaluate(config, model, 'voc').metrics
    with pytest.raises(DataError, match='--fast is for COCO metrics.*VOCMetric'):
        evaluate(config, model, 'voc', fast=True)


def test_augmentation_tests_the_image_and_its_mirror(digits: Path) -> None:
    config = load_config(ROOT / CONFIG, digits, {'test_dataloader.num_workers': 0})
    model = randomise(build_detector(config))
    seen: list[bool] = []
    predict = model.predict
    model.predict = lambda x, samples, **k: (seen.extend(s.flip for s in samples), predict(x, samples, **k))[1]
    result = evaluate(*augmented(config, model), 'TTA')
    assert sorted(set(seen)) == [False, True]
    assert len(result.detections) == 6
    assert config.test_dataloader.dataset.pipeline[-1].type == 'PackDetInputs', 'the config is not touched'
    config.test_evaluator.metric = ['bbox', 'segm']
    with pytest.raises(DataError, match='--tta merges boxes only'):
        augmented(config, model)


def test_pictures_show_boxes_and_masks_side_by_side(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / 'cells.png'
    Image.new('RGB', (200, 100), 'white').save(path)
    box = torch.tensor([[20.0, 20, 90, 80]])
    mask = torch.zeros(1, 100, 200, dtype=torch.bool)
    mask[0, 30:70, 30:80] = True
    arms = [
        Evaluation(name, {}, {1: (box, torch.tensor([0.9]), torch.tensor([0]))}, 1, 1.0, seen={1: Seen(path, found)})
        for name, found in (('unfolded', mask), ('folded', None))
    ]
    written = show_each(tmp_path / 'out', arms, ['cell'])
    assert written == [tmp_path / 'out' / 'cells.png']
    pixels = np.asarray(Image.open(written[0]).convert('RGB')).astype(int)
    assert pixels.shape[1] > 2.5 * pixels.shape[0], 'side by side'
    again = Path(tmp_path / 'elsewhere' / 'cells.png')
    again.parent.mkdir()
    again.write_bytes(path.read_bytes())
    for arm in arms:
        arm.seen[2] = Seen(again, None)
        arm.detections[2] = arm.detections[1]
    assert [p.name for p in show_each(tmp_path / 'both', arms, ['cell'])] == ['1-cells.png', '2-cells.png']
    for arm in arms:
        del arm.seen[2]
    with pytest.raises(DataError, match='is an image of the data set'):
        show_each(tmp_path, arms, ['cell'])
    left, right = np.array_split(pixels, 2, axis=1)
    tinted = [(np.ptp(half, axis=2) > 20).sum() for half in (left, right)]
    assert tinted[0] > 3 * tinted[1] > 0, 'the mask is drawn where there is one'


def test_the_tool_does_all_of_it(tool: Tool, digits: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / CONFIG, digits)
    torch.save({'state_dict': randomise(build_detector(config)).state_dict()}, tmp_path / 'a.pth')
    done = tool(
        'test_det', CONFIG, tmp_path / 'a.pth', '--fold', '--fast', '--per-class', '--tta', '--show-dir',
        tmp_path / 'pictures', '--show-images', 2, '--data-root', digits, '--work-dir', tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ('AP by class', 'folded, TTA', 'ARl', '2 pictures'):
        assert text in done.stdout
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 2
    found = json.loads((tmp_path / 'test.json').read_text())
    assert found['scored_with'] == 'faster-coco-eval'
    assert set(found['folded']['classes']) == {str(d) for d in range(10)}
    assert 'AP' in found['tta']


def finished_run(folder: Path, seed: int, ap: float, folded: bool) -> Path:
    """What training of two epochs and a test leave."""
    logs = folder / '2026' / 'vis_data'
    logs.mkdir(parents=True)
    lines = [{'loss': 2.0 / e, 'epoch': e, 'iter': 10 * e} for e in (1, 2)] + [{'coco/bbox_mAP': ap, 'step': 2}]
    (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
    (folder / 'arm.py').write_text(
        f'train_cfg = dict(max_epochs=2)\ntrain_dataloader = dict(batch_size=4)\nrandomness = dict(seed={seed})\n'
    )
    metrics = {'AP': ap, 'AP50': 2 * ap, 'parameters': 100, 'latency_ms': 3.0}
    arms = {'unfolded': metrics, 'folded': {**metrics, 'parameters': 90}, 'difference': {}} if folded else metrics
    made = {**arms, 'checkpoint': str(folder / 'epoch_2.pth'), 'sha256': 'x', 'versions': {}}
    (folder / 'test.json').write_text(json.dumps(made))
    return folder


def test_a_detector_shipped_into_a_run_is_not_its_training(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / 'run', 0, 0.3, folded=True)
    (folder / 'aaa.py').write_text("model = dict(type='RetinaNet')\n")
    with pytest.raises(DataError, match='has several configs, aaa.py, arm.py; leave that of its training'):
        read_run(folder)
    (folder / 'aaa.pth').touch()
    assert read_run(folder)['config'] == 'arm'


def test_runs_that_are_no_seeds_of_one_another_share_no_row(tmp_path: Path) -> None:
    records = [read_run(finished_run(tmp_path / str(n), seed, 0.3, folded=False)) for n, seed in enumerate((0, 0))]
    with pytest.raises(DataError, match='arm: has seed 0 twice'):
        markdown(records)
    records = [{**record, 'seed': seed, 'data': [f'{seed}.json']} for seed, record in enumerate(records)]
    with pytest.raises(DataError, match='arm: was tested on'):
        markdown(records)


def test_what_cannot_be_done_is_said_before_the_test(digits: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / CONFIG, digits, {'test_dataloader.num_workers': 0})
    torch.save({'state_dict': build_detector(config).state_dict()}, tmp_path / 'a.pth')
    config.test_evaluator.metric = ['bbox', 'segm']
    with pytest.raises(DataError, match='--tta merges boxes only'):
        evaluate_checkpoint(config, tmp_path / 'a.pth', tmp_path / 'out' / 'test.json', TestPlan(tta=True))
    with pytest.raises(AsrError, match='a.pth does not allow it'):
        evaluate_checkpoint(config, tmp_path / 'a.pth', tmp_path / 'a.pth' / 'x' / 'test.json', TestPlan())
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_results_of_seeds_are_gathered(tmp_path: Path, tool: Tool) -> None:
    runs = [finished_run(tmp_path / str(seed), seed, 0.2 + 0.1 * seed, folded=True) for seed in (0, 1, 2)]
    done = tool('results_det', *runs, '--out', tmp_path / 'results.jsonl')
    assert done.returncode == 0, done.stderr
    row = '| `arm` | 0, 1, 2 | 0.300 ± 0.100 | 0.600 ± 0.200 |  | 0.300 ± 0.100 | no: exact | 100 | 90 |'
    assert row in done.stdout
    other = [{**read_run(run), 'config': 'other'} for run in runs[1:]]
    for record, ap in zip(other, (0.28, 0.39), strict=True):
        record['trained'] = {**record['trained'], 'AP': ap}
    table = markdown([*map(read_run, runs), *other])
    assert '| `other` | 1, 2 | 0.335 ± 0.078 | 0.700 ± 0.141 | -0.015 ± 0.007 |' in table
    records = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [r['seed'] for r in records] == [0, 1, 2]
    assert records[0]['loss'] == [2.0, 1.0]
    assert 'latency_ms' not in records[0]['trained']
    empty = [tmp_path / name for name in ('none', 'nothing')]
    done = tool('results_det', *runs, empty[0], '--out', tmp_path / 'again.jsonl')
    assert done.returncode == 1
    assert row in done.stdout
    assert (tmp_path / 'again.jsonl').read_text() == (tmp_path / 'results.jsonl').read_text()
    assert re.fullmatch(rf'error: {empty[0]}: is no run of .*\n', done.stderr)
    done = tool('results_det', empty[0], *runs, empty[1])
    assert (done.returncode, done.stderr.count('\n')) == (1, 3)
    assert row in done.stdout
    assert all(f'left out: {run}: is no run' in done.stderr for run in empty)
    assert 'error: 2 of 5 runs are left out, see above' in done.stderr
    (tmp_path / '1' / 'last_checkpoint').write_text(str(tmp_path / '1' / 'epoch_1.pth'))
    with pytest.raises(DataError, match=r'test.json is about .*epoch_2.pth, but the last checkpoint is epoch_1.pth'):
        read_run(tmp_path / '1')
    (tmp_path / '2' / 'test.json').unlink()
    with pytest.raises(DataError, match='was not tested; python tools/test_det.py'):
        read_run(tmp_path / '2')
