"""The file of an adapter: constants of each site in float64, whole tensors of heads, and what base they belong to.

A safetensors file. Tensors are named ``gate:PATH``, ``shift:PATH`` and ``inputs:PATH`` (float64, one number a channel),
``head:NAME`` (a whole tensor, as it was trained), ``learnt:NAME`` (parameters of the gates, to train on), and ``base``
(a digest a frozen tensor, in the order of their names). Its metadata has one entry, `KEY`, of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from asr_downstream.console.text import Printed, some
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import size, write_atomically
from asr_downstream.files.weights import damaged, is_finite
from asr_downstream.folding.adapters.base import SIZE, Frozen
from asr_downstream.folding.adapters.layers import KINDS
from asr_downstream.modules.affine import Constants

__all__ = ['Adapter', 'Site', 'list_gates', 'read_adapter', 'write_adapter']

KEY = 'asr_downstream'
FORMAT = 1
SUFFIX = '.safetensors'
MOST = 16 << 20  # bytes of the header of a file: names, shapes and metadata
BASE = 'base'
CONSTANTS = Constants._fields
PREFIXES = (*CONSTANTS, 'head', 'learnt')


@dataclass(frozen=True)
class Site:
    """Constants of one layer.

    Attributes:
        layer: class of torch that the layer is, or extends.
        groups: of a convolution.
        constants: on the CPU, in float64.
    """

    layer: str
    groups: int
    constants: Constants


@dataclass(frozen=True, repr=False)
class Adapter(Printed):
    """What an adapter file holds; prints as a table.

    Attributes:
        sites: by their paths in the model.
        base: the tensors that it leaves as they are.
        heads: whole tensors of the model, by their names.
        learnt: parameters and buffers of the gates, by their names in the plugged model; empty unless asked for.
        model: class of the model.
        spec: what was plugged: path of the plugged part -> its specs; of a converted file, where it comes from.
        about: anything else, as JSON holds it.
        versions: of what has written it.
        path: of the file.
    """

    sites: dict[str, Site]
    base: Frozen
    heads: dict[str, Tensor] = field(default_factory=dict)
    learnt: dict[str, Tensor] = field(default_factory=dict)
    model: str = ''
    spec: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def name(self) -> str:
        """How messages name it."""
        return 'the adapter' if self.path is None else str(self.path)

    @property
    def numbers(self) -> int:
        """Number of constants."""
        return sum(v.numel() for site in self.sites.values() for v in site.constants if v is not None)

    def parts(self) -> list[Any]:
        from rich.table import Table

        table = Table('site', 'layer', 'channels', 'gates', 'mean', 'shift', 'side')
        for path, site in self.sites.items():
            gate, shift, inputs = site.constants
            scale = gate if inputs is None else inputs
            table.add_row(
                path,
                site.layer,
                str(next(v.numel() for v in site.constants if v is not None)),
                '' if scale is None else f'{scale.min():.3f} to {scale.max():.3f}',
                '' if scale is None else f'{scale.mean():.3f}',
                '' if shift is None else f'{shift.min():.3f} to {shift.max():.3f}',
                'output' if inputs is None else 'input' if gate is None else 'both',
            )
        heads = sum(v.numel() for v in self.heads.values())
        there = self.path is not None and self.path.is_file()  # it may have been moved since
        taken = f', {size(self.path.stat().st_size)}' if there and self.path else ''
        lines = [
            f'{self.name}: {self.numbers:,} constants of {len(self.sites)} layers for {self.model or "a model"}{taken}',
            f'heads: {some(list(self.heads))} ({heads:,} numbers)' if self.heads else 'heads: none',
            f'base: {self.base.digest}, {len(self.base.tensors)} tensors',
            f'spec: {json.dumps(self.spec)}',
        ]
        return [table, *lines, *([f'about: {json.dumps(self.about)}'] if self.about else [])]


def list_gates(path: str | Path) -> Adapter:
    """Read an adapter file; what is returned prints as a table of its sites.

    Args:
        path: what `asr_downstream.save_gates` has written.

    Raises:
        CheckpointError: it is missing or damaged, or no adapter.
    """
    return read_adapter(path)


def write_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter file, whole or not at all.

    Raises:
        AsrError: the name does not end in ``.safetensors``, or it cannot be written.
    """
    if path.suffix != SUFFIX:
        raise AsrError(f'{path}: the file of an adapter should end in {SUFFIX}')
    tensors = {
        f'{kind}:{at}': value
        for at, site in adapter.sites.items()
        for kind, value in zip(CONSTANTS, site.constants, strict=True)
        if value is not None
    }
    tensors |= {f'head:{name}': value for name, value in adapter.heads.items()}
    tensors |= {f'learnt:{name}': value for name, value in adapter.learnt.items()}
    tensors[BASE] = torch.tensor([list(bytes.fromhex(d)) for d in adapter.base.tensors], dtype=torch.uint8).view(
        -1, SIZE
    )
    content = {
        'format': FORMAT,
        'model': adapter.model,
        'sites': [{'path': at, 'layer': s.layer, 'groups': s.groups} for at, s in adapter.sites.items()],
        'base': {'digest': adapter.base.digest, 'names': adapter.base.names},
        'spec': adapter.spec,
        'about': adapter.about,
        'versions': adapter.versions,
    }
    own = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    metadata = {KEY: json.dumps(content)}  # of several entries, the order would change from file to file
    write_atomically(path, lambda p: save_file(own, p, metadata), sum(v.nbytes for v in own.values()))


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file that anyone may have written: nothing in it is run, and all of it is checked.

    Raises:
        CheckpointError: it is missing or damaged, or no adapter.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path}: no such adapter; check the path')
    check_header(path)
    try:
        with safe_open(path, framework='pt') as file:
            said = (file.metadata() or {}).get(KEY)
            if said is None:
                raise CheckpointError(
                    f'{path}: is no adapter of asr_downstream; files of peft and LyCORIS are converted by '
                    f'"asr-downstream gates convert"'
                )
            content = parsed(path, said)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes lead anywhere
        raise damaged(path, error) from error
    return checked(path, content, tensors)


def check_header(path: Path) -> None:
    """Refuse a file whose header would take much memory to read."""
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
    if not 2 <= length <= min(MOST, path.stat().st_size - 8):
        raise CheckpointError(f'{path}: is no safetensors file, or damaged; copy it again')


def parsed(path: Path, said: str) -> dict[str, Any]:
    """Parse the metadata, and check the kinds of its values.

    Raises:
        CheckpointError: something is not as `write_adapter` writes it.
    """
    try:
        content = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise wrong(path, 'its metadata cannot be read') from error
    if not isinstance(content, dict) or type(content.get('format')) is not int:
        raise wrong(path, 'its metadata has no format')
    if content['format'] != FORMAT:
        raise CheckpointError(f'{path}: format {content["format"]} is not known; update asr_downstream')
    texts: Callable[[Any], bool] = lambda value: all(isinstance(item, str) for item in value.values())  # noqa: E731
    kinds = {'model': str, 'sites': list, 'base': dict, 'about': dict, 'versions': dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise wrong(path, f'{key!r} in its metadata is no {kind.__name__}')
    if not texts(content['base']) or content['base'].keys() != {'digest', 'names'} or not texts(content['versions']):
        raise wrong(path, "'base' or 'versions' in its metadata is not as written")
    for site in content['sites']:
        names = (site.get('path'), site.get('layer')) if isinstance(site, dict) else ()
        if not names or not all(isinstance(name, str) for name in names) or site['layer'] not in KINDS:
            raise wrong(path, f'a site in its metadata is {str(site)[:80]!r}')
        if type(site.get('groups')) is not int or site['groups'] < 1:
            raise wrong(path, f'groups={site.get("groups")!r:.40} of a site')
    return content


def checked(path: Path, content: Mapping[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    """Check the tensors against the metadata, and make the adapter."""
    sites = {site['path']: site for site in content['sites']}
    strange = [n for n in (content['model'], *sites, *tensors, *content['versions']) if not n.isprintable()]
    if strange or len(sites) != len(content['sites']):
        raise wrong(path, f'a name is {strange[0]!r:.80}' if strange else 'a site is in it twice')
    by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in PREFIXES}
    packed = tensors.pop(BASE, None)
    for name, value in tensors.items():
        kind, colon, at = name.partition(':')
        if not colon or kind not in by_kind or (kind in CONSTANTS and at not in sites):
            raise wrong(path, f'a tensor is named {name[:80]!r}')
        if kind in CONSTANTS and (value.dtype != torch.float64 or value.dim() != 1 or not value.numel()):
            raise wrong(path, f'{name[:80]!r} should be float64 numbers, one a channel')
        if not is_finite(value):
            raise wrong(path, f'{name[:80]!r} is not finite', 'the training that wrote it had diverged')
        by_kind[kind][at] = value
    found = {at: Constants(*(by_kind[kind].get(at) for kind in CONSTANTS)) for at in sites}
    if empty := [at for at, constants in found.items() if all(v is None for v in constants)]:
        raise wrong(path, f'{empty[0][:80]!r} has no constants')
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != SIZE:
        raise wrong(path, 'it has no digests of its base')
    base = Frozen(content['base']['names'], tuple(bytes(row).hex() for row in packed.tolist()))
    if base.digest != content['base']['digest']:
        raise wrong(path, 'the digests of its base do not fit each other')
    return Adapter(
        {at: Site(site['layer'], site['groups'], found[at]) for at, site in sites.items()},
        base,
        by_kind['head'],
        by_kind['learnt'],
        content['model'],
        content.get('spec'),
        content['about'],
        content['versions'],
        path,
    )


def wrong(path: Path, what: str, next: str = 'copy it again') -> CheckpointError:
    """Error for a file that `write_adapter` has not written."""
    return CheckpointError(f'{path}: is no sound adapter ({what}); {next}')
