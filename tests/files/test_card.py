"""Cards: metadata that libraries of a hub read, results in it, and names that stay text."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('huggingface_hub')

from huggingface_hub import ModelCard

from asr_downstream.errors import AsrError
from asr_downstream.files.card import add_results, card_text, measured

NAMES = [
    'plain',
    'a: b',
    '---',
    '- x',
    '[x](y)',
    "it's # no comment",
    'a\nb: c',
    'a\r\nb',
    '{{ x }}',
    '*a',
    '!!python/x',
    '海',
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('asks the network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def as_dict(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_a_card_says_what_it_is_told_and_no_more() -> None:
    text = card_text('# A\n', 'a', 'mmdetection', {'license': 'mit', 'tags': ['x']}, ['fcos'], pipeline_tag='t')
    assert text.startswith('---\n')
    assert text.endswith('---\n# A\n')
    assert as_dict(text) == {
        'license': 'mit',
        'library_name': 'mmdetection',
        'pipeline_tag': 't',
        'tags': ['fcos', 'x'],
    }
    assert as_dict(card_text('# A\n', 'a', 'diffusers', {})) == {'library_name': 'diffusers'}


@pytest.mark.parametrize('name', NAMES)
def test_odd_names_are_text(name: str) -> None:
    results = measured(name, name, {name: (name, 0.5)}, name, {name: name})
    text = card_text(f'# {name}\n', name, name, {'license': name, 'datasets': [name]}, [name], results)
    card = ModelCard(text)
    assert card.text == f'# {name}\n'
    assert (card.data.license, card.data.datasets, card.data.tags) == (name, [name], [name])
    assert card.data.model_name == name
    assert card.data.eval_results == results


def test_results_are_read_by_machines_and_replaced_by_newer_ones(tmp_path: Path) -> None:
    numbers = {'AP': ('mAP', 0.5), 'AP50': ('mAP', 0.75), 'APs': ('mAP', float('nan'))}
    results = measured('object-detection', 'bccd', numbers, 'val.json')
    path = tmp_path / 'README.md'
    path.write_text(
        card_text('# A\r\nmine: --- 海\n', 'a', 'mmdetection', {'license': 'mit'}, results=results), newline=''
    )
    assert as_dict(path.read_text())['model-index'] == [
        {
            'name': 'a',
            'results': [
                {
                    'task': {'type': 'object-detection'},
                    'dataset': {'name': 'bccd', 'type': 'bccd', 'split': 'val.json'},
                    'metrics': [
                        {'type': 'mAP', 'value': 0.5, 'name': 'AP'},
                        {'type': 'mAP', 'value': 0.75, 'name': 'AP50'},
                    ],
                }
            ],
        }
    ]
    add_results(path, 'other', measured('object-detection', 'bccd', {'AP': ('mAP', 0.625)}, 'val.json'))
    add_results(path, 'other', measured('object-detection', 'coco', {'AP': ('mAP', 0.25)}, 'val.json'))
    card = ModelCard(path.read_bytes().decode())
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert found == {('bccd', 'AP50'): 0.75, ('bccd', 'AP'): 0.625, ('coco', 'AP'): 0.25}
    assert (card.data.model_name, card.data.license) == ('a', 'mit')
    assert card.text == '# A\r\nmine: --- 海\n'


def test_cards_of_others_are_left_or_named(tmp_path: Path) -> None:
    results = measured('object-detection', 'bccd', {'AP': ('mAP', 0.5)})
    add_results(tmp_path / 'README.md', 'a', results)
    assert not list(tmp_path.iterdir())
    for content in (b'---\n[\n---\n', b'---\n- a\n---\n', b'---\nmodel-index: 3\n---\n', b'\xff'):
        (tmp_path / 'README.md').write_bytes(content)
        with pytest.raises(AsrError, match=r'README\.md: its metadata cannot be read'):
            add_results(tmp_path / 'README.md', 'a', results)
        assert (tmp_path / 'README.md').read_bytes() == content
