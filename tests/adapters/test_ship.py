"""Adapters in files and folders: stock weights in the layout of the base, by Python and by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import files_of_at_most
from helpers.adapters import SE, adapted, base, call, same, saved
from safetensors.torch import load_file, save_file
from torch import nn

from asr_downstream import AsrError, CheckpointError, apply_gates, fold
from asr_downstream.commands import fold as fold_command
from asr_downstream.files.atomic import sha256
from asr_downstream.folding.adapters.apply import given
from asr_downstream.folding.adapters.save import save_gates
from asr_downstream.folding.adapters.ship import apply_to_file, apply_to_folder


def equal(state: dict[str, torch.Tensor], model: nn.Module) -> bool:
    wanted = model.state_dict()
    return state.keys() == wanted.keys() and all(same(state[name], wanted[name]) for name in wanted)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_mmengine_keeps_its_layout(tmp_path: Path) -> None:
    stock = base()
    meta = {'epoch': 12, 'dataset_meta': {'classes': ('a', 'b')}, 'cfg': 'of a training'}
    torch.save({'state_dict': stock.state_dict(), 'meta': meta, 'optimizer': {}}, tmp_path / 'base.pth')
    path = saved(tmp_path, stock)
    report = apply_to_file(tmp_path / 'base.pth', given(path, 0.7), tmp_path / 'out/night.pth')
    found = torch.load(tmp_path / 'out/night.pth')
    assert equal(found['state_dict'], apply_gates(stock, path, strength=0.7))
    assert found['meta'] == {'epoch': 12, 'dataset_meta': {'classes': ('a', 'b')}}
    assert found.keys() == {'state_dict', 'meta'}
    assert json.loads((tmp_path / 'out/night.json').read_text()) == json.loads(json.dumps(report))
    assert report['base'] == {'base.pth': sha256(tmp_path / 'base.pth')}
    assert report['weights'] == {'night.pth': sha256(tmp_path / 'out/night.pth')}
    assert report['adapters'][0]['strength'] == 0.7
    assert report['adapters'][0]['sha256'] == sha256(path)
    tensors = found['state_dict'].values()
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors), 'none holds more than itself'


@pytest.mark.parametrize('before', ['base.pth', 'base.safetensors'])
@pytest.mark.parametrize('after', ['out.pth', 'out.safetensors'])
def test_plain_weights_stay_plain(tmp_path: Path, before: str, after: str) -> None:
    stock = base()
    if before.endswith('.pth'):
        torch.save(stock.state_dict(), tmp_path / before)
    else:
        save_file(stock.state_dict(), tmp_path / before)
    path = saved(tmp_path, stock)
    done = call('apply', tmp_path / before, path, tmp_path / after)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / after) if after.endswith('.pth') else load_file(tmp_path / after)
    if before.endswith('.safetensors') and after.endswith('.pth'):
        found = found['state_dict']
    assert equal(found, apply_gates(stock, path))


def test_classes_are_those_of_the_heads(tmp_path: Path) -> None:
    stock = base()
    torch.save({'state_dict': stock.state_dict(), 'meta': {'dataset_meta': {'classes': ('x',)}}}, tmp_path / 'base.pth')
    model = adapted(stock, SE, ('fc.weight',))
    save_gates(model, tmp_path / 'a.safetensors', about={'classes': ['cat', 'dog']})
    for heads, classes in ((True, ('cat', 'dog')), (False, ('x',))):
        apply_to_file(tmp_path / 'base.pth', given(tmp_path / 'a.safetensors', 1, heads), tmp_path / 'out.pth')
        assert torch.load(tmp_path / 'out.pth')['meta']['dataset_meta']['classes'] == classes
    apply_to_file(tmp_path / 'base.pth', given(tmp_path / 'a.safetensors'), tmp_path / 'out.pth')
    assert equal(torch.load(tmp_path / 'out.pth')['state_dict'], fold(model)[0])


def test_what_cannot_be_is_said_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    stock = base()
    torch.save(stock.state_dict(), tmp_path / 'base.pth')
    torch.save(base().state_dict(), tmp_path / 'other.pth')
    path = saved(tmp_path, stock)
    before = sorted(p.name for p in tmp_path.iterdir())
    cases = [
        (('base.pth', 'out.bin'), 'should end in .pth'),
        (('base.pth', 'base.pth'), 'would overwrite base.pth'),
        (('base.pth', 'a.safetensors'), 'would overwrite a.safetensors'),
        (('other.pth', 'out.pth'), 'other.pth, 112 of 112 tensors differ'),
        (('none.pth', 'out.pth'), 'no such checkpoint'),
    ]
    for (source, target), message in cases:
        done = call('apply', tmp_path / source, path, tmp_path / target)
        lines = done.stderr.splitlines()
        assert (done.returncode, len(lines)) == (1, 1), done.stderr
        assert message in lines[0]
    with files_of_at_most(10_000), pytest.raises(AsrError, match='cannot be written'):
        apply_to_file(tmp_path / 'base.pth', given(path), tmp_path / 'out.pth')
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    done = call('apply', tmp_path / 'other.pth', path, tmp_path / 'out.pth', '--any-base')
    assert done.returncode == 0, done.stderr


def test_fold_apply_is_gates_apply(tmp_path: Path) -> None:
    stock = base()
    torch.save(stock.state_dict(), tmp_path / 'base.pth')
    a, b = saved(tmp_path, stock, SE, 'a'), saved(tmp_path, stock, SE, 'b')
    words = ('apply', tmp_path / 'base.pth', a, b, tmp_path / 'out.pth', '--strength', '1', '0.5')
    done = call(*words, main=fold_command.main)
    assert done.returncode == 0, done.stderr
    assert equal(torch.load(tmp_path / 'out.pth'), apply_gates(stock, [a, b], strength=[1, 0.5]))
    for wrong in (words[:3], (*words, '0.3'), ('apply', *words[1:3], '--strength', 'x')):
        assert call(*wrong).returncode == 2


def test_list_prints_what_files_hold(tmp_path: Path) -> None:
    stock = base()
    done = call('list', saved(tmp_path, stock, SE, 'a'), saved(tmp_path, stock, SE, 'b', ('fc.bias',)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('448 constants of 6 layers for ResNet') == 2
    assert 'heads: fc.bias (10 numbers)' in done.stdout
    assert call('list', tmp_path / 'x.safetensors').stderr.startswith('error: ')


# Folders -------------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, stock: nn.Module, shards: int = 1, stem: str = 'model') -> Path:
    """A pipeline: a part with weights as the libraries write them, in one file or in shards, and other files."""
    part, state = folder / 'unet', stock.state_dict()
    part.mkdir(parents=True)
    (part / 'config.json').write_text('{"_class_name": "ResNet"}')
    names = list(state)
    if shards == 1:
        save_file(state, part / f'{stem}.safetensors', {'format': 'pt'})
    else:
        where = {name: f'{stem}-{n % shards + 1:05}-of-{shards:05}.safetensors' for n, name in enumerate(names)}
        for file in {*where.values()}:
            save_file({n: state[n] for n in names if where[n] == file}, part / file, {'format': 'pt'})
        (part / f'{stem}.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    (folder / 'vae').mkdir()
    save_file({'x': torch.zeros(1)}, folder / 'vae/diffusion_pytorch_model.safetensors', {'format': 'pt'})
    (folder / 'model_index.json').write_text('{}')
    (folder / 'README.md').write_text('of the base')
    (part / f'{stem}.fp16.safetensors').write_text('stale')
    return folder


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('stem', ['model', 'diffusion_pytorch_model'])
def test_a_folder_is_copied_with_other_weights(tmp_path: Path, shards: int, stem: str) -> None:
    stock = base()
    folder = write_folder(tmp_path / 'base', stock, shards, stem)
    path = saved(tmp_path, stock)
    done = call('apply', folder, path, tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    files = {p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*') if p.is_file()}
    weights = {p.name for p in (folder / 'unet').glob(f'{stem}*') if 'fp16' not in p.name}
    others = {'model_index.json', 'vae/diffusion_pytorch_model.safetensors', 'unet/config.json', 'fold_report.json'}
    assert files == others | {f'unet/{name}' for name in weights}
    found = {}
    for name in weights:
        if name.endswith('.safetensors'):
            found |= load_file(tmp_path / 'out/unet' / name)
    assert equal(found, apply_gates(stock, path))
    report = json.loads((tmp_path / 'out/fold_report.json').read_text())
    assert set(report['files']) == files
    for name, digest in report['weights'].items():
        assert sha256(tmp_path / 'out' / name) == digest
    assert apply_to_folder(folder, given(path, 0.5), tmp_path / 'out')['adapters'][0]['strength'] == 0.5  # replaced
    (tmp_path / 'out/notes.txt').write_text('mine')
    with pytest.raises(AsrError, match=r'holds notes.txt, which this tool has not written'):
        apply_to_folder(folder, given(path), tmp_path / 'out')


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stock = base()
    folder, path = write_folder(tmp_path / 'base', stock), saved(tmp_path, stock)
    for out in (folder, folder / 'out'):
        with pytest.raises(AsrError, match='is the base, or in it'):
            apply_to_folder(folder, given(path), out)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CheckpointError, match='holds no weights of diffusers or transformers'):
        apply_to_folder(tmp_path / 'empty', given(path), tmp_path / 'out')
    with pytest.raises(CheckpointError, match='base/vae: none has the layers of the adapter'):
        apply_to_folder(folder / 'vae', given(path), tmp_path / 'out')
    other = write_folder(tmp_path / 'other', base())
    with pytest.raises(CheckpointError, match='other/unet, 112 of 112 tensors differ'):
        apply_to_folder(other, given(path), tmp_path / 'out')
    sharded = write_folder(tmp_path / 'sharded', stock, 3)
    index = sharded / 'unet/model.safetensors.index.json'
    text = index.read_text()
    (sharded / 'elsewhere.safetensors').write_text('')
    for content, message in (
        (text.replace('model-00002', 'lost-00002'), 'names lost-00002-of-00003.safetensors, which is not there'),
        (text.replace('model-00002-of-00003', '../elsewhere'), 'index.json: cannot be read'),
        ('[]', 'index.json: cannot be read'),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            apply_to_folder(sharded, given(path), tmp_path / 'out')
    head = copy_with_head(stock)
    with pytest.raises(CheckpointError, match=r'fc.bias: is of shape \(10,\) in .* head is of shape \(3,\)'):
        apply_to_folder(folder, given(saved(tmp_path, head, SE, 'h', ('fc.weight', 'fc.bias'))), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    done = call('apply', folder, path, tmp_path / 'out', '--config', 'x.py')
    assert 'is a folder, and --config is for the checkpoint of a detector' in done.stderr


def copy_with_head(stock: nn.Module) -> nn.Module:
    import copy

    other = copy.deepcopy(stock)
    other.fc = nn.Linear(stock.fc.in_features, 3)
    return other


def test_a_folder_is_a_base_to_save_and_convert_with(tmp_path: Path) -> None:
    stock = base()
    folder = write_folder(tmp_path / 'base', stock)
    model = adapted(stock)
    del model.adapter_base
    save_gates(model, tmp_path / 'a.safetensors', base=folder)
    assert equal(stock.state_dict(), apply_gates(stock, tmp_path / 'a.safetensors', strength=0))
    model.conv1.weight.data += 1
    with pytest.raises(CheckpointError, match='1 of 112 weights differ .conv1.weight'):
        save_gates(model, tmp_path / 'a.safetensors', base=folder)
    tensors = {
        'lycoris_layer1_0_conv1.weight': torch.randn(1, 8, 1, 1),
        'lycoris_layer1_0_conv1.on_input': torch.tensor(0),
    }
    save_file(tensors, tmp_path / 'x.safetensors')
    done = call('convert', tmp_path / 'x.safetensors', folder / 'unet', tmp_path / 'c.safetensors')
    assert done.returncode == 0, done.stderr
    assert 'layer1.0.conv1' in done.stdout
    done = call('apply', folder, tmp_path / 'c.safetensors', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
