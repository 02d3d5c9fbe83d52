"""Folders that diffusers and transformers load: the part that an adapter is for, and its weights, shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from asr_downstream.console.text import some
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import read_json
from asr_downstream.files.weights import damaged, read_checkpoint, state_dict_of

__all__ = ['STEMS', 'Part', 'find_part', 'parts_of', 'weights_at']

# Names of files with weights, before their endings: those of diffusers, and of transformers.
STEMS = ('diffusion_pytorch_model', 'model')


@dataclass(frozen=True)
class Part:
    """A model in a folder.

    Attributes:
        folder: where its config and weights are.
        shards: file -> names of the tensors in it.
    """

    folder: Path
    shards: dict[Path, tuple[str, ...]]

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return {name for names in self.shards.values() for name in names}

    def state(self) -> dict[str, Tensor]:
        """Read the weights.

        Raises:
            CheckpointError: a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for path in self.shards:
            try:
                found |= load_file(path)
            except Exception as error:
                raise damaged(path, error) from error
        return found

    def write(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write weights of the same names to another folder, in the same files."""
        for path, names in self.shards.items():
            tensors = {name: state[name].contiguous() for name in names}
            save_file(tensors, folder / path.name, metadata_of(path))

    @property
    def stale(self) -> list[Path]:
        """Weights in other formats and precisions, which would still be those of the base."""
        kept = {*self.shards, *(self.folder / f'{stem}.safetensors.index.json' for stem in STEMS)}
        endings = ('.safetensors', '.bin', '.index.json', '.msgpack', '.h5', '.onnx', '.ckpt', '.pt', '.pth')
        return [p for p in self.folder.iterdir() if p.is_file() and p.name.endswith(endings) and p not in kept]


def find_part(folder: Path, names: Iterable[str]) -> Part:
    """Find the model in a folder, or of a pipeline the part, that has all tensors of these names.

    Raises:
        CheckpointError: none has, or several have.
    """
    wanted = {*names}
    parts = parts_of(folder)
    found = [part for part in parts if wanted <= part.names]
    if len(found) == 1:
        return found[0]
    if found:
        where = ', '.join(str(part.folder) for part in found)
        raise CheckpointError(f'{folder}: {where} have the layers of the adapter; give the folder of one of them')
    if not parts:
        raise CheckpointError(
            f'{folder}: holds no weights of diffusers or transformers in safetensors; save it again with '
            f'safe_serialization=True; of a run, fold it first'
        )
    where = ', '.join(str(part.folder) for part in parts)
    raise CheckpointError(f'{folder}: {where}: none has the layers of the adapter ({some(sorted(wanted), 3)})')


def weights_at(path: Path, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Read the weights in a file, or in a folder those of the model that has all of these names.

    Raises:
        CheckpointError: they cannot be read.
    """
    if path.is_dir():
        return find_part(path, names).state()
    return state_dict_of(read_checkpoint(path), path)


def parts_of(folder: Path) -> list[Part]:
    """Models in a folder and in the folders in it."""
    found = (part_in(each) for each in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())))
    return [part for part in found if part is not None]


def part_in(folder: Path) -> Part | None:
    """The model whose weights lie in a folder itself, in one file or in shards."""
    for stem in STEMS:
        single, index = folder / f'{stem}.safetensors', folder / f'{stem}.safetensors.index.json'
        if single.is_file():
            return Part(folder, {single: names_in(single)})
        if index.is_file():
            return Part(folder, {path: names_in(path) for path in listed(index)})
    return None


def listed(index: Path) -> list[Path]:
    """Files that the index of a model in shards names.

    Raises:
        CheckpointError: it is damaged, or names a file that is not there, or elsewhere.
    """
    try:
        names = sorted({*read_json(index)['weight_map'].values()})
        paths = [index.with_name(name) for name in names]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f'{index}: cannot be read ({error}); copy it again') from error
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f'{index}: names {some(missing, 3)}, which is not there; copy the folder again')
    return paths


def names_in(path: Path) -> tuple[str, ...]:
    """Names of the tensors of a file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, framework='pt') as file:
            return tuple(file.keys())
    except Exception as error:
        raise damaged(path, error) from error


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata of a file; the libraries load none without a format."""
    with safe_open(path, framework='pt') as file:
        return {'format': 'pt', **(file.metadata() or {})}
