"""Options of the samplers: further arguments of the schedulers of diffusers, and when to use them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion import Exact, assert_refused, call, config_for, trained
from torch import nn

from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.models.components import Parts, build_parts
from asr_downstream.diffusion.training.task import Denoising
from asr_downstream.errors import AsrError

THRESHOLDING = dict(thresholding=True)


class Young(nn.Module):
    """A model that has learnt nothing: its prediction of the noise is too small by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return type('Output', (), {'sample': self.factor * x})


@pytest.fixture(scope='module')
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    schedule = dict(type='DDPMScheduler', num_train_timesteps=100, beta_schedule='linear', beta_end=0.2)
    return build_parts(config_for(tmp_path_factory.mktemp('run'), noise_scheduler=schedule, plug=None))


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('DPM-Solver++', {'thresholdin': True}, "takes no 'thresholdin'; did you mean 'thresholding'"),
        ('DPM-Solver++', {'prediction_type': 'sample'}, 'prediction_type is what the model was trained with'),
        ('DPM-Solver++', {'beta_end': 0.1}, 'beta_end is what the model was trained with'),
        ('DPM-Solver++', {'thresholding': 'yes'}, "thresholding='yes' should be bool"),
        ('DPM-Solver++', {'dynamic_thresholding_ratio': 2.0}, 'dynamic_thresholding_ratio=2.0 should be at least 0'),
        ('DPM-Solver++', {'solver_type': 'midway'}, 'DPM-Solver.. does not take .*midway'),
        ('DDIM', {'algorithm_type': 'dpmsolver'}, "DDIM takes no 'algorithm_type'"),
    ],
)
def test_options_that_a_sampler_does_not_take_are_refused(
    parts: Parts, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AsrError, match=f'sampler_kwargs: .*{message}'):
        build_sampler(name, parts.scheduler, options)


def test_thresholding_is_for_pixels(parts: Parts) -> None:
    assert build_sampler('DPM-Solver++', parts.scheduler, THRESHOLDING).config.thresholding
    with pytest.raises(AsrError, match='for pixels .*latents are larger'):
        build_sampler('DPM-Solver++', parts.scheduler, THRESHOLDING, latents=True)
    build_sampler('DPM-Solver++', parts.scheduler, dict(use_karras_sigmas=True), latents=True)


def test_thresholding_keeps_pixels_in_range_and_is_hinted_at(parts: Parts) -> None:
    seen = []
    young = Young(0.5).eval()

    def sample(name: str, options: dict[str, Any], model: nn.Module = young) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            seen.append(generate(model, parts, build_sampler(name, parts.scheduler, options), range(4), 10))
        return [str(w.message) for w in caught if 'thresholding' in str(w.message)]

    hints = sample('DPM-Solver++', {})
    assert len(hints) == 1
    assert 'of the pixels lie beyond 1.5' in hints[0]
    assert '--sampler-kwargs thresholding=True' in hints[0]
    assert sample('DPM-Solver++', THRESHOLDING) == []
    assert sample('DDIM', {}) == []  # clips by itself
    assert not torch.equal(seen[0], seen[1])
    alphas = parts.scheduler.alphas_cumprod
    exact = Exact(alphas, 0.3).eval()
    assert sample('DPM-Solver++', {}, exact) == []  # a model that has learnt


def test_configs_and_sample_hand_options_on(tmp_path: Path) -> None:
    config = config_for(tmp_path / 'a', sampler='DPM-Solver++', sampler_kwargs=THRESHOLDING)
    assert Denoising(config, build_parts(config)).sampler.config.thresholding
    config.sampler_kwargs = dict(clip=1)
    parts = build_parts(config)
    with pytest.raises(AsrError, match="takes no 'clip'"):
        Denoising(config, parts)
    run = trained(tmp_path / 'c')
    words = ('diffusion/sample.py', run, '--num-samples', 2, '--steps', 3, '--sampler', 'DPM-Solver++')
    grids = []
    for options in ((), ('--sampler-kwargs', 'thresholding=True')):
        done = call(*words, *options)
        assert done.returncode == 0, done.stderr
        grids.append((run / 'images/grid.png').read_bytes())
    assert grids[0] != grids[1]
    assert_refused(call(*words, '--sampler-kwargs', 'tresholding=True'), "takes no 'tresholding'", 'did you mean')
