"""Mutated files of finished runs, shipped folders and data: a tool gives the right result, or one line of error.

Right means: what the whole files give, or what an older checkpoint gives, if the tool says that it took that.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.diffusion import UNET, call, config_for, write_images
from helpers.far import FAR, vit
from helpers.far import write_config as write_far
from helpers.mutations import JSON_MUTATIONS, MUTATIONS, mutate
from PIL import Image
from safetensors.torch import load_file

from asr_downstream.diffusion.evaluation.encoder import load_encoder, train_encoder
from asr_downstream.diffusion.evaluation.results import Result, save_results
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.data.images import build_images
from asr_downstream.errors import AsrError
from asr_downstream.far import replace
from asr_downstream.far.config import load_config as load_far_config
from asr_downstream.far.distil.stages import load_student, run_stages
from asr_downstream.far.evaluation.evaluate import load_family
from asr_downstream.far.export import save_far

Answer = Any


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, a FAR training, shipped folders and data."""
    root = tmp_path_factory.mktemp('whole')
    options = dict(max_train_steps=6, validation_steps=3, num_inference_steps=2, num_validation_images=4)
    run = train(config_for(root / 'diffusion', **options)).parent
    save_results(run, [Result('run', 'unfolded', 6, 'w', {'images': 4, 'versions': {'torch': '2'}}, {'fid': 1.0})])
    images = load_run(run, data=True).parts.images
    assert images is not None
    train_encoder(images, run / 'encoder.safetensors', steps=2, workers=0)
    far = root / 'far'
    run_stages(
        load_far_config(write_far(far, max_train_steps=2, checkpointing_steps=1, validation_steps=0)), far / 'out'
    )
    torch.manual_seed(0)
    replaced: Any = vit()
    replace(replaced, FAR)
    save_far(vit().eval(), far / 'out/shipped/teacher', {'name': 'teacher'})
    save_far(replaced.eval(), far / 'out/shipped/FAR-100', {'name': 'FAR-100'})
    pipeline = diffusers.DDPMPipeline(unet=diffusers.UNet2DModel(**UNET), scheduler=diffusers.DDPMScheduler())
    pipeline.save_pretrained(root / 'pipeline')
    pipeline.unet.save_pretrained(root / 'bin', safe_serialization=False)
    write_images(root / 'images')
    with zipfile.ZipFile(root / 'images.zip', 'w') as archive:
        for path in sorted((root / 'images').rglob('*.png')):
            archive.write(path, path.relative_to(root / 'images').as_posix())
    return root


# What reads a file: a function of the folder and of the mutated file, that raises AsrError or gives an answer ---------


def sampled(root: Path, path: Path) -> Answer:
    """Images of the run, and what was said."""
    done = finished(
        'diffusion/sample.py', root / 'diffusion/run', '--out', root / 'o', '--num-samples', 4, '--steps', 2
    )
    return np.asarray(Image.open(root / 'o/grid.png')).tobytes(), f'{path.parent.name}:' in done and 'skipped' in done


def shown(root: Path, path: Path) -> Answer:
    """Tables of earlier results; their numbers are not looked at."""
    return 'FID' in finished('diffusion/evaluate.py', root / 'diffusion/run', '--show') or True


def compared(root: Path, path: Path) -> Answer:
    """Curves and samples."""
    finished('diffusion/compare.py', root / 'diffusion/run', '--out', root / 'o')
    with Image.open(root / 'o/curves.png') as image:
        return image.size


def resumed(root: Path, path: Path) -> Answer:
    """The run, two steps on."""
    config = root / 'diffusion/config.py'
    done = finished(
        'diffusion/train.py', config, '--output-dir', root / 'diffusion/run', '--resume', '--cfg-options',
        'max_train_steps=8',
    )  # fmt: skip
    state = load_file(root / 'diffusion/run/checkpoint-8/model.safetensors')
    return {name: value.numpy().tobytes() for name, value in state.items()}, 'skipped' in done


def encoded(root: Path, path: Path) -> Answer:
    """Identity of the encoder: another one is another provenance."""
    found = load_encoder(path)
    assert all(value.isfinite().all() for value in found.state_dict().values())
    return True


def family(root: Path, path: Path) -> Answer:
    """Logits of the shipped family."""
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    with torch.no_grad():
        return [model(x).logits.numpy().tobytes() for model in load_family(root / 'far/out').values()]


def student(root: Path, path: Path) -> Answer:
    """Weights of a stage; of its older checkpoint after a line that says so."""
    model = load_student(load_far_config(root / 'far/tiny.py'), root / 'far/out', 'finetune')
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def pretrained(root: Path, path: Path) -> Answer:
    """A model from the folder: its weights are those in the file, whatever they are."""
    folder = root / ('bin' if 'bin' in path.parts else 'pipeline')
    spec = dict(type='UNet2DModel', pretrained_model_name_or_path=str(folder))
    parts = build_parts(config_for(root / 'x', model=spec, plug=None, noise_scheduler=...))
    assert all(value.isfinite().all() for value in parts.model.state_dict().values())
    if path.suffix in ('.safetensors', '.bin'):
        stored = load_file(path) if path.suffix == '.safetensors' else torch.load(path, weights_only=True)
        assert all(torch.equal(stored[name], value) for name, value in parts.model.state_dict().items())
    return True


def pixels(root: Path, path: Path) -> Answer:
    """Every image, or that it cannot be decoded."""
    source = root / ('images.zip' if path.suffix == '.zip' else 'images')
    kind = 'Zip' if source.suffix else 'ImageFolder'
    images = build_images(dict(type=kind, path=str(source), resolution=8), 3)
    found = set()
    for number in range(len(images)):
        try:
            found.add(images[number].numpy().tobytes())
        except AsrError as error:
            named = images.source.name(number) in str(error)
            found |= set() if named else {'an error without a name'}
    return found


def finished(name: str, *arguments: object) -> str:
    """Run a tool; what it said, or its error."""
    done = call(name, *arguments)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
        assert (done.returncode, len(lines)) == (1, 1), done.stderr
        raise AsrError(lines[0])
    return done.stdout


@dataclass(frozen=True)
class Target:
    """Files, what reads them, and whether it has a hash, so that no change can go unnoticed."""

    pattern: str
    read: Callable[[Path, Path], Answer]
    exact: bool = True


LAST = 'diffusion/run/checkpoint-6'
TARGETS = [
    Target(f'{LAST}/model.safetensors', sampled),
    Target(f'{LAST}/ema.safetensors', sampled),
    Target(f'{LAST}/manifest.json', sampled),
    Target(f'{LAST}/progress.json', sampled),
    Target(f'{LAST}/optimizer.bin', resumed),
    Target(f'{LAST}/random_states_0.pkl', resumed),
    Target(f'{LAST}/manifest.json', resumed),
    Target('diffusion/run/log.jsonl', compared, exact=False),
    Target('diffusion/run/evaluation.json', shown),
    Target('diffusion/run/samples/step-0000006.png', compared, exact=False),
    Target('diffusion/run/encoder.safetensors', encoded),
    Target('far/out/shipped/FAR-100/far.json', family),
    Target('far/out/shipped/FAR-100/config.json', family),
    Target('far/out/shipped/FAR-100/asr_downstream.safetensors', family),
    Target('far/out/shipped/teacher/far.json', family),
    Target('far/out/finetune/checkpoint-2/model.safetensors', student),
    Target('far/out/finetune/checkpoint-2/manifest.json', student),
    Target('pipeline/unet/diffusion_pytorch_model.safetensors', pretrained),
    Target('pipeline/unet/config.json', pretrained),
    Target('pipeline/model_index.json', pretrained),
    Target('pipeline/scheduler/scheduler_config.json', pretrained),
    Target('bin/diffusion_pytorch_model.bin', pretrained),
    Target('images/cat/0.png', pixels, exact=False),
    Target('images.zip', pixels, exact=False),
]
SEEDS = {'wrong_value': 4, 'lost_key': 2, 'flip': 2, 'truncate': 2, 'zeros': 2}


def cases() -> list[Any]:
    """Every target with every mutation of its kind; a few of them are fast enough for every test run."""
    found = []
    for number, target in enumerate(TARGETS):
        for name in JSON_MUTATIONS if target.pattern.endswith('.json') else MUTATIONS:
            for seed in range(SEEDS.get(name, 1)):
                fast = seed == 0 and (number, name) in FAST
                label = f'{target.pattern}-{target.read.__name__}-{name}-{seed}'
                found.append(pytest.param(target, name, seed, id=label, marks=() if fast else pytest.mark.slow))
    return found


FAST = {
    (0, 'truncate'), (1, 'flip'), (2, 'wrong_value'), (8, 'lost_key'), (11, 'other_root'), (11, 'wrong_value'),
    (13, 'huge_length'), (17, 'truncate'), (18, 'wrong_value'), (22, 'flip'), (23, 'swap'),
}  # fmt: skip


@pytest.fixture(scope='module')
def right(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Target], list[Answer]]:
    """Answers to the whole files, and to those of the checkpoint before."""
    known: dict[tuple[str, str], list[Answer]] = {}

    def answers(target: Target) -> list[Answer]:
        key = target.read.__name__, target.pattern if target.read is pretrained else ''
        if key not in known:
            root = Path(shutil.copytree(whole, tmp_path_factory.mktemp('right') / 'w'))
            path = root / target.pattern
            known[key] = [target.read(root, path)]
            if 'checkpoint-' in target.pattern:
                root = Path(shutil.copytree(whole, tmp_path_factory.mktemp('right') / 'w'))
                (root / target.pattern).parent.joinpath('manifest.json').write_text('')
                known[key].append(target.read(root, root / target.pattern))
        return known[key]

    return answers


def test_there_are_at_least_a_hundred_cases() -> None:
    assert len(cases()) >= 100
    assert len([case for case in cases() if not case.marks]) >= 10


@pytest.mark.timeout(60)
@pytest.mark.parametrize(('target', 'name', 'seed'), cases())
def test_mutated_files_are_read_right_or_refused_in_one_line(
    whole: Path, right: Callable[[Target], list[Answer]], tmp_path: Path, target: Target, name: str, seed: int
) -> None:
    expected = right(target)
    root = Path(shutil.copytree(whole, tmp_path / 'w'))
    path = root / target.pattern
    if not mutate(path, name, seed):
        pytest.skip('this mutation changes nothing here')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            answer = target.read(root, path)
        except AsrError as error:
            line = str(error)
            assert len(line) < 1000
            return
    if target.exact:
        assert answer in expected
    elif target.read is pixels:
        assert answer <= expected[0] or name in ('flip', 'zeros', 'swap'), 'what is decoded is what was written'


def test_the_answers_tell_files_apart(whole: Path, right: Callable[[Target], list[Answer]]) -> None:
    whole_run, older = right(TARGETS[0])
    assert whole_run[0] != older[0]
    assert (whole_run[1], older[1]) == (False, True)
    assert len(set(right(TARGETS[11])[0])) == 2
    assert json.loads((whole / 'pipeline/model_index.json').read_text())['unet'] == ['diffusers', 'UNet2DModel']
