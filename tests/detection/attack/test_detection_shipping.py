"""What is shipped of detectors, stock runs too; what is refused before the work; folders that cannot be written."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, command, files_of_at_most, randomise
from helpers.detsets import tiny_set
from huggingface_hub import ModelCard

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(120)]

from mmengine.config import Config

from asr_downstream.detection import export as shipping
from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.coco import check_annotations, check_datasets
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.evaluation import compare as comparing
from asr_downstream.detection.evaluation import test as testing
from asr_downstream.detection.evaluation.results import results_of
from asr_downstream.detection.models.detectors import build_detector, load_detector
from asr_downstream.errors import AsrError, CheckpointError, DataError, FoldError

FOLDER = ROOT / 'det_configs/digits'
PLUGGED, STOCK, DIA = (FOLDER / f'retinanet_r18-w16{name}_fpn_digits.py' for name in ('-asr-se', '', '-dia'))
TEN = tuple('0123456789')


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """A checkpoint of each config, with random weights."""
    folder = tmp_path_factory.mktemp('made')
    torch.manual_seed(0)
    paths = {}
    for config in (PLUGGED, STOCK, DIA):
        paths[config] = folder / f'{config.stem}.pth'
        content = {'state_dict': randomise(build_detector(load_config(config))).state_dict(), 'meta': {'epoch': 1}}
        content['optimizer'] = {'state': {}}
        torch.save(content, paths[config])
    return paths


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_stock_run_ships(made: dict[Path, Path], suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f'shipped/detector{suffix}'
    done = command('fold', STOCK, made[STOCK], out)
    assert done.returncode == 0, done.stderr
    assert 'nothing to fold' in done.stdout
    report = json.loads((out.parent / 'fold_report.json').read_text())
    assert report['sites'] == []
    assert report['feature_map_difference']['float32']['absolute'] == 0.0
    config = Config.fromfile(out.with_suffix('.py'))
    assert 'asr_downstream' not in config.pretty_text
    shipped, _ = load_detector(config, out)
    trained, _ = load_detector(load_config(STOCK), made[STOCK])
    for key, value in trained.state_dict().items():
        assert torch.equal(value, shipped.state_dict()[key]), key
    if suffix == '.pth':
        assert set(torch.load(out, weights_only=True)) == {'state_dict', 'meta'}, 'weights only'
    with pytest.raises(CheckpointError, match='no plug.*leave out --calibrate'):
        shipping.fold_checkpoint(load_config(STOCK), made[STOCK], out, calibrate=shipping.CalibrationPlan())


def test_a_card_says_what_was_given_and_nothing_else(made: dict[Path, Path], tmp_path: Path) -> None:
    for name, options in {'bare': (), 'given': ('--license', 'cc-by-4.0', '--dataset', 'me/cells: "x"')}.items():
        out = tmp_path / name / 'detector.pth'
        done = command('fold', PLUGGED, made[PLUGGED], out, *options)
        assert done.returncode == 0, done.stderr
        _, head, body = (out.parent / 'README.md').read_text().split('---\n', 2)
        found = yaml.safe_load(head)
        assert found['library_name'] == 'mmdetection'
        assert found['pipeline_tag'] == 'object-detection'
        for key, value in {'license': 'cc-by-4.0', 'datasets': ['me/cells: "x"'], 'base_model': None}.items():
            assert found.get(key) == (value if name == 'given' else None)
        assert 'detector.py' in body
        assert 'RetinaNet' in body
        assert 'asr_downstream' not in body
    assert json.loads((out.parent / 'fold_report.json').read_text())['card'] == 'README.md'


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_code_in_a_card_loads_a_detector_with_its_own_classes(
    made: dict[Path, Path], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ('it\'s "a"', 'b\n```\\', *TEN[2:])
    content = torch.load(made[STOCK], weights_only=True)
    torch.save({**content, 'meta': {'dataset_meta': {'classes': classes}}}, tmp_path / 'trained.pth')
    shipping.fold_checkpoint(load_config(STOCK), tmp_path / 'trained.pth', tmp_path / f'a{suffix}')
    (tmp_path / 'load.py').write_text((tmp_path / 'README.md').read_text().split('```python\n')[1].split('\n```')[0])
    monkeypatch.chdir(tmp_path)
    assert tuple(runpy.run_path('load.py')['model'].dataset_meta['classes']) == classes


def test_a_card_takes_the_place_of_none_that_somebody_wrote(made: dict[Path, Path], tmp_path: Path) -> None:
    (tmp_path / 'README.md').write_text('mine')
    for _ in range(2):
        assert command('fold', STOCK, made[STOCK], tmp_path / 'a.pth', '--base-model', 'me/base').returncode == 0
        assert (tmp_path / 'README.md').read_text() == 'mine'
        assert yaml.safe_load((tmp_path / 'a.md').read_text().split('---\n')[1])['base_model'] == 'me/base'


@pytest.mark.slow
def test_what_was_tested_is_on_the_card_for_machines(made: dict[Path, Path], tmp_path: Path) -> None:
    shutil.copy(made[PLUGGED], tmp_path / 'epoch_1.pth')
    config = load_config(PLUGGED, tiny_set(tmp_path / 'set', classes=TEN), {'test_dataloader.num_workers': 0})
    config.test_dataloader.persistent_workers = False
    written = tmp_path / 'test.json'

    def shipped() -> Any:
        shipping.fold_checkpoint(config, tmp_path / 'epoch_1.pth', tmp_path / 'out/a.pth')
        return ModelCard.load(tmp_path / 'out/README.md')

    assert shipped().data.eval_results is None
    for folding, how in ((None, {'measured': 'before folding'}), ('exact', None)):
        plan = testing.TestPlan(folding=folding)
        testing.evaluate_checkpoint(config, tmp_path / 'epoch_1.pth', written, plan)
        tested = json.loads(written.read_text())
        for metrics in (tested, *([tested['folded'], tested['unfolded']] if folding else [])):
            metrics.update(AP=0.125, AP50=0.25, AP75=-1.0)  # random weights find nothing
        written.write_text(json.dumps(tested))
        card = shipped()
        rows = [(r.dataset_name, r.metric_name, r.metric_value, r.metric_args) for r in card.data.eval_results]
        assert rows == [('set', 'AP', 0.125, how), ('set', 'AP50', 0.25, how)]
        assert {r.dataset_split for r in card.data.eval_results} == {'set/annotations/val.json'}
        assert f'0.250{", before folding" if how else ""} |' in card.text
        assert card.data.model_name == 'a'
    for change in ({'sha256': 'of another'}, {'data': None}, {'calibration': {'sites': []}, 'sha256': 'x'}):
        written.write_text(json.dumps(tested | change))
        assert shipped().data.eval_results is None
    written.write_text('of something else')
    assert shipped().data.eval_results is None


@pytest.mark.parametrize('folding', [pytest.param(None, marks=pytest.mark.slow), 'exact'])
def test_a_set_without_annotations_is_for_predictions_and_pictures(
    made: dict[Path, Path], tmp_path: Path, folding: str | None
) -> None:
    root = tiny_set(tmp_path / 'set', lambda content: content.pop('annotations'), 'val', TEN)
    options = {'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False}
    for loader in ('train', 'val', 'test'):
        if loader == 'train':
            check_datasets(load_config(PLUGGED, root, options), 'train_dataloader')
            continue
        with pytest.raises(DataError, match=r'val\.json: has images and no annotations, .*format_only=True'):
            check_datasets(load_config(PLUGGED, root, options), f'{loader}_dataloader')
    options |= {'test_evaluator.format_only': True, 'test_evaluator.outfile_prefix': str(tmp_path / 'found')}
    plan = testing.TestPlan(folding=folding, show_dir=tmp_path / 'pictures')
    said = testing.evaluate_checkpoint(load_config(PLUGGED, root, options), made[PLUGGED], tmp_path / 'x.json', plan)
    assert '3 pictures' in said
    assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == ['val1.png', 'val2.png', 'val3.png']
    detections = json.loads((tmp_path / 'found.bbox.json').read_text())
    assert {row['image_id'] for row in detections} <= {1, 2, 3}
    assert detections
    tested = json.loads((tmp_path / 'x.json').read_text())
    assert not {'AP', 'AP50'} & {*tested, *tested.get('folded', ())}
    (root / 'annotations/val.json').rename(root / 'annotations/train.json')
    with pytest.raises(DataError, match=r'train\.json: has images and no annotations'):
        check_annotations(root / 'annotations/train.json', root / 'images')


def test_a_calibrated_fold_has_only_its_own_results() -> None:
    calibration = {'sites': [{'path': 'a', 'samples': 4}]}
    tested = {'data': ['set/val.json'], 'folded': {'AP': 0.5}, 'unfolded': {'AP': 0.75}, 'calibration': calibration}
    report = {'sites': [{}], 'calibration': calibration}
    assert [r.metric_value for r in results_of(tested, report)] == [0.5]
    other = {'sites': [{'path': 'a', 'samples': 8}]}
    assert results_of(tested, report | {'calibration': other}) == []


def test_a_config_can_say_what_stands_in_the_card(made: dict[Path, Path], tmp_path: Path) -> None:
    config = load_config(STOCK, options={'card.license': 'mit', 'card.datasets': ['a/b', 'c/d']})
    shipping.fold_checkpoint(config, made[STOCK], tmp_path / 'a.pth')
    found = yaml.safe_load((tmp_path / 'README.md').read_text().split('---\n')[1])
    assert (found['license'], found['datasets']) == ('mit', ['a/b', 'c/d'])
    with pytest.raises(AsrError, match="card: unknown key 'licence'.*did you mean 'license'"):
        shipping.fold_checkpoint(load_config(STOCK, options={'card.licence': 'mit'}), made[STOCK], tmp_path / 'a.pth')


def test_a_test_of_a_stock_model_that_is_to_fold_is_refused_without_a_warning(
    made: dict[Path, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = load_config(STOCK, tiny_set(tmp_path / 'set', classes=TEN))
    for folding in ('exact', 'calibrated'):
        with pytest.raises(CheckpointError, match='nothing to fold'):
            testing.evaluate_checkpoint(config, made[STOCK], tmp_path / 'x.json', testing.TestPlan(folding=folding))
    assert not [str(warning.message) for warning in recwarn if 'no plugged sites' in str(warning.message)]


def test_gates_that_depend_on_the_input_name_the_options(made: dict[Path, Path], tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', classes=TEN)
    done = command('test_det', DIA, made[DIA], '--fold', '--data-root', root, '--work-dir', tmp_path)
    assert done.returncode == 1
    assert '--fold calibrated --calibrate N' in done.stderr
    done = command('fold', DIA, made[DIA], tmp_path / 'a.pth')
    assert done.returncode == 1
    assert 'with --calibrate N' in done.stderr
    assert '--fold calibrated' not in done.stderr


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_named(made: dict[Path, Path], value: float, tmp_path: Path) -> None:
    content = torch.load(made[PLUGGED], weights_only=True)
    content['state_dict']['backbone.layer1.0.conv1.weight'][0, 0, 0, 0] = value
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'a\.pth: backbone\.layer1\.0\.conv1\.weight is not finite'):
        shipping.fold_checkpoint(load_config(PLUGGED), tmp_path / 'a.pth', tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match=r'a\.pth: backbone\.layer1\.0\.conv1\.weight is not finite'):
        load_detector(load_config(PLUGGED), tmp_path / 'a.pth')


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError('the work began')


def test_a_full_disk_is_found_before_the_work(
    made: dict[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_set(tmp_path / 'set', classes=TEN)
    for module, name in (
        (shipping, 'fold_exactly'), (testing, 'evaluate'), (testing, 'compare'), (comparing, 'evaluate'),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    config = load_config(STOCK, root)  # MMEngine reads configs from copies, which the limit would not let it make
    new = tmp_path / 'new'
    spec = importlib.util.spec_from_file_location('results_det', ROOT / 'tools/results_det.py')
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    runs: list[Callable[[], Any]] = [
        lambda: shipping.fold_checkpoint(config, made[STOCK], new / 'a.pth'),
        lambda: testing.evaluate_checkpoint(config, made[STOCK], new / 'test.json', testing.TestPlan()),
        lambda: make_digits(new),
        lambda: tool.main(['none', '--out', str(new / 'a.jsonl')]),
    ]
    for run in runs:
        with files_of_at_most(0), pytest.raises(AsrError, match='new.*: cannot be written .* free') as error:
            run()
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('limit', [10_000, 200_000])
def test_a_disk_that_fills_leaves_nothing(made: dict[Path, Path], limit: int, tmp_path: Path) -> None:
    """The first limit stops the weights, the second lets small files pass."""
    out = tmp_path / 'new/a.pth'
    out.parent.mkdir()
    (out.parent / 'a.py').write_text('before')
    with files_of_at_most(limit):
        done = command('fold', STOCK, made[STOCK], out)
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert 'a.pth: cannot be written' in done.stderr
    assert [p.name for p in out.parent.iterdir()] == ['a.py']
    assert (out.parent / 'a.py').read_text() == 'before'


def test_digits_and_voc_leave_nothing_on_a_full_disk(tmp_path: Path) -> None:
    from helpers.detsets import flat_voc

    root = flat_voc(tmp_path / 'voc', *(f'n{n}' for n in range(40)))
    with files_of_at_most(2000):
        done = command('prepare_data', 'digits', tmp_path / 'digits')
        assert (done.returncode, done.stderr.count('\n')) == (1, 1), done.stderr
        assert 'cannot be written' in done.stderr
        done = command('prepare_data', 'voc', root, '--split', 0.1)  # val is the larger one
        assert (done.returncode, done.stderr.count('\n')) == (1, 1), done.stderr
        assert 'cannot be written' in done.stderr
    assert not list((root / 'annotations').glob('*'))
    assert [p.name for p in tmp_path.iterdir()] == ['voc']


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"checkpoint": 3}', '{"checkpoint": "epoch_2.pth"}'])
def test_results_of_a_damaged_test_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / 'arm.py').write_text('train_cfg = dict(max_epochs=2)\ntrain_dataloader = dict(batch_size=4)\n')
    (tmp_path / 'last_checkpoint').write_text('epoch_2.pth')
    (tmp_path / 'test.json').write_text(text)
    (tmp_path / 'x/vis_data').mkdir(parents=True)
    (tmp_path / 'x/vis_data/scalars.json').write_text(
        '{"loss": 1, "epoch": 1, "iter": 1}\n{"loss": 1, "epoch": 2, "iter": 2}'
    )
    done = command('results_det', tmp_path)
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert f'{tmp_path}/test.json: ' in done.stderr


def test_exact_folds_refuse_no_run_of_constant_gates(made: dict[Path, Path], tmp_path: Path) -> None:
    """Control: the file of a plugged run is not exported with the config of the stock model."""
    with pytest.raises((CheckpointError, FoldError), match='has gates, but the config builds a stock RetinaNet'):
        shipping.fold_checkpoint(load_config(STOCK), made[PLUGGED], tmp_path / 'a.pth')
