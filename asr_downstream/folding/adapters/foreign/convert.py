"""`convert_gates`: IA3 of peft, and IA3 and norms of LyCORIS, as adapter files of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import sha256
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.folding.adapters.base import Frozen, base_state, digests
from asr_downstream.folding.adapters.file import Adapter, write_adapter
from asr_downstream.folding.adapters.foreign.base import Layers, by_module, refuse_others
from asr_downstream.folding.adapters.foreign.lycoris import MARKS, read_lycoris
from asr_downstream.folding.adapters.foreign.peft import CONFIG, SCALES, read_peft
from asr_downstream.measure.versions import versions

__all__ = ['convert_gates']

WEIGHTS = ('adapter_model.safetensors', 'adapter_model.bin')


def convert_gates(
    source: str | Path, path: str | Path, base: nn.Module | Mapping[str, Tensor], model: str = ''
) -> Adapter:
    """Convert an adapter of another library that scales channels.

    Args:
        source: file of peft (or the folder with it) or of LyCORIS; nothing in it is run.
        path: file to write, ``.safetensors``.
        base: what it was trained on: a stock model, or its weights. The new file belongs to it.
        model: name of the class of the base, where weights are given.

    Returns:
        What was written, which prints as a table.

    Raises:
        CheckpointError: it is made of something else than scales of channels (LoRA, LoKr, ...), which is named; or it
            does not fit the base.
        AsrError: the file cannot be written.
    """
    file = weights_of(Path(source))
    tensors = state_dict_of(read_checkpoint(file), file)
    given = isinstance(base, nn.Module)
    state = base_state(base) if isinstance(base, nn.Module) else base
    layers = Layers(state, base if isinstance(base, nn.Module) else None)
    if any(name.rpartition('.')[2] == SCALES for name in tensors) or (file.parent / CONFIG).is_file():
        found = read_peft(file, tensors, layers)
    elif any(name.rpartition('.')[2] in MARKS for name in tensors):
        found = read_lycoris(file, tensors, layers)
    else:
        for name, own in by_module(tensors).items():
            refuse_others(name, own, {})
        raise CheckpointError(f'{file}: is empty')
    if not found.sites:
        raise CheckpointError(f'{file}: has no scales of channels to convert')
    adapter = Adapter(
        found.sites,
        Frozen.of(digests({name: value for name, value in state.items() if name not in found.heads})),
        found.heads,
        model=type(base).__name__ if given else model,
        spec={'converted': found.method},
        about={'source': file.name, 'sha256': sha256(file)},
        versions={key: value for key, value in versions().items() if key not in ('machine', 'accelerator')},
        path=Path(path),
    )
    write_adapter(adapter, Path(path))
    return adapter


def weights_of(source: Path) -> Path:
    """File with the weights of an adapter.

    Raises:
        CheckpointError: it is not there.
    """
    if not source.is_dir():
        return source
    found = next((source / name for name in WEIGHTS if (source / name).is_file()), None)
    if found is None:
        raise CheckpointError(f'{source}: has neither {" nor ".join(WEIGHTS)}; give the file itself')
    return found
