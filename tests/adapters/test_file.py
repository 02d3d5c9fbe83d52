"""The file of an adapter may come from anyone: what is not sound is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_of_at_most
from helpers.adapters import SE, base, same, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from asr_downstream import AsrError, CheckpointError
from asr_downstream.folding.adapters.file import KEY, MOST, list_gates, read_adapter, write_adapter

Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def rewritten(path: Path, change: Change) -> Path:
    """Change the metadata and tensors of a file."""
    with safe_open(path, framework='pt') as file:
        content = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    said = change(content, tensors)
    save_file(tensors, path, {KEY: said if isinstance(said, str) else json.dumps(content)})
    return path


GATE = 'gate:layer1.0.bn3'


def put(name: str, value: Any) -> Change:
    return lambda content, tensors: tensors.__setitem__(name, value)


def say(*keys: Any, value: Any) -> Change:
    def change(content: Any, tensors: dict[str, Tensor]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def without(name: str) -> Change:
    return lambda content, tensors: tensors.__delitem__(name)


def whole(text: str) -> Change:
    return lambda content, tensors: text


REFUSED: dict[str, tuple[Change, str]] = {
    'other dtype': (put(GATE, torch.ones(32)), r"'gate:layer1.0.bn3' should be float64"),
    'two axes': (put(GATE, torch.ones(1, 32, dtype=torch.float64)), 'should be float64 numbers, one a channel'),
    'empty': (put(GATE, torch.ones(0, dtype=torch.float64)), 'should be float64 numbers'),
    'nan': (put(GATE, torch.full((32,), torch.nan, dtype=torch.float64)), 'is not finite'),
    'infinite head': (put('head:fc.bias', torch.full((10,), torch.inf)), "'head:fc.bias' is not finite"),
    'eight bits': (
        put('head:fc.bias', torch.full((10,), torch.nan).to(torch.float8_e4m3fn)),
        "'head:fc.bias' is not finite",
    ),
    'kind': (put('gat:layer1.0.bn3', torch.ones(1)), "a tensor is named 'gat:layer1.0.bn3'"),
    'no site': (put('gate:layer9', torch.ones(1, dtype=torch.float64)), "a tensor is named 'gate:layer9'"),
    'no constants': (without(GATE), "'layer1.0.bn3' has no constants"),
    'no base': (without('base'), 'it has no digests of its base'),
    'base': (put('base', torch.zeros(3, 8, dtype=torch.uint8)), 'do not fit each other'),
    'base of another width': (put('base', torch.zeros(3, 4, dtype=torch.uint8)), 'it has no digests'),
    'escape': (put('head:\x1b[2Jfc', torch.ones(1)), r"a name is 'head:\\x1b"),
    'escape in the model': (say('model', value='\x1b[2J'), 'a name is'),
    'json': (whole('{"format": 1'), 'its metadata cannot be read'),
    'depth': (whole('[' * 100_000), 'its metadata cannot be read'),
    'list': (whole('[]'), 'its metadata has no format'),
    'true': (say('format', value=True), 'its metadata has no format'),
    'newer': (say('format', value=2), 'format 2 is not known; update asr_downstream'),
    'sites': (say('sites', value={}), "'sites' in its metadata is no list"),
    'site': (say('sites', 0, value='layer1'), "a site in its metadata is 'layer1'"),
    'layer': (say('sites', 0, 'layer', value='Module'), 'a site in its metadata is'),
    'layer of another kind': (say('sites', 0, 'layer', value=['Linear']), 'a site in its metadata is'),
    'groups': (say('sites', 0, 'groups', value=0), 'groups=0 of a site'),
    'groups that are no number': (say('sites', 0, 'groups', value=True), 'groups=True of a site'),
    'twice': (lambda c, t: c['sites'].append(c['sites'][0]), 'a site is in it twice'),
    'digest': (say('base', 'digest', value=3), "'base' or 'versions' in its metadata"),
    'versions': (say('versions', value={'torch': 2}), "'base' or 'versions' in its metadata"),
    'about': (say('about', value='x'), "'about' in its metadata is no dict"),
}


@pytest.mark.parametrize(('change', 'message'), REFUSED.values(), ids=REFUSED)
def test_what_is_not_sound_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = saved(tmp_path, base(), SE, heads=('fc.bias',))
    read_adapter(rewritten(path, lambda content, tensors: None))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(rewritten(path, change))
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize('length', [0, 1, 8, 40, 2000, -8, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    path = saved(tmp_path, base())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match='damaged|is no safetensors file'):
        read_adapter(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / 'a.safetensors'
    with path.open('wb') as file:
        file.write((MOST + 1).to_bytes(8, 'little'))
        file.truncate(4 * MOST)
    with pytest.raises(CheckpointError, match='is no safetensors file, or damaged'):
        read_adapter(path)


def test_other_files_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='no such adapter'):
        list_gates(tmp_path / 'a.safetensors')
    save_file({'x': torch.zeros(1)}, tmp_path / 'a.safetensors')
    with pytest.raises(CheckpointError, match=r'is no adapter of asr_downstream; files of peft .* gates convert'):
        list_gates(tmp_path / 'a.safetensors')
    torch.save({'x': torch.zeros(1)}, tmp_path / 'b.safetensors')
    with pytest.raises(CheckpointError, match='is no safetensors file'):
        list_gates(tmp_path / 'b.safetensors')


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = saved(tmp_path, base(), SE, heads=('fc.bias',))
    one = read_adapter(path)
    write_adapter(one, tmp_path / 'b.safetensors')
    assert (tmp_path / 'b.safetensors').read_bytes() == path.read_bytes()
    two = read_adapter(tmp_path / 'b.safetensors')
    assert one.base == two.base
    assert one.sites.keys() == two.sites.keys()
    for at, site in one.sites.items():
        assert same(site.constants.gate, two.sites[at].constants.gate)
    assert same(one.heads['fc.bias'], two.heads['fc.bias'])


def test_a_disk_that_is_full_leaves_nothing_of_it(tmp_path: Path) -> None:
    adapter = read_adapter(saved(tmp_path, base()))
    (tmp_path / 'b.safetensors').write_text('before')
    with files_of_at_most(1000), pytest.raises(AsrError, match='b.safetensors: cannot be written'):
        write_adapter(adapter, tmp_path / 'b.safetensors')
    assert sorted(os.listdir(tmp_path)) == ['a.safetensors', 'b.safetensors']
    assert (tmp_path / 'b.safetensors').read_text() == 'before'
