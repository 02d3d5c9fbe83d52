"""Kinds of trainings: configs of arms, commands, what is read from runs."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, randomise
from helpers.command_lines import parse
from helpers.reports import classification_run

from asr_downstream import describe, plug
from asr_downstream.commands.ablation.arms import ARMS, Arm, preserving
from asr_downstream.commands.ablation.kinds import KINDS, kind_of_config, kind_of_folder
from asr_downstream.commands.ablation.kinds.base import Kind, Plan, Run
from asr_downstream.commands.ablation.study import NOTE, Study, open_config, pretrained, read_stored
from asr_downstream.errors import AsrError, DataError
from asr_downstream.files.configs import read_config
from asr_downstream.files.ready import FOLDERS, ready_configs
from asr_downstream.registry import PLUGS

DETECTOR = ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
UNET = ROOT / 'diffusion/configs/unet-w32_digits.py'
RUN = ROOT / 'tests/fixtures/v0.1.0/diffusion'
SMALL = 'w16_fpn_digits|unet-w32_digits|resnet20|vit-w64_digits'
CONFIGS = {'detection': DETECTOR, 'diffusion': UNET}
PLUGS.import_from_location()
NAMES = [name for name, arm in ARMS.items() if arm.plug is None or arm.plug['type'] in PLUGS.module_dict]


def run_of(config: Path, out: Path, name: str = 'dia', **plan: Any) -> Run:
    return Run(Plan(config, out, **plan), name, ARMS[name], 3)


def config_of(kind: Kind, given: Path, out: Path, name: str) -> Path:
    run = run_of(given, out, name)
    run.config.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text(kind.text(given, read_config(given, ''), run.arm))
    return run.config


@pytest.mark.det
def test_every_ready_config_that_can_be_compared_is_of_one_kind() -> None:
    pytest.importorskip('mmdet')
    kinds = {'det_configs': 'detection', 'diffusion/configs': 'diffusion', 'tools/cls_configs': 'classification'}
    for folder in FOLDERS:
        found = [path for path in ready_configs(folder) if re.search(SMALL, path.name)]
        for path in found:
            config = read_config(path, folder, imports=False)
            recognised = [kind.name for kind in KINDS.values() if kind.recognises(config)]
            assert recognised == [kinds[folder]] if folder in kinds else not recognised, path


@pytest.mark.det
@pytest.mark.parametrize('name', NAMES)
def test_arms_of_a_detector(name: str, tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    from asr_downstream.detection.config import load_config
    from asr_downstream.detection.models.detectors import build_detector

    path = config_of(KINDS['detection'], DETECTOR, tmp_path / 'out', name)
    config = load_config(path)
    assert len(describe(build_detector(config)).sites) == (6 if 'attention' in (ARMS[name].plug or {}) else 0)
    assert kind_of_config(config, path).name == 'detection'


@pytest.mark.parametrize('name', NAMES)
def test_arms_of_a_unet(name: str, tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.diffusion.models.build import build_model

    config = load_config(config_of(KINDS['diffusion'], UNET, tmp_path / 'out', name))
    sites = describe(build_model(config)).sites
    assert len(sites) == (9 if 'attention' in (ARMS[name].plug or {}) else 0)


@pytest.mark.parametrize('name', NAMES)
def test_arms_of_a_pretrained_model_start_from_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.diffusion.models.build import build_model

    arm = preserving(ARMS[name])
    path = tmp_path / 'arm.py'
    path.write_text(KINDS['diffusion'].text(UNET, read_config(UNET, ''), arm))
    config = load_config(path)
    model = randomise(build_model(config, plugged=False)).eval()
    stock = copy.deepcopy(model)
    if arm.plug is not None:
        plug(model, config.plug)
    inputs = dict(sample=torch.randn(2, 1, 8, 8), timestep=torch.tensor([5, 900]), return_dict=False)
    with torch.no_grad():
        same = torch.allclose(model(**inputs)[0], stock(**inputs)[0], atol=1e-6)
    assert same == (name != 'start')  # which has no gates
    assert preserving(arm) == arm
    own = dict(type='ASR', attention=dict(type='SE'), preserve=False)
    assert preserving(Arm('', own, '')).plug == own


R50 = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'


@pytest.mark.parametrize(
    ('config', 'options', 'start'),
    [
        (UNET, (), None),
        (UNET, ('model.pretrained_model_name_or_path=/a/pipe',), '/a/pipe'),
        ('resnet20_cifar10-10k-16px', (), None),
        pytest.param(DETECTOR, (), None, marks=pytest.mark.det),
        pytest.param(DETECTOR, ('load_from=stock.pth',), 'stock.pth', marks=pytest.mark.det),
        pytest.param(R50, (), 'torchvision://resnet50', marks=pytest.mark.det),
    ],
)
def test_what_a_training_starts_from_is_found_in_its_config(
    config: str, options: tuple[str, ...], start: str | None, tmp_path: Path
) -> None:
    if config == R50:
        config = str(tmp_path / 'r50.py')
        Path(config).write_text(f'_base_ = {R50!r}\n')
    path, kind = open_config(Path(config))
    assert pretrained(Plan(path, tmp_path, options=options), kind) == start


@pytest.mark.parametrize(('words', 'preserved'), [((), True), (('--no-preserve',), False)])
def test_the_command_preserves_what_was_learnt(
    words: tuple[str, ...], preserved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Arm] = {}
    monkeypatch.setattr(Study, 'carry_out', lambda study, *_: seen.update(study.arms) or [])
    base = ('--cfg-options', 'model.pretrained_model_name_or_path=/a/pipe')
    done = command('ablate', UNET, '--out', tmp_path, *base, *words)
    assert ('starts from /a/pipe: gates start at one' in done.stdout) == preserved
    assert list(seen) == [name for name in ARMS if name != 'start']
    assert all((arm.plug or {}).get('preserve', False) == preserved for name, arm in seen.items() if name != 'stock')
    command('ablate', UNET, '--out', tmp_path, '--arms', 'stock,start', *base)
    assert 'start' in seen
    seen.clear()
    command('ablate', UNET, '--out', tmp_path)
    assert seen == ARMS


@pytest.mark.parametrize(
    'name', [pytest.param('retinanet_r18-w16-asr-se_fpn_digits', marks=pytest.mark.det), 'unet-w32-asr-se_digits']
)
def test_configs_of_arms_are_stock(name: str) -> None:
    with pytest.raises(AsrError, match='has a plug; give the stock config'):
        open_config(Path(name))


def test_configs_are_found_by_name(tmp_path: Path) -> None:
    path, kind = open_config(Path('unet-w32_digits'))
    assert (path.resolve(), kind.name) == (UNET, 'diffusion')
    with pytest.raises(AsrError, match='is a config of no kind that can be compared: detection, diffusion, class'):
        open_config(Path('vit-w64_digits'))
    with pytest.raises(AsrError, match='no such config'):
        open_config(tmp_path / 'nowhere.py')


@pytest.mark.det
def test_commands_are_those_of_the_program(tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    pytest.importorskip('mmdet')
    for kind, config in CONFIGS.items():
        given = {'data': tmp_path, 'options': ('a.b=1', 'c=2'), 'calibrate': 7}
        run = run_of(config, tmp_path / kind, **given)
        run.folder.mkdir(parents=True)
        (run.folder / 'last_checkpoint').write_text('epoch_2.pth')
        for words in (KINDS[kind].train(run), KINDS[kind].test(run)):
            parse('asr-downstream', words)
        assert '--resume' not in KINDS[kind].train(run) or kind == 'detection'
        (run.folder / 'checkpoint-2').mkdir()
        assert '--resume' in KINDS[kind].train(run)
        tested = KINDS[kind].test(run)
        assert tested[tested.index('--fold') + 1] == 'calibrated'
        assert tested[tested.index('--calibrate') + 1] == '7'
        stock = run_of(config, tmp_path / kind, 'stock')
        shutil.copytree(run.folder, stock.folder)
        assert '--fold' not in KINDS[kind].test(stock)


def test_options_are_understood_as_the_trainings_do() -> None:
    plan = Plan(UNET, Path('out'), options=('a.b=1e-3', 'c=[1,2]', 'd=True', 'e=x=y'))
    assert plan.overrides == {'a.b': 1e-3, 'c': [1, 2], 'd': True, 'e': 'x=y'}
    assert Plan(UNET, Path('out')).overrides == {}


# Reading --------------------------------------------------------------------------------------------------------------


def diffusion_run(folder: Path, seed: int = 0, fid: float = 5.0, folded: float | None = None, **about: Any) -> Path:
    """A run as it is after `evaluate`."""
    (folder / 'checkpoint-2').mkdir(parents=True)
    text = (RUN / 'config.py').read_text()
    text = text.replace('max_train_steps = 4', 'max_train_steps = 2').replace('seed = 0', f'seed = {seed}')
    (folder / 'config.py').write_text(text)
    [row] = json.loads((RUN / 'evaluation.json').read_text())
    row['provenance'].update(about)
    row['numbers'] |= {'fid': fid}
    rows = [row]
    if folded is not None:
        rows.append({**row, 'arm': 'calibrated on 64', 'numbers': {'fid': folded, 'kid': 0.1, 'parameters': 7}})
    (folder / 'evaluation.json').write_text(json.dumps(rows))
    return folder


def test_a_diffusion_run_is_read_with_what_it_depends_on(tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    kind = KINDS['diffusion']
    folder = diffusion_run(tmp_path / 'mine', 4, 6.0, 7.0)
    assert kind_of_folder(folder) is kind
    record = kind.read(folder)
    assert record.arm.startswith('ASR(SE, reduction=4, sites=')
    assert (record.seed, record.folding) == (4, 'calibrated')
    assert (record.trained['fid'], record.folded) == (6.0, {'fid': 7.0, 'kid': 0.1, 'parameters': 7})
    assert record.setting['steps of training'] == 2
    assert record.setting['extractor'].startswith('sha256:')
    assert 'versions' not in record.setting
    unfolded, calibrated = json.loads((folder / 'evaluation.json').read_text())
    other = {**unfolded, 'provenance': {**unfolded['provenance'], 'images': 9}}
    (folder / 'evaluation.json').write_text(json.dumps([calibrated, other]))
    assert kind.read(folder).folded is None, 'it was folded, but measured otherwise'
    (folder / 'evaluation.json').write_text(json.dumps([unfolded, calibrated]))
    text = (folder / 'config.py').read_text()
    (folder / 'config.py').write_text(text.replace('max_train_steps = 2', 'max_train_steps = 4'))
    with pytest.raises(DataError, match='was not evaluated at its last step, 4'):
        kind.read(folder)


def test_stored_diffusion_runs_are_compared_if_they_were_measured_alike(tmp_path: Path) -> None:
    pytest.importorskip('diffusers')
    from asr_downstream.commands.ablation.results import result_of

    for seed in range(3):
        for arm, fid in (('stock', 5.0), ('asr-se', 4.0)):
            folder = diffusion_run(tmp_path / f'runs/{arm}-s{seed}', seed, fid + 0.1 * seed * (arm == 'stock'))
            (folder / NOTE).write_text(json.dumps({'arm': arm}))
    kind, records = read_stored([tmp_path])
    result = result_of(kind.name, 'fid', kind.metrics['fid'], records)
    assert result.verdicts[1].startswith('ASR(SE) - stock: -1.100 FID (lower is better), 95% interval')
    assert result.verdicts[1].endswith('it helps here')
    diffusion_run(tmp_path / 'other', 9, 4.0, images=16)
    with pytest.raises(DataError, match='other, seed 9: images is 16, but 8 in asr-se-s0'):
        result_of('diffusion', 'fid', kind.metrics['fid'], [*records, kind.read(tmp_path / 'other')])
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(DataError, match='nothing: has no runs'):
        read_stored([tmp_path / 'nothing'])
    with pytest.raises(DataError, match='detection and diffusion have no metric in common'):
        read_stored([ROOT / 'det_configs/results/bccd.jsonl', tmp_path])


@pytest.mark.det
def test_a_detection_run_is_read(tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    kind = KINDS['detection']
    folder = tmp_path / 'run'
    (folder / 'a/vis_data').mkdir(parents=True)
    lines = [{'loss': 1.0 / epoch, 'epoch': epoch, 'iter': epoch} for epoch in (1, 2)]
    (folder / 'a/vis_data/scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    plug = ARMS['dia'].plug
    (folder / 'mine.py').write_text(
        f'model = dict(backbone=dict(type="asr_downstream.ResNet", plug={plug!r}))\n'
        'train_cfg = dict(max_epochs=2)\ntrain_dataloader = dict(batch_size=4)\nrandomness = dict(seed=3)\n'
    )
    (folder / 'last_checkpoint').write_text('epoch_2.pth')
    numbers = {'AP': 0.5, 'parameters': 9, 'latency_ms': 3.0}
    tested = {'unfolded': numbers, 'folded': numbers, 'difference': {}, 'checkpoint': 'x/epoch_2.pth', 'sha256': 'ab'}
    tested |= {'versions': {}, 'data': ['digits/val.json'], 'calibration': {'sites': [{'samples': 64}]}}
    (folder / 'test.json').write_text(json.dumps(tested))
    assert kind_of_folder(folder) is kind
    record = kind.read(folder)
    assert (record.arm, record.seed, record.folding) == ('dia', 3, 'calibrated')
    assert record.trained == {'AP': 0.5, 'parameters': 9}
    assert record.setting == {'epochs': 2, 'batch': 4, 'data': ['digits/val.json']}
    shutil.copytree(folder, tmp_path / 'copy')
    (tmp_path / 'copy' / NOTE).write_text('{"arm": "mine"}')
    assert [r.arm for r in read_stored([folder, tmp_path / 'copy'])[1]] == ['dia', 'mine']


def test_a_classifier_is_read(tmp_path: Path) -> None:
    kind = KINDS['classification']
    folder = classification_run(tmp_path / 'mine', 3, 0.64, ARMS['asr-se'].plug)
    assert kind_of_folder(folder) is kind
    record = kind.read(folder)
    assert (record.arm, record.seed, record.folding) == ('asr-se', 3, 'exact')
    assert record.trained == {'accuracy': 0.64, 'parameters': 80}
    assert record.folded == {'accuracy': 0.64, 'parameters': 70}
    stock = kind.read(classification_run(tmp_path / 'stock', 3, 0.61))
    assert (stock.arm, stock.folded, stock.folding) == ('stock', None, None)
    assert stock.setting == record.setting
    text = (folder / 'config.py').read_text()
    (folder / 'config.py').write_text(text.replace('= 20', '= 40'))
    with pytest.raises(DataError, match='was evaluated at step 20 of 40; go on with --resume'):
        kind.read(folder)
    (folder / 'evaluation.json').write_text('{"accuracy": {}}')
    with pytest.raises(DataError, match='evaluation.json is damaged'):
        kind.read(folder)
    (folder / 'evaluation.json').unlink()
    with pytest.raises(DataError, match='was not evaluated'):
        kind.read(folder)


def test_classifiers_are_compared_in_points(tmp_path: Path) -> None:
    from asr_downstream.commands.ablation.results import result_of

    for seed in range(3):
        classification_run(tmp_path / f'stock-{seed}', seed, 0.64 + 0.01 * seed)
        classification_run(tmp_path / f'start-{seed}', seed, 0.67 + 0.011 * seed, ARMS['start'].plug)
    kind, records = read_stored([tmp_path])
    result = result_of(kind.name, 'accuracy', kind.metrics['accuracy'], records)
    assert result.verdicts[1].startswith('start 1/2 - stock: +3.10 points of accuracy, 95% interval [+2.85, +3.35]')
    assert result.row('stock')[2] == '65.00 ± 1.00'


def test_classifiers_of_other_trainings_are_refused(tmp_path: Path) -> None:
    from asr_downstream.commands.ablation.results import result_of

    classification_run(tmp_path / 'stock', 0)
    classification_run(tmp_path / 'start', 0, plug=ARMS['start'].plug, resolution=16)
    kind, records = read_stored([tmp_path])
    with pytest.raises(DataError, match='resolution is 32, but 16 in start'):
        result_of(kind.name, 'accuracy', kind.metrics['accuracy'], records)
    classification_run(tmp_path / 'start', 0, plug=ARMS['start'].plug, batch=64)
    with pytest.raises(DataError, match='batch is 128, but 64 in start'):
        result_of(kind.name, 'accuracy', kind.metrics['accuracy'], read_stored([tmp_path])[1])


@pytest.mark.det
@pytest.mark.parametrize(
    ('keys', 'said'),
    [
        ("train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9)", 'is trained by steps'),
        ("test_evaluator = dict(_delete_=True, type='VOCMetric', metric='mAP')", 'is evaluated by VOCMetric'),
    ],
)
def test_detectors_without_the_numbers_that_are_compared_are_refused_first(
    keys: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / 'mine.py').write_text(f'_base_ = {str(DETECTOR)!r}\n{keys}\n')
    done = command('ablate', tmp_path / 'mine.py', '--out', tmp_path / 'out', '--arms', 'stock,se')
    assert done.returncode == 1
    assert said in done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_reference_that_is_no_arm_is_refused_first(tmp_path: Path) -> None:
    words = ('ablate', UNET, '--out', tmp_path / 'out', '--arms', 'stock,asr-se', '--reference', 'asr-see')
    done = command(*words)
    assert done.returncode == 1
    assert "--reference: 'asr-see' is no arm; did you mean 'asr-se'?" in done.stderr
    assert not (tmp_path / 'out').exists()


def test_the_encoder_of_other_data_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('diffusers')
    from asr_downstream.diffusion.evaluation import encoder

    trained: list[int] = []

    def train(images: Any, out: Path) -> None:
        trained.append(len(images))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b'')

    monkeypatch.setattr(encoder, 'train_encoder', train)
    kind = KINDS['diffusion']
    for options in ((), (), ('data.random_flip=True',)):
        kind.prepare(Plan(UNET, tmp_path, options=options))
    assert len(trained) == 2
    kind.prepare(Plan(UNET, tmp_path / 'other', test=('--extractor', 'file')))
    assert len(trained) == 2


@pytest.mark.slow
def test_unets_are_trained_folded_and_compared(tmp_path: Path) -> None:
    """The whole command, by its processes; the second time nothing is trained."""
    pytest.importorskip('diffusers')
    from conftest import command
    from helpers.diffusion import write_config

    config = write_config(tmp_path, plug=...)
    words: list[object] = [config, '--arms', 'stock,dia', '--seeds', '3', '--jobs', '2', '--out', tmp_path / 'out']
    words += ['--test', '--num-samples 16 --steps 2', '--calibrate', '16', '--cfg-options', 'max_train_steps=4']
    done = command('ablate', *words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert 'DIA, seed 2: done in' in done.stdout
    content = json.loads((tmp_path / 'out/ablation.json').read_text())
    assert [len(arm['values']) for arm in content['arms']] == [3, 3]
    assert content['comparisons'][0]['outcome'] in ('better', 'worse', 'undecided')
    assert {run['folding'] for run in content['runs']} == {None, 'calibrated'}
    again = command('ablate', *words)
    assert '6 of 6 runs are there' in again.stdout
    assert 'started' not in again.stdout


@pytest.mark.slow
@pytest.mark.det
def test_detectors_are_trained_folded_and_compared(tmp_path: Path) -> None:
    """The same of detectors: two seeds, so that there is no verdict."""
    pytest.importorskip('mmdet')
    from conftest import command
    from helpers.tiny_detection import TINY, pictures

    data = pictures(tmp_path)
    options = [f'{key}={str(value).replace(" ", "")}' for key, value in TINY.items()]
    words: list[object] = [DETECTOR, '--arms', 'stock,asr-se', '--seeds', '2', '--jobs', '2', '--data', data]
    done = command('ablate', *words, '--out', tmp_path / 'out', '--cfg-options', *options)
    log = tmp_path / 'out/runs/asr-se-s1/output.txt'
    assert done.returncode == 0, done.stderr + done.stdout + (log.read_text()[-3000:] if log.is_file() else '')
    content = json.loads((tmp_path / 'out/ablation.json').read_text())
    assert content['verdict'] == 'No verdict: 2 seeds in common, 3 are the least.'
    assert [run['folding'] for run in content['runs']] == [None, 'exact', None, 'exact']
    for run in content['runs'][1::2]:
        assert run['folded']['AP'] == run['trained']['AP']
        assert run['folded']['parameters'] == content['runs'][0]['trained']['parameters']
    report = command('report', tmp_path / 'out', '--out', tmp_path / 'report.html')
    assert report.returncode == 0, report.stderr
    assert 'No verdict: 2 seeds in common' in (tmp_path / 'report.html').read_text()
