"""Folded pipelines that the command pushes to a hub."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from helpers.diffusion import trained
from helpers.hub import Hub, asr_downstream

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp('run') / 'asr', plug=ASR)


def test_a_folded_pipeline_is_pushed_and_what_arrives_is_the_stock_model(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = asr_downstream(hub, 'fold', run, tmp_path / 'shipped', '--push-to-hub', 'user/name', '--license', 'mit')
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith('/commit/1')
    for name, content in hub.files.items():
        path = tmp_path / 'arrived' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert 'license: mit' in (tmp_path / 'arrived/README.md').read_text()
    arrived = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'arrived').unet.state_dict()
    written = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'shipped').unet.state_dict()
    assert arrived.keys() == written.keys()
    assert all(torch.equal(value, written[key]) for key, value in arrived.items())


def test_private_alone_and_repositories_that_are_none_are_refused_before_the_work(hub: Hub, tmp_path: Path) -> None:
    for words, message in (
        (['--private'], '--private goes with --push-to-hub REPO'),
        (['--push-to-hub', 'name'], 'should be USER/NAME'),
    ):
        done = asr_downstream(hub, 'fold', tmp_path, tmp_path / 'shipped', *words)
        assert done.returncode
        assert message in done.stderr
    assert not hub.created
