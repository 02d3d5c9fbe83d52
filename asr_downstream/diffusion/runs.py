"""Reading a run: its config and the weights of one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.models.components import Parts, build_parts
from asr_downstream.engine.config import CONFIG_FILE
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.train_state import AVERAGE, WEIGHTS
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import sha256
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.plugging.weights import check_weights_finite, load_state

__all__ = ['Run', 'load_run', 'read_run_config']


@dataclass
class Run:
    """A trained model.

    Attributes:
        folder: of the run.
        config: resolved.
        checkpoint: that was read.
        step: of the checkpoint.
        ema: whether the weights are the average.
        sha256: of the file of the weights.
        parts: model (eval mode, CPU, plugged as the config says), schedule, condition, VAE, images.
    """

    folder: Path
    config: Config
    checkpoint: Path
    step: int
    ema: bool
    sha256: str
    parts: Parts


def read_run_config(path: Path, data: Path | None = None) -> Config:
    """Read the config of a run.

    Args:
        path: folder of the run, or of one of its checkpoints.
        data: where the images are, instead of what it says.

    Raises:
        CheckpointError: this is no run.
    """
    folder = checkpoints.run_of(path)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f'{path}: is no run of diffusion/train.py (it has no {CONFIG_FILE})')
    return load_config(folder / CONFIG_FILE, data=data)


def load_run(path: Path, data: bool | Path = False, ema: bool | None = None, config: Config | None = None) -> Run:
    """Read a run.

    Args:
        path: folder of the run, for its newest complete checkpoint, or of one checkpoint.
        data: whether to open the images; or where they are.
        ema: whether to read the average of the weights; None: if the run has one.
        config: instead of that of the run; for the same model.

    Raises:
        CheckpointError: this is no run, it has no complete checkpoint, or no average.
        DataError: the images are not there.
    """
    folder = checkpoints.run_of(path)
    config = config or read_run_config(path, data if isinstance(data, Path) else None)
    checkpoint = checkpoints.find(folder, 'latest' if folder == path.resolve() else str(path))
    if ema is None:
        ema = (checkpoint / AVERAGE).is_file()
    weights = checkpoint / (AVERAGE if ema else WEIGHTS)
    if not weights.is_file():
        raise CheckpointError(f'{checkpoint}: has no {weights.name}; was it trained with use_ema=False?')
    state = state_dict_of(read_checkpoint(weights), weights)
    parts = build_parts(config, data=bool(data), trained=True)
    check_weights_finite(state, weights, parts.model)
    load_state(parts.model, state, weights)
    parts.model.eval()
    step = int(checkpoint.name.rpartition('-')[2])
    return Run(folder, config, checkpoint, step, ema, sha256(weights), parts)
