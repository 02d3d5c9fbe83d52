"""Draws, images, objective, average, sampling: the parts of a diffusion training."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from generation import ASR, DIT, UNET, conditional_arguments, config_for, write_config, write_images, write_text_encoder
from PIL import Image
from torch import nn

from asr_downstream.errors import AsrError, CheckpointError, DataError
from asr_downstream.generation.config import load_config
from asr_downstream.generation.data import BadFiles, Samples, build_images
from asr_downstream.generation.draws import Draws, mix
from asr_downstream.generation.ema import EMA
from asr_downstream.generation.models import build_model, build_scheduler
from asr_downstream.generation.objective import denoising_loss, snr_weights, target_of
from asr_downstream.generation.parts import build_parts
from asr_downstream.generation.sampling import SAMPLERS, build_sampler, generate

DIGITS = {'type': 'Digits', 'resolution': 8}


# Draws ----------------------------------------------------------------------------------------------------------------


def drawn(steps: range, batch: int = 4, accumulation: int = 1, rank: int = 0, world: int = 1) -> list[Any]:
    draws = Draws(10, batch, accumulation, steps, 0, rank, world)
    found = list(draws)
    assert len(found) == len(draws)
    return found


def test_every_epoch_shows_every_image_once() -> None:
    order = [index for batch in drawn(range(5)) for index, _ in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_a_later_start_continues_the_same_sequence() -> None:
    assert drawn(range(7))[3:] == drawn(range(3, 7))
    assert drawn(range(6), accumulation=2)[4:] == drawn(range(2, 6), accumulation=2)


def test_processes_and_accumulation_share_the_batch_of_one_process() -> None:
    whole = drawn(range(4))
    ranks = [drawn(range(4), batch=2, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    halves = drawn(range(4), batch=2, accumulation=2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole


def test_samples_depend_on_their_number_alone() -> None:
    images = build_images({**DIGITS, 'random_flip': True}, 1)
    samples = Samples(images, (1, 8, 8), 1000, seed=0)
    one, again, other = samples[3, 5], samples[3, 5], samples[3, 6]
    for key in ('image', 'noise', 'timestep'):
        assert torch.equal(one[key], again[key])
    assert not torch.equal(one['noise'], other['noise'])
    assert not torch.equal(one['noise'], Samples(images, (1, 8, 8), 1000, seed=1)[3, 5]['noise'])
    flips = {torch.equal(samples[3, n]['image'], images[3]) for n in range(20)}
    assert flips == {True, False}


# Images ---------------------------------------------------------------------------------------------------------------


def zipped(folder: Path) -> Path:
    path = folder.with_suffix('.zip')
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*.png')):
            archive.write(file, file.relative_to(folder))
        archive.writestr('__MACOSX/cat/._0.png', b'not an image')
        archive.writestr('README.txt', 'hello')
    return path


def test_folder_zip_and_data_set_give_the_same_images_and_classes(tmp_path: Path) -> None:
    pytest.importorskip('datasets')
    folder = write_images(tmp_path / 'images')
    sources = [
        {'type': 'ImageFolder', 'path': str(folder)},
        {'type': 'Zip', 'path': str(zipped(folder))},
        {'type': 'HubDataset', 'path': 'imagefolder', 'data_dir': str(folder), 'cache_dir': str(tmp_path / 'cache')},
    ]
    found = [build_images({**source, 'resolution': 8}, 3) for source in sources]
    for images in found:
        assert images.source.classes == ('cat', 'dog', 'owl')
        assert images.source.labels == [0] * 4 + [1] * 4 + [2] * 4
        assert images[5].shape == (3, 8, 8)
        assert torch.equal(images[5], found[0][5])
        assert -1 <= images[5].min() < images[5].max() <= 1
    assert found[1].source.name(5).endswith('images.zip/dog/1.png')


def test_the_middle_is_cut_out_and_grey_levels_stay() -> None:
    images = build_images(DIGITS, 1)
    pixels = (images[0] + 1) * 127.5
    torch.testing.assert_close(pixels[0], torch.from_numpy(np.asarray(images.source.read(0), np.float32)))
    wide = Image.fromarray(np.repeat(np.arange(24, dtype=np.uint8)[None], 8, 0))
    images.source.read = lambda index: wide  # type: ignore[method-assign]
    torch.testing.assert_close((images[0][0, 0] + 1) * 127.5, torch.arange(8.0, 16.0))


@pytest.mark.parametrize('damage', ['text', 'cut'])
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_undecodable_files_are_named_counted_and_limited(tmp_path: Path, damage: str, kind: str) -> None:
    folder = write_images(tmp_path / 'images')
    bad = folder / 'dog' / '2.png'
    bad.write_bytes(b'hello' if damage == 'text' else bad.read_bytes()[:300])
    spec = {'type': 'ImageFolder', 'path': str(folder)}
    if kind == 'zip':
        spec = {'type': 'Zip', 'path': str(zipped(folder))}
    images = build_images({**spec, 'resolution': 8, 'max_bad_share': 0.1}, 3)
    with pytest.raises(DataError, match=r'dog/2\.png: cannot be decoded'):
        images[6]
    item = Samples(images, (3, 8, 8), 10, 0)[6, 0]
    assert item['bad'] == 6
    assert torch.equal(item['image'], images[7])
    lines: list[str] = []
    files = BadFiles(images, lines.append)
    files.add([-1, 6, 6])
    files.add([6])
    assert len(lines) == 1
    assert 'dog/2.png' in lines[0]
    assert '1 of 12 images' in str(files)
    files.check()
    files.add([3])
    with pytest.raises(DataError, match='2 of 12 images cannot be decoded.*max_bad_share'):
        files.check()


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'type': 'ImageFolder', 'path': 'nowhere', 'resolution': 8}, 'no such image folder'),
        ({'type': 'Zip', 'path': 'nowhere.zip', 'resolution': 8}, 'no such zip'),
        ({'type': 'Zip', 'path': 'README.md', 'resolution': 8}, 'is no zip file'),
        ({'type': 'ImageFolder', 'path': 'tests', 'resolution': 8}, 'has no images'),
        ({'type': 'Imagefolder', 'path': 'tests', 'resolution': 8}, "did you mean 'ImageFolder'"),
        ({'type': 'Digits'}, 'has no resolution'),
        ({'type': 'Digits', 'resolution': 8, 'colour': 1}, 'colour'),
        ({'type': 'HubDataset', 'path': '/nowhere', 'resolution': 8}, 'cannot be loaded by datasets'),
    ],
)
def test_data_that_is_not_there_is_an_error(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(AsrError, match=message):
        build_images(spec, 1)


def test_damaged_archives_and_sixteen_bits(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'images', classes=('a',), each=1)
    path = tmp_path / 'deflated.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.bmp', (folder / 'a/0.png').read_bytes() + bytes(5000))
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'a\.bmp: cannot be decoded'):
        build_images({'type': 'Zip', 'path': str(path), 'resolution': 8}, 3)[0]
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / 'deep.png')
    deep = build_images({'type': 'ImageFolder', 'path': str(tmp_path), 'resolution': 8}, 1)
    image = next(deep[i] for i in range(len(deep)) if deep.source.name(i).endswith('deep.png'))
    torch.testing.assert_close((image[0] + 1) / 2, torch.from_numpy(levels / 65535).float(), rtol=0, atol=0.003)


# Objective ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('gamma', [None, 5.0])
def test_loss_is_that_of_the_formulas(prediction: str, gamma: float | None) -> None:
    scheduler = build_scheduler(
        dict(type='DDPMScheduler', num_train_timesteps=100, beta_schedule='linear', prediction_type=prediction)
    )
    clean, noise, output = torch.randn(3, 4, 1, 8, 8).unbind()
    t = torch.tensor([0, 20, 60, 99])
    alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    seen = {}

    class Model:
        def __call__(self, x: Any, timesteps: Any, **condition: Any) -> Any:
            seen['x'] = x
            return type('Output', (), {'sample': output})

    batch = {'image': clean, 'noise': noise, 'timestep': t}
    loss = denoising_loss(Model(), scheduler, batch, {}, gamma)
    torch.testing.assert_close(seen['x'], alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    target = {
        'epsilon': noise,
        'sample': clean,
        'v_prediction': alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
    }[prediction]
    torch.testing.assert_close(target_of(scheduler, clean, noise, t), target)
    snr = (alpha / (1 - alpha)).flatten()
    weights = torch.ones(4)
    if gamma is not None:
        weights = snr.clamp(max=gamma) / {'epsilon': snr, 'sample': 1, 'v_prediction': snr + 1}[prediction]
        torch.testing.assert_close(snr_weights(scheduler, t, gamma), weights, rtol=1e-5, atol=1e-7)
    expected = (weights * (output - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


# Average --------------------------------------------------------------------------------------------------------------


def test_average_follows_the_recursion_by_name_with_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(model, max_decay=0.9, inv_gamma=1.0, power=0.75)
    mean = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(1, 40):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1) if not value.is_floating_point() else value.normal_()
        ema.update(model, step)
        decay = min(0.9, 1 - (1 + (step - 1)) ** -0.75)
        for key, value in model.state_dict().items():
            mean[key] = decay * mean[key] + (1 - decay) * value if value.is_floating_point() else value.clone()
    assert ema.state.keys() == model.state_dict().keys()
    for key, value in mean.items():
        torch.testing.assert_close(ema.state[key], value, msg=key)


def test_average_is_applied_for_a_block_only_and_refuses_other_names() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    ema.state['weight'] += 1
    with pytest.raises(ZeroDivisionError), ema.applied_to(model):
        assert 1 / int(torch.equal(model.weight, own['weight']))
    assert torch.equal(model.weight, own['weight'])
    with pytest.raises(CheckpointError, match='names of the weights differ: bias'):
        EMA(nn.Linear(3, 2, bias=False)).update(model, 1)
    with pytest.raises(CheckpointError, match='names of the weights differ'):
        ema.load({'weight': own['weight']})


# Config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'learning_rat': 1}, "did you mean 'learning_rate'"),
        ({'learning_rate': 'fast'}, "learning_rate='fast' should be float"),
        ({'use_ema': 1}, 'use_ema=1 should be bool'),
        ({'train_batch_size': True}, 'should be int'),
        ({'max_train_steps': 0}, 'should be greater than 0'),
        ({'mixed_precision': 'bf61'}, "did you mean 'bf16'"),
        ({'sampler': 'PNDM'}, 'not known'),
        ({'lr_scheduler': 'cosin'}, "did you mean 'cosine'"),
        ({'num_validation_images': 0}, 'should be greater than 0'),
        ({'report_to': ['mlflow']}, "use 'tensorboard', 'wandb'"),
    ],
)
def test_configs_are_checked_before_anything_is_built(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        load_config(write_config(tmp_path), options)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'model': {'type': 'UNet3D'}}, "did you mean 'UNet2DModel'"),
        ({'model': {'type': 'UNet2DModel', 'widths': 3}}, "takes no 'widths'"),
        ({'model': {'type': 'UNet2DModel', 'pretrained_model_name_or_path': '/nowhere'}}, 'cannot be made from'),
        ({'model': {'type': 'UNet2DModel', **UNET, 'out_channels': 2}}, 'should equal in_channels=1'),
        ({'data': {'type': 'Digits', 'resolution': 16}}, 'resolution=16 does not fit model.sample_size=8'),
        ({'noise_scheduler': {'type': 'PNDMScheduler'}}, 'is not one that is trained here'),
        ({'condition': {'type': 'ClassLabels'}}, 'model.num_class_embeds=None should be 10'),
        (
            {
                'condition': {'type': 'ClassLabels', 'drop': 0.1},
                'model': dict(type='UNet2DModel', **UNET, num_class_embeds=10),
            },
            'should be 11 .*one for no class',
        ),
        ({'model': dict(type='UNet2DModel', **UNET, num_class_embeds=10)}, 'the config has no condition'),
        ({'vae': {'pretrained_model_name_or_path': '/nowhere'}}, 'vae: .* cannot be loaded'),
        ({'noise_scheduler': {'type': 'DDPMScheduler', 'prediction_type': 'eps'}}, "did you mean 'epsilon'"),
        ({'guidance_scale': 3.0}, 'needs a condition with drop > 0'),
        ({'validation_steps': 5, 'num_inference_steps': 200}, 'should be at most 100'),
        ({'condition': {'type': 'ClassLabels', 'drop': 10}}, 'should be a share'),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        build_parts(config_for(tmp_path, **settings))


def test_data_is_found_under_the_root_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / 'birds')
    path = write_config(tmp_path, data={'type': 'ImageFolder', 'path': 'data/birds', 'resolution': 8})
    monkeypatch.setenv('ASR_DATA_ROOT', str(tmp_path))
    assert load_config(path).data.path == str(tmp_path / 'birds')
    assert load_config(path, data=tmp_path).data.path == str(tmp_path)
    with pytest.raises(DataError, match='no such image folder or zip'):
        load_config(path, data=tmp_path / 'nothing')


def test_stock_and_plugged_model_of_a_seed_have_the_same_weights(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    stock, plugged = build_model(config, plugged=False).state_dict(), build_model(config).state_dict()
    assert stock.keys() < plugged.keys()
    assert all(torch.equal(value, plugged[key]) for key, value in stock.items())


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_an_image_does_not_depend_on_its_batch(tmp_path: Path, sampler: str, prediction: str) -> None:
    scheduler = dict(type='DDPMScheduler', num_train_timesteps=100, prediction_type=prediction)
    parts = build_parts(config_for(tmp_path, noise_scheduler=scheduler))
    parts.model.eval()
    build = build_sampler(sampler, parts.scheduler)
    whole = generate(parts.model, parts, build, range(5), 4)
    assert whole.shape == (5, 1, 8, 8)
    assert 0 <= whole.min() < whole.max() <= 1
    split = generate(parts.model, parts, build, [4, 1], 4, batch_size=1)
    torch.testing.assert_close(split, whole[[4, 1]], rtol=0, atol=1e-5)
    assert (generate(parts.model, parts, build, range(5), 4, seed=1) - whole).abs().max() > 0.1


class Exact(nn.Module):
    """The noise of a Gaussian with standard deviation 0.5, in closed form, wrong by a hundredth."""

    def __init__(self, alphas: torch.Tensor) -> None:
        super().__init__()
        self.alphas = nn.Parameter(alphas)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        a = self.alphas[t].view(-1, 1, 1, 1)
        noise = x * (1 - a).sqrt() / (0.25 * a + 1 - a)
        return type('Output', (), {'sample': noise * 1.01})


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('schedule', ['squaredcos_cap_v2', 'linear'])
def test_samplers_find_the_distribution_of_an_exact_model(tmp_path: Path, sampler: str, schedule: str) -> None:
    settings = dict(type='DDPMScheduler', beta_schedule=schedule, clip_sample=False)
    parts = build_parts(config_for(tmp_path, noise_scheduler=settings))
    model = Exact(parts.scheduler.alphas_cumprod).eval()
    images = generate(
        model, parts, build_sampler(sampler, parts.scheduler), range(32), 100 if sampler == 'DDPM' else 20
    )
    inside = images[(images > 0) & (images < 1)]  # the rest is cut off
    expected = (torch.randn(100_000) * 0.5 / 2 + 0.5).clamp(0, 1)
    assert float(images.std()) == pytest.approx(float(expected.std()), rel=0.15)
    assert len(inside) / images.numel() > 0.9


def test_sampling_is_that_of_the_pipeline_of_diffusers(tmp_path: Path) -> None:
    parts = build_parts(config_for(tmp_path))
    model = parts.model.eval()
    ours = generate(model, parts, build_sampler('DDPM', parts.scheduler), range(3), 10)
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=build_sampler('DDPM', parts.scheduler))
    pipeline.set_progress_bar_config(disable=True)
    streams = [torch.Generator().manual_seed(mix(0, 'image', n)) for n in range(3)]
    theirs = pipeline(3, streams, num_inference_steps=10, output_type='pt').images
    torch.testing.assert_close(ours, theirs)


def test_sampling_refuses_training_mode_and_wrong_numbers(tmp_path: Path) -> None:
    parts = build_parts(config_for(tmp_path))
    sampler = build_sampler('DDIM', parts.scheduler)
    with pytest.raises(AsrError, match='training mode'):
        generate(parts.model.train(), parts, sampler, [0], 4)
    with pytest.raises(AsrError, match='between 1 and 100'):
        generate(parts.model.eval(), parts, sampler, [0], 101)
    with pytest.raises(AsrError, match='drop > 0'):
        generate(parts.model, parts, sampler, [0], 4, guidance_scale=2)
    with pytest.raises(AsrError, match="did you mean 'DDIM'"):
        build_sampler('ddim', parts.scheduler)


# Conditions -----------------------------------------------------------------------------------------------------------


def conditioned(folder: Path, kind: str) -> Any:
    """Parts of a class- or text-conditioned run."""
    if kind == 'unet':
        return config_for(
            folder,
            model=dict(type='UNet2DModel', **UNET, num_class_embeds=11),
            condition=dict(type='ClassLabels', drop=0.5),
        )
    if kind == 'dit':
        return config_for(
            folder,
            model=dict(type='DiTTransformer2DModel', **{**DIT, 'in_channels': 3, 'out_channels': 3}),
            data=dict(type='ImageFolder', path=str(write_images(folder / 'images')), resolution=8),
            condition=dict(type='ClassLabels', drop=0.5),
        )
    encoder = str(write_text_encoder(folder / 'encoder'))
    rows = write_images(folder / 'images', classes=('a',))
    lines = [f'{{"file_name": "a/{n}.png", "text": "{"abc"[: n or 1]}"}}' for n in range(4)]
    (rows / 'metadata.jsonl').write_text('\n'.join(lines))
    return config_for(
        folder,
        model=dict(type='UNet2DConditionModel', **conditional_arguments(channels=3)),
        data=dict(
            type='HubDataset', path='imagefolder', data_dir=str(rows), cache_dir=str(folder / 'cache'),
            caption_column='text', resolution=8,
        ),
        condition=dict(type='Text', pretrained_model_name_or_path=encoder, drop=0.5),
    )  # fmt: skip


@pytest.mark.parametrize('kind', ['unet', 'dit', 'text'])
def test_conditions_reach_the_model_and_are_dropped(tmp_path: Path, kind: str) -> None:
    parts = build_parts(conditioned(tmp_path, kind))
    samples = parts.samples()
    items = [samples[i, i] for i in range(4)]
    batch = {k: torch.stack([item[k] for item in items]) for k in ('image', 'noise', 'timestep', 'label', 'chance')}
    batch['chance'] = torch.tensor([0.0, 0.4, 0.6, 0.9])
    arguments = parts.conditioned(batch)
    kept, without = parts.condition.arguments(batch['label']), parts.condition.arguments(
        batch['label'], torch.ones(4, dtype=torch.bool)
    )  # fmt: skip
    for key, value in arguments.items():
        assert torch.equal(value[2:], kept[key][2:])
        assert torch.equal(value[:2], without[key][:2])
        assert not torch.equal(kept[key], without[key])
    loss = denoising_loss(parts.model, parts.scheduler, batch, arguments, None)
    assert loss.isfinite()
    model = parts.model.eval()
    sampler = build_sampler('DDIM', parts.scheduler)
    plain = generate(model, parts, sampler, range(2), 4)
    guided = generate(model, parts, sampler, range(2), 4, guidance_scale=3)
    assert plain.shape == guided.shape == (2, *parts.shape)
    if kind != 'dit':  # a fresh DiT starts with every branch at zero
        assert (plain - guided).abs().max() > 1e-6


def test_classes_and_prompts_can_be_chosen(tmp_path: Path) -> None:
    parts = build_parts(conditioned(tmp_path / 'a', 'unet'))
    parts.condition.choose(['7', '2'])
    assert parts.condition.of_samples(range(3)).tolist() == [7, 2, 7]
    with pytest.raises(AsrError, match="'x' is not a class"):
        parts.condition.choose(['x'])
    with pytest.raises(AsrError, match='has no condition'):
        build_parts(config_for(tmp_path / 'b')).condition.choose(['7'])
    text = build_parts(conditioned(tmp_path / 'c', 'text')).condition
    text.choose(['b c'])
    assert (text.caption(0), text.caption(5)) == ('b c', 'b c')


def test_a_transformer_drops_no_labels_by_itself(tmp_path: Path) -> None:
    parts = build_parts(conditioned(tmp_path, 'dit'))
    model = parts.model.train()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    inputs = parts.inputs(8)
    torch.testing.assert_close(model(**inputs).sample, model(**inputs).sample, rtol=0, atol=0)


def test_class_names_are_checked_against_the_data(tmp_path: Path) -> None:
    config = conditioned(tmp_path, 'unet')
    config.condition.classes = list('012345678x')
    with pytest.raises(AsrError, match='the data has the classes'):
        build_parts(config)
    assert build_parts(config, data=False).condition.caption(9) == 'x'


def test_a_plugged_average_goes_through_bytes(tmp_path: Path) -> None:
    model = build_model(config_for(tmp_path, plug=ASR))
    buffer = io.BytesIO()
    torch.save(EMA(model).state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == model.state_dict().keys()
