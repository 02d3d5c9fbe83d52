"""Locks: a folder that a program writes to is its own until it ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import cannot_write, check_writable, write_json

__all__ = ['check_free', 'occupied']

ORPHANS_SECONDS = 15.0  # workers of a killed process hold its lock until they notice, within 5 s
TRY_SECONDS = 1.0  # another process may hold it for a moment, to see whether it is free


@contextmanager
def occupied(folder: Path, seconds: float = TRY_SECONDS) -> Iterator[None]:
    """Keep a folder to this process inside the block: two that wrote to one would mix their results.

    The lock is the kernel's and ends with the process, however that ends; a file beside it says whose it is. Workers
    of a killed process hold its lock until they notice, so the lock of a process that is gone is waited for.

    Args:
        folder: the folder.
        seconds: how long to wait for a process that has it.

    Raises:
        AsrError: another process has it, or it cannot be written.
    """
    owner = folder / '.lock_owner.json'
    check_writable(folder)
    lock = acquire(folder / '.lock', folder, max(seconds, ORPHANS_SECONDS) if owner_is_gone(owner) else seconds)
    try:
        now = time.strftime('%Y-%m-%d %H:%M:%S')
        write_json(owner, {'process': os.getpid(), 'host': socket.gethostname(), 'since': now})
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def check_free(folder: Path) -> None:
    """Refuse a folder that another process has, before the work that ends in `occupied`; makes no files.

    Raises:
        AsrError: another process has it.
    """
    path, owner = folder / '.lock', folder / '.lock_owner.json'
    if path.exists() and not owner_is_gone(owner):  # `occupied` waits for its workers
        acquire(path, folder, TRY_SECONDS).release()


def acquire(path: Path, folder: Path, seconds: float) -> FileLock:
    """Take the lock of a folder; see `occupied`."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        owner = owner_text(folder / '.lock_owner.json')
        raise AsrError(f'{folder}: is in use by {owner}; wait for it, or choose another folder') from None
    except NotImplementedError as error:  # a file system without locks
        raise AsrError(f'{folder}: cannot be locked ({error}); choose a folder on another file system') from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return lock


def owner_of(note: Path) -> dict[str, Any]:
    """Read the note of `occupied`; empty if there is none."""
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def owner_is_gone(note: Path) -> bool:
    """Whether the process that a note names was on this machine and has ended."""
    owner = owner_of(note)
    if owner.get('host') != socket.gethostname() or not isinstance(owner.get('process'), int):
        return False
    try:
        os.kill(owner['process'], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def owner_text(note: Path) -> str:
    """Say whose lock it is."""
    owner = owner_of(note)
    if not owner:
        return 'another process'
    return f'process {owner.get("process")} on {owner.get("host")} since {owner.get("since")}'
