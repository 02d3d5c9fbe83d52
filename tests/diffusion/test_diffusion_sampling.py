"""Samplers and conditions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.diffusion import ASR, DIT, UNET, Exact, conditional_arguments, config_for, write_images, write_text_encoder

from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.models.build import build_model
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.models.process import Diffusion
from asr_downstream.diffusion.training.task import Denoising
from asr_downstream.engine.state.ema import EMA
from asr_downstream.errors import AsrError
from asr_downstream.modules.seeds import mix

# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sampler', Diffusion.samplers)
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


@pytest.mark.parametrize('sampler', Diffusion.samplers)
@pytest.mark.parametrize('schedule', ['squaredcos_cap_v2', 'linear'])
def test_samplers_find_the_distribution_of_an_exact_model(tmp_path: Path, sampler: str, schedule: str) -> None:
    settings = dict(type='DDPMScheduler', beta_schedule=schedule, clip_sample=False)
    parts = build_parts(config_for(tmp_path, noise_scheduler=settings))
    model = Exact(parts.scheduler.alphas_cumprod, 0.5, wrong=1.01).eval()
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
    config = conditioned(tmp_path, kind)
    parts = build_parts(config)
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
    task = Denoising(config, parts)
    loss, others = task.loss(parts.model, task.prepare(batch))
    assert loss.isfinite()
    assert others == {}
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


def advice(config: Any) -> str:
    """What building the parts of a config is refused with."""
    with pytest.raises(AsrError) as caught:
        build_parts(config)
    return str(caught.value)


def test_following_the_message_on_classes_of_a_dit_ends_in_a_model(tmp_path: Path) -> None:
    labelled = dict(type='ImageFolder', path=str(write_images(tmp_path / 'some')), resolution=8)
    unlabelled = {**labelled, 'path': str(write_images(tmp_path / 'one', classes=('cat',)))}
    dit = dict(type='DiTTransformer2DModel', **{**DIT, 'in_channels': 3, 'out_channels': 3, 'num_embeds_ada_norm': 7})
    labels = dict(type='ClassLabels')
    first = advice(config_for(tmp_path, model=dit, data=labelled, plug=None))
    assert "add condition=dict(type='ClassLabels'), with model.num_embeds_ada_norm=3, or" in first
    build_parts(
        config_for(tmp_path, model={**dit, 'num_embeds_ada_norm': 3}, data=labelled, plug=None, condition=labels)
    )
    # Images without classes: the same advice with and without a condition, and none of it sends back to the other.
    without = advice(config_for(tmp_path, model=dit, data=unlabelled, plug=None))
    assert without == advice(config_for(tmp_path, model=dit, data=unlabelled, plug=None, condition=labels))
    assert 'put each class into a folder' in without
    assert "take type='UNet2DModel'" in without
    assert 'train without condition' not in without
    assert 'out of the model' not in first + without
    unet = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    build_parts(config_for(tmp_path, model=unet, data=unlabelled))


def test_conditions_that_a_model_does_not_take_are_told_before_the_training(tmp_path: Path) -> None:
    text = dict(type='Text', pretrained_model_name_or_path=str(write_text_encoder(tmp_path / 'encoder')))
    dit = dict(type='DiTTransformer2DModel', **{**DIT, 'in_channels': 1, 'out_channels': 1})
    assert 'DiTTransformer2DModel takes no Text' in advice(config_for(tmp_path, model=dit, plug=None, condition=text))
    unet = dict(type='UNet2DConditionModel', **conditional_arguments(channels=1))
    told = advice(config_for(tmp_path, model={**unet, 'num_class_embeds': 10}, condition=dict(type='ClassLabels')))
    assert "UNet2DConditionModel takes no ClassLabels; use condition=dict(type='Text', ...)" in told
    assert 'leave num_class_embeds=10 out' in advice(
        config_for(tmp_path, model={**unet, 'num_class_embeds': 10}, condition=text)
    )


def test_a_plugged_average_goes_through_bytes(tmp_path: Path) -> None:
    model = build_model(config_for(tmp_path, plug=ASR))
    buffer = io.BytesIO()
    torch.save(EMA(model).state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == model.state_dict().keys()
