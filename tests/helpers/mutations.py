"""Seeded mutations of files: what disks, copies, editors and people who mean harm do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ['JSON_MUTATIONS', 'MUTATIONS', 'mutate']

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2.5,
    1e308,
    float('nan'),
    'x',
    '',
    [],
    [None],
    {},
    {'a': 1},
    '../../x',
    '\x00',
)


def truncate(content: bytes, stream: random.Random) -> bytes:
    """Cut the end off."""
    return content[: stream.randrange(len(content))]


def flip(content: bytes, stream: random.Random) -> bytes:
    """Turn over up to 16 bits."""
    changed = bytearray(content)
    for _ in range(stream.randint(1, 16)):
        changed[stream.randrange(len(changed))] ^= 1 << stream.randrange(8)
    return bytes(changed)


def zeros(content: bytes, stream: random.Random) -> bytes:
    """Lose a block, as after a crash of the machine."""
    start = stream.randrange(len(content))
    size = min(4096, len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def swap(content: bytes, stream: random.Random) -> bytes:
    """Exchange two halves of a part."""
    a, b, c = sorted(stream.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def huge_length(content: bytes, stream: random.Random) -> bytes:
    """Claim a length, where formats have one, that no file has."""
    length = stream.choice([2**63 - 1, 2**40, len(content) + 1, 2**64 - 1])
    return length.to_bytes(8, 'little') + content[8:]


def empty(content: bytes, stream: random.Random) -> bytes:
    """Leave nothing."""
    return b''


def twice(content: bytes, stream: random.Random) -> bytes:
    """Write it two times."""
    return content + content


def noise(content: bytes, stream: random.Random) -> bytes:
    """Put random bytes in its place."""
    return stream.randbytes(max(1, min(len(content), 5000)))


def wrong_value(content: bytes, stream: random.Random) -> bytes:
    """Change a value somewhere in JSON to one of another kind."""
    document = json.loads(content)
    parents = list(containers(document))
    if not parents:
        return b'[]'
    parent = stream.choice(parents)
    key = stream.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key] = stream.choice(VALUES)
    return json.dumps(document).encode()


def lost_key(content: bytes, stream: random.Random) -> bytes:
    """Take a value out of JSON."""
    document = json.loads(content)
    parents = list(containers(document))
    if not parents:
        return b'{}'
    parent = stream.choice(parents)
    del parent[stream.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))]
    return json.dumps(document).encode()


def other_root(content: bytes, stream: random.Random) -> bytes:
    """Put another value in the place of a whole JSON document."""
    return stream.choice([b'null', b'[]', b'{}', b'3', b'"x"', b'[' * 100_000, b'\xff\xfe{}', b'{"a": NaN}'])


def containers(value: Any) -> list[Any]:
    """Every dict and list in a document that has something in it."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if inner else []) + [found for item in inner for found in containers(item)]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    m.__name__: m for m in (truncate, flip, zeros, swap, huge_length, empty, twice, noise)
}
JSON_MUTATIONS = MUTATIONS | {m.__name__: m for m in (wrong_value, lost_key, other_root)}


def mutate(path: Path, name: str, seed: int) -> bool:
    """Mutate a file in place; say whether it is another one now."""
    before = path.read_bytes()
    after = JSON_MUTATIONS[name](before, random.Random(f'{path.name} {name} {seed}'))
    path.write_bytes(after)
    return after != before
