"""Pushing what was written to a repository of the Hugging Face hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import first_line

__all__ = ['check_repo', 'files_under', 'push']


def check_repo(repo: str, api: Any = None) -> None:
    """Refuse a repository that cannot be pushed to, before the work; asks nobody.

    Args:
        repo: ``'user/name'``.
        api: `huggingface_hub.HfApi`; default: the hub, or ``HF_ENDPOINT``.

    Raises:
        AsrError: this is no name of a repository, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise AsrError(f'--push-to-hub {repo}: is no name of a repository ({first_line(error)})') from error
    if repo.count('/') != 1:
        raise AsrError(f'--push-to-hub {repo}: should be USER/NAME, or ORGANISATION/NAME')
    if not (getattr(api, 'token', None) or get_token()):
        raise AsrError(f'--push-to-hub {repo}: there is no token; log in with `hf auth login`, or set HF_TOKEN')


def files_under(folder: Path) -> dict[str, Path]:
    """Files of a folder, under their names in a repository."""
    found = sorted(path for path in folder.rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def push(files: Mapping[str, Path | bytes], repo: str, private: bool = False, api: Any = None) -> str:
    """Push files to a repository, which is made if it is not there; others in it stay.

    Args:
        files: name in the repository -> file, or what is in it.
        repo: ``'user/name'``.
        private: of a repository that is made.
        api: see `check_repo`.

    Returns:
        Address of the commit.

    Raises:
        AsrError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    operations = [
        CommitOperationAdd(name, value if isinstance(value, bytes) else str(value)) for name, value in files.items()
    ]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message='Upload by asr_downstream').commit_url)
    except Exception as error:  # of the hub, of HTTP, of the file system
        raise AsrError(
            f'--push-to-hub {repo}: {first_line(error)}; what was written is here still: `hf upload {repo} PATH` '
            f'pushes it'
        ) from error
