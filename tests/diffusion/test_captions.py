"""Captions of sample grids: which class or prompt each image shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from helpers.diffusion import UNET, call, config_for
from PIL import Image
from safetensors.torch import save_file

from asr_downstream.diffusion.evaluation import pictures
from asr_downstream.diffusion.evaluation.encoder import FILE, Encoder
from asr_downstream.diffusion.evaluation.evaluate import Plan, evaluate_runs, order_of
from asr_downstream.diffusion.evaluation.pictures import LINES, caption_font, grid, wrapped
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.errors import AsrError

CLASSES = dict(
    model=dict(type='UNet2DModel', **UNET, num_class_embeds=10), condition=dict(type='ClassLabels'), plug=None
)


@pytest.mark.parametrize('size', [8, 64, 300])
def test_captions_are_beside_the_images_and_change_none(size: int) -> None:
    images, captions = torch.rand(5, 3, size, size), ['cat', 'dog', 'owl', '', 'a b']
    plain, captioned = np.asarray(grid(images, 3)), np.asarray(grid(images, 3, captions=captions))
    side = (plain.shape[1] + 2) // 3 - 2
    strip = sum(caption_font(side).getmetrics())
    assert captioned.shape == (2 * (side + strip) + 2, *plain.shape[1:])
    for number, caption in enumerate(captions):
        row, column = divmod(number, 3)
        x, y, below = column * (side + 2), row * (side + 2), row * (side + strip + 2)
        assert np.array_equal(plain[y : y + side, x : x + side], captioned[below : below + side, x : x + side])
        written = captioned[below + side : below + side + strip, x : x + side]
        assert (written.min() < 64) == bool(caption)  # dark on white
        assert written.max() == 255
    assert np.array_equal(plain, np.asarray(grid(images, 3, captions=[''] * 5)))


def test_texts_are_wrapped_to_the_width_and_cut() -> None:
    font = caption_font(64)
    prompt = 'a photograph of an astronaut who rides a horse on the moon'
    for text in (prompt, 'x' * 100, 'two  \n words', '漢字' * 40, 'W' * 8):
        lines = wrapped(text, font, 64)
        assert 1 <= len(lines) <= LINES
        assert all(font.getlength(line) <= 64 for line in lines)
        whole = ''.join(lines).replace(' ', '')
        assert ''.join(text.split()).startswith(whole.removesuffix('…'))
        assert (whole == ''.join(text.split())) != whole.endswith('…')
    assert wrapped(' ', font, 64) == []
    assert wrapped('W', font, 1) == ['W']


def test_trainings_samples_and_evaluations_caption_their_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(images: torch.Tensor, *args: object, captions: object = (), **kwargs: object) -> Image.Image:
        seen.append((len(images), list(captions)))  # type: ignore[call-overload]
        return grid(images, *args, captions=captions, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures, 'grid', spy)
    monkeypatch.setattr('asr_downstream.diffusion.training.task.grid', spy)
    settings = dict(validation_steps=1, max_train_steps=1, num_validation_images=4, num_inference_steps=2)
    train(config_for(tmp_path, report_to=['tensorboard'], **settings, **CLASSES))
    assert seen == [(4, list('0123'))] * 2  # the file and the back ends
    assert Image.open(tmp_path / 'run/samples/step-0000001.png').height > 2 * 64 + 2
    seen.clear()
    done = call('diffusion/sample.py', tmp_path / 'run', '--num-samples', 3, '--show', '7', '2', '--steps', 2)
    assert done.returncode == 0, done.stderr
    assert seen == [(3, ['7', '2', '7'])]
    seen.clear()
    save_file(randomise(Encoder(classes=10)).state_dict(), tmp_path / 'run' / FILE, {'about': '{}'})
    plan = Plan(
        ('fid',), 4, 'DPM-Solver++', {'thresholding': True}, steps=2, batch_size=4, workers=0, seed=3,
    )  # fmt: skip
    (result,) = evaluate_runs([tmp_path / 'run'], plan)
    assert result.provenance['sampler'] == 'DPM-Solver++(thresholding=True)'
    run = load_run(tmp_path / 'run', data=True)
    drawn = run.parts.condition.like_data(range(4), order_of(run, plan)).tolist()
    assert seen == [(4, [str(label) for label in drawn])]
    assert drawn != [0, 1, 2, 3]  # as in the data, not in turn
    with pytest.raises(AsrError, match="DPM-Solver\\+\\+ takes no 'tresholding'; did you mean 'thresholding'"):
        evaluate_runs([tmp_path / 'run'], replace(plan, sampler_kwargs={'tresholding': True}))
