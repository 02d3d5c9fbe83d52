"""Damaged and misleading files of FAR: shipped folders, cuts of a family, names that mean something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion import assert_refused, call
from helpers.far import FAR, vit, write_config
from safetensors.torch import load_file, save_file

from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.far import replace
from asr_downstream.far.config import load_config
from asr_downstream.far.distil.stages import run_stages
from asr_downstream.far.evaluation.evaluate import load_family
from asr_downstream.far.export import FAR_FILE, load_far, save_far
from asr_downstream.far.family import prune_family
from asr_downstream.far.prune.budgets import Budget


def far_vit() -> Any:
    """A ViT whose attention is replaced."""
    torch.manual_seed(0)
    model: Any = vit()
    replace(model, FAR)
    return model.eval()


@pytest.fixture(scope='module')
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a FAR model, shipped."""
    folder = tmp_path_factory.mktemp('family')
    save_far(vit().eval(), folder / 'shipped/teacher', {'name': 'teacher'})
    save_far(far_vit(), folder / 'shipped/FAR-100', {'name': 'FAR-100'})
    return folder


@pytest.fixture
def copy(family: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(family, tmp_path / 'family'))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# Shipped folders ------------------------------------------------------------------------------------------------------

CHANGES: list[dict[str, Any]] = [
    {'library': ['transformers']},
    {'library': 'os'},
    {'library': 3},
    {'class': 7},
    {'class': 'path'},
    {'class': 'ViTModel.forward'},
    {'class': 'PreTrainedModel'},
    {'class': ...},
    {'dtype': 32},
    {'dtype': 'nn'},
    {'dtype': ['float32']},
    {'dtype': 'int64'},
    {'replace': 3},
    {'replace': 'FAR'},
    {'replace': ['FAR']},
    {'replace': {'type': 'FAR', 'layers': [{}]}},
    {'replace': {'type': 'FAR', 'layers': ['vit.layers.0.attention'], 'widths': 4}},
    {'replace': {'type': 'FAR', 'layers': 'all', 'widths': {'vit.layers.0.attention': [[1]]}}},
    {'replace': {'type': 'FAR', 'layers': 'all', 'widths': {'vit.layers.0.attention': [[-1, 4], [4, 4]]}}},
    {'replace': {'type': 'FAR', 'variant': ['M3']}},
    {'replace': {'type': 'FAR', 'execution': {}}},
    {'replace': None},
]


@pytest.mark.parametrize(
    'changes',
    [pytest.param(c, id=json.dumps(c, default=str)[:60]) for c in CHANGES],
)
def test_a_far_json_that_does_not_fit_is_refused(
    copy: Path, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    edit(copy / 'shipped/FAR-100' / FAR_FILE, **changes)
    with pytest.raises(AsrError, match='FAR-100') as caught:
        load_far(copy / 'shipped/FAR-100')
    assert len(str(caught.value)) < 600


TEXTS = ['', '{', '[]', 'null', '3', '"far"', '\xff\xfe', '[' * 100_000]


@pytest.mark.parametrize('name', [FAR_FILE, 'config.json'])
def test_json_that_is_none_is_refused(copy: Path, name: str) -> None:
    for text in TEXTS:
        (copy / 'shipped/FAR-100' / name).write_bytes(text.encode('latin-1'))
        for load in (lambda: load_far(copy / 'shipped/FAR-100'), lambda: load_family(copy)):
            with pytest.raises(AsrError, match=name):
                load()


@pytest.mark.parametrize(
    'changes',
    [{'hidden_size': -4}, {'hidden_size': 'wide'}, {'num_attention_heads': 0}, {'num_hidden_layers': None},
     {'hidden_act': 'nothing'}, {'patch_size': 0}],
)  # fmt: skip
def test_a_config_that_builds_nothing_is_refused(copy: Path, changes: dict[str, Any]) -> None:
    edit(copy / 'shipped/FAR-100/config.json', **changes)
    with pytest.raises(CheckpointError, match='config.json: is damaged, or was changed'):
        load_far(copy / 'shipped/FAR-100')
    edit(copy / 'shipped/FAR-100' / FAR_FILE, files=...)  # of a version that wrote no hashes
    with pytest.raises(CheckpointError, match='FAR-100.*config.json'):
        load_far(copy / 'shipped/FAR-100')


@pytest.mark.parametrize('damage', ['cut', 'empty', 'zeros', 'huge header', 'a folder'])
def test_damaged_weights_are_refused(copy: Path, damage: str) -> None:
    path = copy / 'shipped/FAR-100/asr_downstream.safetensors'
    whole = path.read_bytes()
    if damage == 'a folder':
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({
            'cut': whole[: len(whole) // 2], 'empty': b'', 'zeros': bytes(len(whole)),
            'huge header': (2**63).to_bytes(8, 'little') + whole[8:],
        }[damage])  # fmt: skip
    with pytest.raises(CheckpointError, match='asr_downstream.safetensors'):
        load_far(copy / 'shipped/FAR-100')


@pytest.mark.parametrize('files', [3, [], {'../teacher/model.safetensors': 'x'}, {'config.json': 4}])
def test_hashes_that_are_none_are_refused(copy: Path, files: Any) -> None:
    edit(copy / 'shipped/FAR-100' / FAR_FILE, files=files)
    with pytest.raises(CheckpointError, match='damaged'):
        load_far(copy / 'shipped/FAR-100')


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['teacher', 'FAR-100', 'uniform', 'not trained', '', 7, ['x']])
def test_a_name_that_is_taken_is_refused(copy: Path, name: Any) -> None:
    save_far(far_vit(), copy / 'shipped/mine', {'name': name})
    assert_refused(call('tools/evaluate_far.py', copy, '--rounds', 1), 'mine', 'name')


def test_a_far_model_is_no_teacher(copy: Path) -> None:
    shutil.rmtree(copy / 'shipped/teacher')
    save_far(far_vit(), copy / 'shipped/teacher', {'name': 'teacher'})
    with pytest.raises(CheckpointError, match='teacher.*replaced'):
        load_family(copy)


# Cuts -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and folder of a family with one member."""
    folder = tmp_path_factory.mktemp('pruned')
    config = load_config(write_config(folder, max_train_steps=1, validation_steps=0))
    run_stages(config, folder / 'out')
    prune_family(config, folder / 'out', [Budget('units', 0.5)])
    return folder


CUTS: list[Any] = [
    '', '[]', '{}', 'null', '3', '[' * 100_000, {'threshold': 'high'}, {'threshold': None}, {'threshold': [1]},
    {'threshold': float('nan')}, {'threshold': float('inf')}, {'threshold': 1e-9}, {'relative': 'yes'}, {'relative': 1},
    {'widths': {}}, {'widths': None}, {'threshold': ...}, {'relative': ...}, {'relative': False},
]  # fmt: skip


@pytest.mark.parametrize(
    'content',
    [pytest.param(c, id=str(c)[:30], marks=pytest.mark.slow if n % 4 else ()) for n, c in enumerate(CUTS)],
)
def test_a_cut_that_does_not_fit_is_refused(pruned: Path, content: Any) -> None:
    config = load_config(pruned / 'tiny.py')
    path = pruned / 'out/FAR-50/cut.json'
    before = path.read_text()
    if isinstance(content, str):
        path.write_text(content)
    else:
        edit(path, **content)
    damaged = path.read_text()
    try:
        with pytest.raises(AsrError, match='cut.json') as caught:
            prune_family(config, pruned / 'out', [Budget('units', 0.5)], resume=True)
        assert len(str(caught.value)) < 500
        assert path.read_text() == damaged, 'is left as it was'
    finally:
        path.write_text(before)


def test_a_whole_cut_is_taken_up(pruned: Path) -> None:
    lines: list[str] = []
    config = load_config(pruned / 'tiny.py')
    prune_family(config, pruned / 'out', [Budget('units', 0.5)], resume=True, say=lines.append)
    assert 'FAR-50: finished before' in lines


# Teachers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('damage', ['not finite', 'replaced'])
def test_a_pretrained_teacher_that_is_none_is_refused(tmp_path: Path, damage: str) -> None:
    model = far_vit() if damage == 'replaced' else vit()
    model.save_pretrained(tmp_path / 'vit')  # type: ignore[operator]
    path = tmp_path / 'vit/model.safetensors'
    if damage == 'not finite':
        state = load_file(path)
        state['vit.layernorm.bias'][:] = float('nan')
        save_file(state, path, {'format': 'pt'})
    spec = dict(type='ViTForImageClassification', pretrained_model_name_or_path=str(tmp_path / 'vit'))
    half = {'image_mean': [0.5], 'image_std': [0.5]}
    assert_refused(call('tools/distill_far.py', write_config(tmp_path, teacher=spec, **half), '--dry-run'), 'vit')
