"""Pushing to the hub, up to the request: a server of this machine takes what huggingface_hub sends."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hub import Hub
from huggingface_hub import HfApi

from asr_downstream.errors import AsrError
from asr_downstream.files.hub import check_repo, files_under, push


def api_of(hub: Hub) -> HfApi:
    return HfApi(hub.url, token='hf_test')


def test_what_is_pushed_is_what_was_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / 'unet').mkdir()
    (tmp_path / 'unet/weights.safetensors').write_bytes(bytes(range(256)))
    (tmp_path / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# a model\n')
    files = files_under(tmp_path)
    assert list(files) == ['README.md', 'unet/weights.safetensors']
    assert (
        push({**files, 'note.txt': b'text'}, 'user/name', private=True, api=api_of(hub))
        == f'{hub.url}/user/name/commit/1'
    )
    assert hub.files == {
        'README.md': (tmp_path / 'README.md').read_bytes(),
        'unet/weights.safetensors': bytes(range(256)),
        'note.txt': b'text',
    }
    assert hub.tokens == {'Bearer hf_test'}
    (made,) = hub.created
    assert (made['name'], made['organization']) == ('name', 'user')
    assert made.get('private') is True or made.get('visibility') == 'private'


def test_a_hub_that_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    (tmp_path / 'README.md').write_text('text')
    with pytest.raises(AsrError, match=r'--push-to-hub user/name: .*what was written is here still') as caught:
        push(files_under(tmp_path), 'user/name', api=api_of(hub))
    assert '\n' not in str(caught.value)
    assert not hub.files


def test_a_hub_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AsrError, match='--push-to-hub user/name: '):
        push({'a': b''}, 'user/name', api=HfApi('http://127.0.0.1:9', token='hf_test'))


@pytest.mark.parametrize(
    ('repo', 'message'),
    [
        ('name', 'should be USER/NAME'),
        ('a/b/c', 'is no name of a repository'),
        ('user/na me', 'is no name of a repository'),
        ('user/name', 'there is no token; log in with'),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_work(
    repo: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'token'))
    with pytest.raises(AsrError, match=message):
        check_repo(repo)


def test_a_token_of_the_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_test')
    check_repo('user/name')
