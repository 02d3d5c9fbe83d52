"""Folded models as ONNX and torch.export: what is written computes what torch computes, or is not written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, command, randomise
from helpers import exports

from asr_downstream.commands.exporting import formats
from asr_downstream.commands.exporting.kinds import kind_of
from asr_downstream.commands.exporting.kinds.base import Request
from asr_downstream.commands.exporting.run import export
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import sha256

onnx = pytest.importorskip('onnx', reason='needs the extra export')
pytest.importorskip('onnxscript', reason='needs the extra export')
runtime = pytest.importorskip('onnxruntime', reason='needs the extra export')
pytest.importorskip('diffusers')

MADE = {'classifier': exports.classifier}
SLOW = {'pipeline': exports.pipeline, 'FAR ViT': exports.far_vit, 'FAR UNet': exports.far_unet}
CASES = [
    *(pytest.param(make, id=name) for name, make in MADE.items()),
    *(pytest.param(make, id=name, marks=pytest.mark.slow) for name, make in SLOW.items()),
]


@pytest.mark.parametrize('make', CASES)
def test_both_formats_compute_what_torch_computes(make: Callable[[Path], Path], tmp_path: Path) -> None:
    shipped, out = make(tmp_path), tmp_path / 'out'
    subject = kind_of(shipped).open(Request(shipped, Path('digits'), 16))
    receipt = export(subject, ['onnx', 'pt2'], out)
    found = json.loads((out / 'receipt.json').read_text())
    assert sorted(found['files']) == sorted(path.name for path in out.iterdir())
    for name in ('model.onnx', 'model.pt2'):
        entry = found['exports'][name]
        assert entry['relative'] <= 1e-4
        assert entry['sha256'] == sha256(out / name)
        assert entry['latency_ms'] > 0
        assert name in str(receipt)
    assert found['exports']['model.onnx']['opset'] == 20
    assert found['data'].startswith('16 images of digits')
    # by hand, with a batch that was never seen
    session = runtime.InferenceSession(str(out / 'model.onnx'))
    given = {key: torch.cat([value] * 3)[:5] for key, value in subject.calls[0].items()}
    names = [each.name for each in session.get_outputs()]
    assert names == subject.names()
    with torch.no_grad():
        expected = subject.model(**given)
    for name, value in zip(names, session.run(None, {k: v.numpy() for k, v in given.items()}), strict=True):
        assert value.shape == expected[name].shape
        assert np.abs(value - expected[name].numpy()).max() <= 1e-4 * float(expected[name].abs().max())
    assert {axis for axes in found['varies'].values() for axis in axes.values()} >= {'batch'}


def corrupted(write: Any) -> Any:
    """Write a model, then change one number of one weight of the file."""

    def writer(program: Any, path: Path, names: Any) -> None:
        write(program, path, names)
        model = onnx.load(path)
        weight = next(w for w in model.graph.initializer if len(w.dims) == 4)
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] += 0.5
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)

    return writer


def test_one_corrupted_weight_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, out = exports.classifier(tmp_path), tmp_path / 'out'
    entry = formats.FORMATS['onnx']
    monkeypatch.setitem(formats.FORMATS, 'onnx', entry._replace(write=corrupted(entry.write)))
    done = command('export', shipped, '--to', 'onnx', '--data', 'digits', '--images', 16, '--out', out)
    assert done.returncode == 1
    assert 'model.onnx: its output logits differs from that of torch by' in done.stderr
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['classifier']


def test_the_command_prints_the_receipt_and_measures_accuracy(tmp_path: Path) -> None:
    shipped, out = exports.classifier(tmp_path), tmp_path / 'out'
    done = command('export', shipped, '--to', 'onnx', '--data', 'digits', '--images', 32, '--out', out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'receipt.json').read_text())['exports']
    assert found['torch']['metrics'] == found['model.onnx']['metrics']
    for word in ('model.onnx', 'relative difference', 'accuracy', 'may vary: image 0: batch'):
        assert word in done.stdout
    again = command('export', shipped, '--to', 'pt2', '--out', out)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in out.iterdir()) == ['model.pt2', 'receipt.json']
    (out / 'mine.txt').write_text('mine')
    refused = command('export', shipped, '--out', out)
    assert refused.returncode == 1
    assert 'holds mine.txt, which this tool has not written' in refused.stderr


def test_models_with_gates_and_other_folders_are_refused(tmp_path: Path) -> None:
    import diffusers

    from asr_downstream import plug

    model = diffusers.UNet2DModel.from_pretrained(exports.pipeline(tmp_path) / 'unet')
    plug(model, dict(type='ASR', attention=dict(type='SE', reduction=4)))
    randomise(model).eval().save_pretrained(tmp_path / 'gated/unet')
    with pytest.raises(AsrError, match=r'gated/unet: has gates, .*asr-downstream fold RUN OUT'):
        kind_of(tmp_path / 'gated').open(Request(tmp_path / 'gated'))
    with pytest.raises(AsrError, match='is a model with gates, as save_pretrained writes it'):
        kind_of(tmp_path / 'gated/unet')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.py').touch()
    with pytest.raises(AsrError, match='is a training; fold it first'):
        kind_of(tmp_path / 'run')
    with pytest.raises(AsrError, match='is no shipped model of a known kind'):
        kind_of(tmp_path)
    with pytest.raises(AsrError, match='no such file or folder'):
        kind_of(tmp_path / 'nowhere')


@torch.no_grad()
def sampled(model: Any, scheduler: Any, noise: np.ndarray) -> torch.Tensor:
    """What diffusers draws in five steps."""
    scheduler.set_timesteps(5)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x


class Session:
    """A model as onnxruntime would run it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.model(*(torch.from_numpy(inputs[name]) for name in ('sample', 'timestep'))).sample.numpy()]


@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_what_follows_a_flow_is_exported_with_its_own_sampler(shift: float, tmp_path: Path) -> None:
    import diffusers

    pytest.importorskip('onnxruntime')
    from asr_downstream.commands.exporting.infer import sample

    shipped = exports.pipeline(tmp_path, flow={'shift': shift})
    subject = kind_of(shipped).open(Request(shipped, Path('digits'), 8))
    assert {call['timestep'].dtype for call in subject.calls} == {torch.float32}
    assert subject.infer is not None
    noise = np.random.default_rng(0).standard_normal((2, 1, 16, 16)).astype(np.float32)
    model = diffusers.UNet2DModel.from_pretrained(shipped / 'unet').eval()
    found = sample.sample(Session(model), subject.infer[1], noise, 5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(shipped / 'scheduler')
    x = sampled(model, scheduler, noise)
    torch.testing.assert_close(torch.from_numpy(found), x, atol=1e-4, rtol=1e-4)


def test_exports_of_other_models_need_no_diffusers() -> None:
    code = 'import sys; sys.modules["diffusers"] = None; from asr_downstream.commands.exporting.kinds import kind_of'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


def test_a_flow_of_another_schedule_has_no_program_beside_it(tmp_path: Path) -> None:
    shipped = exports.pipeline(tmp_path, flow={'use_karras_sigmas': True})
    assert kind_of(shipped).open(Request(shipped, None, 8)).infer is None


@pytest.mark.parametrize(('tokenizer', 'text', 'length'), [(16, 40, 16), (10**30, 40, 40), (None, None, 77)])
def test_prompts_are_as_long_as_those_of_the_tokenizer(
    tokenizer: int | None, text: int | None, length: int, tmp_path: Path
) -> None:
    """A program that was traced with another length takes no prompt."""
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=('CrossAttnDownBlock2D',), up_block_types=('CrossAttnUpBlock2D',), cross_attention_dim=6,
        attention_head_dim=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / 'unet')
    for folder, name, value in (
        ('tokenizer', 'tokenizer_config.json', {'model_max_length': tokenizer}),
        ('text_encoder', 'config.json', {'max_position_embeddings': text}),
    ):
        if text is not None:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / name).write_text(json.dumps(value))
    subject = kind_of(tmp_path).open(Request(tmp_path, None, 8))
    assert {call['encoder_hidden_states'].shape[1] for call in subject.calls} == {length}


@pytest.mark.slow
def test_the_program_beside_a_unet_samples_as_diffusers_does(tmp_path: Path) -> None:
    import diffusers
    from PIL import Image

    from asr_downstream.commands.exporting.infer import sample

    shipped, out = exports.pipeline(tmp_path), tmp_path / 'out'
    export(kind_of(shipped).open(Request(shipped, Path('digits'), 16)), ['onnx'], out)
    session, schedule = sample.open_model(out / 'model.onnx')
    noise = np.random.default_rng(0).standard_normal((4, *schedule['shape'])).astype(np.float32)
    found = sample.sample(session, schedule, noise, 5)
    model = diffusers.UNet2DModel.from_pretrained(shipped / 'unet').eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained(shipped / 'scheduler')
    x = sampled(model, scheduler, noise)
    assert np.abs(found - x.numpy()).max() <= 1e-3 * float(x.abs().max())
    words = [sys.executable, str(out / 'infer.py'), '--images', '3', '--steps', '2', '--out', str(tmp_path / 'a.png')]
    assert subprocess.run(words, cwd='/', check=False).returncode == 0
    with Image.open(tmp_path / 'a.png') as picture:
        assert picture.size == (32, 32)
