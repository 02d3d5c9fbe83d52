"""Evaluation and shipping: folded equals unfolded, numbers carry their provenance, what is shipped is stock."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, randomise
from generation import DIA, DIT, UNET, conditional_arguments, config_for, vae, write_images, write_text_encoder
from safetensors.torch import load_file, save_file

from asr_downstream import describe
from asr_downstream.errors import AsrError, CheckpointError, DataError, FoldError
from asr_downstream.generation.comparison import compare_runs
from asr_downstream.generation.draws import mix
from asr_downstream.generation.encoder import load_encoder, train_encoder
from asr_downstream.generation.evaluation import Plan, evaluate_runs
from asr_downstream.generation.folding import compare, fold_run
from asr_downstream.generation.metrics import Distances, build_extractor
from asr_downstream.generation.results import Result, read_results, save_results, tables
from asr_downstream.generation.runs import load_run
from asr_downstream.generation.sampling import build_sampler, generate
from asr_downstream.generation.shipping import fold_and_ship
from asr_downstream.generation.training import train

QUICK = Plan(num_samples=12, steps=3, extractor='', batch_size=12, workers=0)


def trained(folder: Path, **settings: Any) -> Path:
    """A run of one step whose weights, average and gates are random."""
    last = train(config_for(folder, **{'max_train_steps': 1, 'plug': None, **settings}))
    run = load_run(last)
    for name in ('model', 'ema'):
        randomise(run.parts.model)
        for parameter in run.parts.model.parameters():
            parameter.data.mul_(0.7)  # random networks amplify
        rewrite(last, name, run.parts.model.state_dict())
    return last.parent


def rewrite(checkpoint: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Replace a file of weights, and its entry in the manifest."""
    from asr_downstream.files import sha256

    path = checkpoint / f'{name}.safetensors'
    save_file(state, path)
    manifest = json.loads((checkpoint / 'manifest.json').read_text())
    manifest['files'][path.name] = {'bytes': path.stat().st_size, 'sha256': sha256(path)}
    (checkpoint / 'manifest.json').write_text(json.dumps(manifest))


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ASR(SE) run on digits."""
    from generation import ASR

    return trained(tmp_path_factory.mktemp('asr'), plug=ASR)


@pytest.fixture(scope='module')
def shipped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, folded and shipped."""
    out = tmp_path_factory.mktemp('shipped') / 'digits'
    fold_and_ship(load_run(run), out)
    return out


@pytest.fixture(scope='module')
def encoder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of the digits, hardly trained."""
    images = load_run(run, data=True).parts.images
    assert images is not None
    path = tmp_path_factory.mktemp('encoder') / 'encoder.safetensors'
    train_encoder(images, path, steps=20, workers=0)
    return path


# Shipping -------------------------------------------------------------------------------------------------------------


def test_the_folded_pipeline_samples_where_this_package_is_not_installed(
    run: Path, shipped: Path, tmp_path: Path
) -> None:
    home = tmp_path / 'venv'
    venv.create(home, symlinks=True)
    site = next(home.glob('lib/python*/site-packages'))
    (site / 'libraries.pth').write_text(next(p for p in sys.path if p.endswith('site-packages')) + '\n')
    python = str(home / 'bin/python')
    absent = subprocess.run([python, '-c', 'import asr_downstream'], cwd=tmp_path, capture_output=True, text=True)
    assert 'No module named' in absent.stderr
    code = (
        'import sys, torch; from diffusers import DDPMPipeline\n'
        'pipeline = DDPMPipeline.from_pretrained(sys.argv[1])\n'
        'streams = [torch.Generator().manual_seed(int(s)) for s in sys.argv[3:]]\n'
        "images = pipeline(len(streams), streams, num_inference_steps=5, output_type='pt').images\n"
        'assert not any("asr_downstream" in name for name in sys.modules)\n'
        'torch.save(images, sys.argv[2])\n'
    )
    seeds = [str(mix(0, 'image', number)) for number in range(3)]
    done = subprocess.run(
        [python, '-c', code, str(shipped), str(tmp_path / 'images.pt'), *seeds],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = load_run(run)
    expected = generate(ours.parts.model, ours.parts, build_sampler('DDPM', ours.parts.scheduler), range(3), 5)
    found = torch.load(tmp_path / 'images.pt', weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.05


def test_what_is_shipped_is_stock_and_safe(run: Path, shipped: Path) -> None:
    files = {p.relative_to(shipped).as_posix() for p in shipped.rglob('*') if p.is_file()}
    assert files == {
        'README.md', 'fold_report.json', 'model_index.json', 'samples.png', 'scheduler/scheduler_config.json',
        'unet/config.json', 'unet/diffusion_pytorch_model.safetensors',
    }  # fmt: skip
    report = json.loads((shipped / 'fold_report.json').read_text())
    assert report['difference']['float64']['model'] < 1e-10
    assert report['difference']['float32']['model'] < 1e-4
    assert report['difference']['float32']['sample'] < 1e-3
    assert len(report['sites']) == 12
    stock = diffusers.UNet2DModel(**UNET)
    stock.load_state_dict(load_file(shipped / 'unet/diffusion_pytorch_model.safetensors'), strict=True)
    plugged = load_run(run).parts.model
    assert any(not torch.equal(v, plugged.state_dict()[k]) for k, v in stock.state_dict().items())
    card = (shipped / 'README.md').read_text()
    for part in ('library_name: diffusers', 'DDPMPipeline.from_pretrained', 'ASR', 'float64', 'squaredcos_cap_v2'):
        assert part in card
    assert not list(shipped.parent.glob('.*'))


def test_the_code_on_the_card_runs(shipped: Path) -> None:
    code = (shipped / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(shipped)), scope)
    assert len(scope['images']) == 16


def test_folders_of_others_are_not_overwritten(run: Path, shipped: Path, tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    for name in ('thesis.txt', 'fold_report.json'):  # a report that is not of this folder does not help
        (tmp_path / 'mine' / name).write_text('{"files": ["fold_report.json"]}')
        with pytest.raises(AsrError, match='holds .*thesis.txt, which this tool has not written'):
            fold_and_ship(load_run(run), tmp_path / 'mine')
        assert (tmp_path / 'mine/thesis.txt').is_file()
    before = (shipped / 'unet/diffusion_pytorch_model.safetensors').read_bytes()
    fold_and_ship(load_run(run), shipped)  # its own it replaces
    assert (shipped / 'unet/diffusion_pytorch_model.safetensors').read_bytes() == before


def test_a_model_that_differs_after_folding_is_not_shipped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asr_downstream.generation import shipping

    def wrong(of: Any, calibrate: Any) -> Any:
        folded, report = fold_run(of, calibrate)
        folded.conv_in.weight.data.mul_(1.01)
        return folded, report

    monkeypatch.setattr(shipping, 'fold_run', wrong)
    with pytest.raises(FoldError, match='differs by'):
        fold_and_ship(load_run(run), tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_runs_that_cannot_be_folded_or_read_say_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='is no run of diffusion/train.py'):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match='nothing to fold'):
        fold_and_ship(load_run(trained(tmp_path / 'stock')), tmp_path / 'out')
    with pytest.raises(FoldError, match='depend on the input'):
        fold_and_ship(load_run(trained(tmp_path / 'dia', plug=DIA)), tmp_path / 'out')
    with pytest.raises(CheckpointError, match='has no ema.safetensors'):
        load_run(trained_without_average(tmp_path / 'raw'), ema=True)
    raw, average = (load_run(run, ema=e) for e in (False, True))
    assert (raw.ema, average.ema) == (False, True)
    assert raw.sha256 != average.sha256


def trained_without_average(folder: Path) -> Path:
    """A run without EMA."""
    return train(config_for(folder, max_train_steps=1, use_ema=False)).parent


def test_dia_ships_by_calibration(tmp_path: Path) -> None:
    path = trained(tmp_path / 'dia', plug=DIA)
    report = fold_and_ship(load_run(path, data=True), tmp_path / 'out', calibrate=8)
    assert report['difference'] is None
    assert report['calibration']['output_change'] > 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'out')
    assert not describe(pipeline.unet).sites
    assert 'by their mean over training images' in (tmp_path / 'out/README.md').read_text()


# kind -> model class of the shipped pipeline; None: diffusers has no pipeline, its parts are shipped
PIPELINES = {
    'class unet': None,
    'latent dit': 'DiTPipeline',
    'latent text': 'StableDiffusionPipeline',
    'pixel text': None,
}


def conditioned(folder: Path, kind: str) -> dict[str, Any]:
    """Settings of a conditioned run."""
    if kind == 'class unet':
        model = dict(type='UNet2DModel', **UNET, num_class_embeds=10)
        return dict(model=model, condition=dict(type='ClassLabels'))
    vae().save_pretrained(folder / 'vae')
    latent = {} if kind == 'pixel text' else {'vae': dict(pretrained_model_name_or_path=str(folder / 'vae'))}
    images = dict(path=str(write_images(folder / 'images')), resolution=16 if latent else 8)
    if kind == 'latent dit':
        return latent | dict(
            model=dict(type='DiTTransformer2DModel', **DIT),
            data=dict(type='ImageFolder', **images),
            condition=dict(type='ClassLabels', drop=0.1),
        )
    encoder = write_text_encoder(folder / 'encoder')
    lines = [f'{{"file_name": "cat/{n}.png", "text": "a cat"}}' for n in range(4)]
    (folder / 'images/metadata.jsonl').write_text('\n'.join(lines))
    data = dict(
        type='HubDataset', path='imagefolder', data_dir=images['path'], cache_dir=str(folder / 'cache'),
        caption_column='text', resolution=images['resolution'],
    )  # fmt: skip
    return latent | dict(
        model=dict(type='UNet2DConditionModel', **conditional_arguments(channels=4 if latent else 3)),
        data=data,
        condition=dict(type='Text', pretrained_model_name_or_path=str(encoder), prompts=['a cat', 'a dog']),
    )


@pytest.mark.parametrize('kind', PIPELINES)
def test_conditioned_models_ship_as_the_pipeline_of_diffusers(tmp_path: Path, kind: str) -> None:
    from generation import ASR

    path = trained(tmp_path / 'run', **conditioned(tmp_path, kind), plug=ASR)
    out = tmp_path / 'out'
    report = fold_and_ship(load_run(path), out)
    assert report['difference']['float64']['model'] < 1e-10
    name = PIPELINES[kind]
    assert not list(out.rglob('*.bin')) + list(out.rglob('*.pt'))
    code = (out / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    assert report['pipeline'] is (name is not None)
    scope: dict[str, Any] = {}
    exec(code.replace('THIS FOLDER', str(out)), scope)
    assert len(scope['images']) == (4 if name is None else 1)
    if name is not None:
        assert type(scope['pipeline']).__name__ == name
        trained_with = load_run(path).parts.scheduler.config
        for key in ('clip_sample', 'steps_offset', 'prediction_type', 'beta_schedule'):  # pipelines rewrite some
            assert scope['pipeline'].scheduler.config[key] == trained_with[key]


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of diffusion/."""
    command = [sys.executable, '-W', 'ignore', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_tool_folds_a_run_and_refuses_options_of_detectors(run: Path, tmp_path: Path, tool: Any) -> None:
    done = tool('fold', run, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert 'a pipeline of diffusers, model card' in done.stdout
    done = tool('fold', run, tmp_path / 'out', '--data-root', tmp_path)
    assert done.returncode == 2
    assert '--data-root is for a detector' in done.stderr


@pytest.mark.slow
def test_scripts_sample_and_evaluate(run: Path, encoder: Path, tmp_path: Path) -> None:
    options = ('--num-samples', 5, '--steps', 2, '--single', '--fold')
    done = script('diffusion/sample.py', run, '--out', tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert '5 images of step 1, averaged weights, DDIM, 2 steps' in done.stdout
    assert sorted(p.name for p in tmp_path.glob('*.png')) == [*(f'00000{n}.png' for n in range(5)), 'grid.png']
    options = ('--num-samples', 6, '--steps', 2, '--extractor', encoder, '--workers', 0)
    done = script('diffusion/evaluate.py', run, '--fold', *options)
    assert done.returncode == 0, done.stderr
    for part in ('unfolded', '│ folded', 'sampler DDIM, steps 2'):
        assert part in done.stdout


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_formulas() -> None:
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(400, 6)), generator.normal(0.3, 1.2, size=(300, 6))
    found = Distances(torch.tensor(real), ('fid', 'kid')).to(torch.tensor(fake))
    from scipy.linalg import sqrtm

    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    means = real.mean(0) - fake.mean(0)
    fid = means @ means + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert found['fid'] == pytest.approx(fid, rel=1e-6)

    def kernel(x: Any, y: Any) -> Any:
        return (x @ y.T / 6 + 1) ** 3

    def unbiased(x: Any, y: Any) -> float:
        n, m = len(x), len(y)
        xx, yy = kernel(x, x), kernel(y, y)
        return (
            (xx.sum() - np.trace(xx)) / (n * (n - 1))
            + (yy.sum() - np.trace(yy)) / (m * (m - 1))
            - 2 * kernel(x, y).mean()
        )

    assert found['kid'] == pytest.approx(unbiased(real, fake), abs=3 * found['kid_std'] / 10 + 1e-3)
    again = Distances(torch.tensor(real), ('fid', 'kid')).to(torch.tensor(fake))
    assert again == found
    with pytest.raises(DataError, match='too few'):
        Distances(torch.tensor(real), ('fid',)).to(torch.tensor(fake[:1]))
    with pytest.raises(AsrError, match="'is'"):
        Distances(torch.tensor(real), ('is',))


def test_folded_and_unfolded_have_the_same_numbers(run: Path, encoder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / 'run', ignore=shutil.ignore_patterns('evaluation.json')))
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'exact'})
    unfolded, folded = evaluate_runs([run], plan)
    assert folded.numbers['fid'] == pytest.approx(unfolded.numbers['fid'], rel=1e-3)
    assert folded.numbers['pixels'] < 0.1
    assert folded.numbers['parameters'] < unfolded.numbers['parameters']
    assert folded.numbers['gmacs'] == pytest.approx(unfolded.numbers['gmacs'], rel=0.01)
    assert folded.provenance == unfolded.provenance
    assert {r.arm for r in read_results(run)} == {'unfolded', 'folded'}
    evaluate_runs([run], plan)
    assert len(read_results(run)) == 2  # the same again replaces
    assert (run / 'evaluation/folded-1.png').is_file()
    other = evaluate_runs([run], Plan(**{**vars(plan), 'seed': 1, 'fold': None}))
    assert other[0].numbers['fid'] != unfolded.numbers['fid']
    text = tables(read_results(run))
    assert text.count('FID') == 2  # another seed, another table
    assert 'seed 0' in text
    assert 'seed 1' in text


def test_stock_and_plugged_runs_are_evaluated_together(run: Path, encoder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / 'run'))
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'exact'})
    found = evaluate_runs([trained(tmp_path / 'stock'), run], plan)
    assert [result.arm for result in found] == ['unfolded', 'unfolded', 'folded']
    assert len({str(result.provenance) for result in found}) == 1


def test_other_images_are_another_provenance(tmp_path: Path, encoder: Path) -> None:
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    paths = []
    for number in (1, 2):
        folder = write_images(tmp_path / str(number) / 'train')
        if number == 2:
            shutil.copy(folder / 'cat/0.png', folder / 'cat/1.png')
        data = dict(type='ImageFolder', path=str(folder), resolution=8)
        paths.append(trained(tmp_path / f'run{number}', model=model, data=data))
    a, b = evaluate_runs(paths, Plan(**{**vars(QUICK), 'extractor': str(encoder)}))
    assert a.provenance['real'] != b.provenance['real']
    alone = evaluate_runs(paths[1:], Plan(**{**vars(QUICK), 'extractor': str(encoder)}))[0]
    assert alone.numbers['fid'] == b.numbers['fid']


def test_runs_are_compared_in_pictures_and_tables(run: Path, encoder: Path, tmp_path: Path) -> None:
    options = dict(max_train_steps=4, checkpointing_steps=2, validation_steps=2, num_validation_images=4)
    other = train(config_for(tmp_path / 'other', num_inference_steps=2, **options)).parent
    evaluate_runs([other / 'checkpoint-2', other], Plan(**{**vars(QUICK), 'extractor': str(encoder)}))
    text = compare_runs([other], tmp_path / 'out')
    assert text.count('unfolded') == 2
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'curves.png', 'samples.png', 'results.json'}
    content = json.loads((tmp_path / 'out/results.json').read_text())
    assert [row['step'] for row in content['results']] == [2, 4]
    assert content['loss']['run'][-1][0] == 4
    compare_runs([other, run], tmp_path / 'both')  # the second has no samples: no picture of them
    assert not (tmp_path / 'both/samples.png').exists()
    with pytest.raises(AsrError, match='has no log.jsonl'):
        compare_runs([tmp_path], tmp_path / 'none')


def test_calibrated_folding_is_evaluated_beside_the_model(tmp_path: Path, encoder: Path) -> None:
    path = trained(tmp_path, plug=DIA)
    plan = Plan(**{**vars(QUICK), 'extractor': str(encoder), 'fold': 'calibrated', 'calibrate': 8})
    unfolded, calibrated = evaluate_runs([path], plan)
    assert calibrated.arm == 'calibrated on 8'
    assert calibrated.numbers['pixels'] > unfolded.numbers.get('pixels', 0)
    assert calibrated.numbers['parameters'] < unfolded.numbers['parameters']


@pytest.mark.parametrize('key', ['images', 'sampler', 'steps', 'seed', 'ema', 'extractor', 'versions'])
def test_numbers_of_different_provenance_never_share_a_table(tmp_path: Path, key: str) -> None:
    base = {
        'images': 100, 'sampler': 'DDIM', 'steps': 50, 'seed': 0, 'ema': True, 'extractor': 'e', 'versions': {'t': '1'},
    }  # fmt: skip
    changed = {**base, key: {'t': '2'} if key == 'versions' else 'other'}
    results = [Result('r', arm, 1, 'w', p, {'fid': 1.0}) for arm, p in (('a', base), ('b', changed), ('c', base))]
    save_results(tmp_path, results)
    assert read_results(tmp_path) == results
    parts = tables(results).split('\n\n')
    assert len(parts) == 2
    assert '│ a ' in parts[0]
    assert '│ c ' in parts[0]
    assert '│ b ' in parts[1]


def test_the_encoder_learns_and_is_the_same_each_time(run: Path, encoder: Path, tmp_path: Path) -> None:
    images = load_run(run, data=True).parts.images
    assert images is not None
    again = train_encoder(images, tmp_path / 'e.safetensors', steps=20, workers=0)
    assert again.identity == load_encoder(encoder).identity
    assert again.about['task'] == 'classes'
    longer = train_encoder(images, tmp_path / 'l.safetensors', steps=60, workers=0)
    assert longer.about['accuracy_held_out'] > 0.6  # chance: 0.1
    assert longer.identity != again.identity
    images.source.labels = None
    assert train_encoder(images, tmp_path / 'r.safetensors', steps=2, workers=0).about['task'] == 'rotations'
    (tmp_path / 'l.safetensors').write_bytes((tmp_path / 'l.safetensors').read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='damaged|is no encoder'):
        load_encoder(tmp_path / 'l.safetensors')


def test_inception_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AsrError, match='no such file'):
        build_extractor(f'inception:{tmp_path}/nothing.pth')
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(AsrError, match='needs torch-fidelity and torchvision'):
            build_extractor('inception')


def test_real_images_that_cannot_be_decoded_are_refused(tmp_path: Path, encoder: Path) -> None:
    folder = write_images(tmp_path / 'images')
    (folder / 'dog/1.png').write_text('hello')
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    data = dict(type='ImageFolder', path=str(folder), resolution=8, max_bad_share=0.5)
    path = trained(tmp_path / 'run', model=model, data=data)
    with pytest.raises(DataError, match=r'dog/1\.png: cannot be decoded'):
        evaluate_runs([path], Plan(**{**vars(QUICK), 'extractor': str(encoder)}))
    done = script('diffusion/evaluate.py', path, '--extractor', encoder, '--steps', 2)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {folder}/dog/1.png: cannot be decoded')  # by a worker


def test_compare_sees_a_difference(run: Path) -> None:
    ours = load_run(run)
    folded, _ = fold_run(ours)
    assert compare(ours, folded)['float32']['model'] < 1e-5
    folded.down_blocks[0].resnets[0].conv2.weight.data.mul_(1.1)
    with pytest.raises(FoldError, match='in float32'):
        compare(ours, folded)
