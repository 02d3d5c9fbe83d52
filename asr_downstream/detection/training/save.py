"""Checkpoints of MMEngine's Runner, on the way to the disk: whole or not there, and never of a training that is lost.

Everything that MMEngine saves, from the last checkpoint to the best and the published ones, goes through the ``put`` of
its file backend: importing this module registers one that writes aside, flushes and renames.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from mmengine import hooks as engine
from mmengine.dist import is_main_process
from mmengine.fileio import FileClient, LocalBackend, register_backend
from mmengine.hooks import Hook, checkpoint_hook
from mmengine.runner import Runner
from mmengine.runner import checkpoint as runner_checkpoint

from asr_downstream.console.processes import Processes
from asr_downstream.console.text import some
from asr_downstream.detection.training.checkpoints import note_last, problem
from asr_downstream.detection.training.loops import POSITION, bare
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import flush, write_atomically
from asr_downstream.plugging.weights import load_state, not_finite
from asr_downstream.registry import HOOKS

__all__ = ['CheckpointHook', 'GuardHook', 'WholeFiles']

# In a checkpoint: names of the files that it takes the place of, for a training that was killed before it deleted them.
REPLACED = 'asr_downstream_replaced'


@register_backend('local', force=True, prefixes='')
class WholeFiles(LocalBackend):
    """MMEngine's backend of local files; what it writes has its name when it is complete, and not before."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        write_atomically(Path(filepath), lambda path: path.write_bytes(obj), needed=len(obj))
        flush(Path(filepath).parent)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text."""
        self.put(obj.encode(encoding), filepath)


class Later:
    """A file backend that only notes what is to be deleted."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.noted: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        """Note a file."""
        self.noted.append(path)

    rmtree = remove


class WantedClient(FileClient):
    """MMEngine's deprecated `FileClient`, only where ``file_client_args`` asks for one.

    MMEngine makes one for every checkpoint, which warns that it is deprecated, and then uses the file backend.
    """

    @classmethod
    def infer_client(cls, file_client_args: dict[str, Any] | None = None, uri: Any = None) -> Any:
        """Make the client that the arguments describe; None without arguments."""
        return None if file_client_args is None else FileClient.infer_client(file_client_args, uri)


checkpoint_hook.FileClient = runner_checkpoint.FileClient = WantedClient


@HOOKS.register_module()
class CheckpointHook(engine.CheckpointHook):
    """MMEngine's hook, which deletes an old checkpoint only when the new one is whole and noted as the last.

    The note, ``last_checkpoint``, is relative to the work dir. If a process cannot write, all end.
    """

    file_backend: Any
    keep_ckpt_ids: deque[int]

    def before_train(self, runner: Runner) -> None:
        """Find the folder, and delete what a killed training had replaced already."""
        super().before_train(runner)
        for key in [key for key in runner.message_hub.runtime_info if key.startswith('best_ckpt')]:
            self.move_best(runner, key)
        for name in runner.message_hub.get_info(REPLACED, []):
            self.delete(self.path_of(name))

    def move_best(self, runner: Runner, key: str) -> None:
        """Look for a best checkpoint in the folder of this run, of which it may be a copy."""
        path = self.path_of(Path(runner.message_hub.get_info(key)).name)
        runner.message_hub.update_info(key, path)
        if hasattr(self, 'best_ckpt_path'):
            self.best_ckpt_path = path
        elif hasattr(self, 'best_ckpt_path_dict'):
            self.best_ckpt_path_dict[key.removeprefix('best_ckpt_')] = path

    def path_of(self, name: str) -> str:
        """Path of a file in the folder of the checkpoints, as MMEngine writes paths."""
        return self.file_backend.join_path(self.out_dir, name)

    def delete(self, path: str) -> None:
        """Delete a checkpoint, if it is there; folders are DeepSpeed's."""
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def _save_checkpoint(self, runner: Runner) -> None:
        """Save; if one process cannot, all end."""
        Processes.of_launch().together(lambda: super(CheckpointHook, self)._save_checkpoint(runner))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save, note, and then delete those beyond ``max_keep_ckpts``."""
        old: list[str] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            steps = [*self.keep_ckpt_ids, step]
            old = [self.filename_tmpl.format(s) for s in steps[: -self.max_keep_ckpts]]
            self.keep_ckpt_ids = deque(steps[-self.max_keep_ckpts :], self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        noted = self.file_backend.noted if isinstance(self.file_backend, Later) else []
        runner.message_hub.update_info(REPLACED, [*(Path(path).name for path in noted), *old])
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.path_of(name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        if '://' in self.last_ckpt:
            write_atomically(Path(runner.work_dir) / 'last_checkpoint', lambda p: p.write_text(self.last_ckpt))
        else:
            if old and (reason := problem(Path(self.last_ckpt))):
                raise AsrError(f'{self.last_ckpt}: {reason}; {some(old)} were kept')
            note_last(Path(runner.work_dir), Path(self.last_ckpt))
        for name in old:
            self.delete(self.path_of(name))

    def _save_best_checkpoint(self, runner: Runner, metrics: Any) -> None:
        """Save the best one, and then delete the one that was the best before."""
        if not self.save_best:
            return
        backend = self.file_backend
        self.file_backend = later = Later(backend)
        try:
            Processes.of_launch().together(lambda: super(CheckpointHook, self)._save_best_checkpoint(runner, metrics))
        finally:
            self.file_backend = backend
        best = [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]
        for path in later.noted:
            if path not in (self.last_ckpt, *best):
                self.delete(path)


class GuardHook(Hook):
    """Lets no checkpoint be written whose weights are not finite, and none be resumed that is of another training."""

    priority = 'LOWEST'  # after averages have put their weights in the place of the model's

    def __init__(self) -> None:
        self.allowed: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Note what is not finite by design, such as masks."""
        self.allowed = set(not_finite(bare(runner.model).state_dict()))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Look at the weights, and at those of an average; say how far the epoch is.

        Raises:
            AsrError: the training has diverged.
        """
        for key in ('state_dict', 'ema_state_dict'):
            broken = not_finite(checkpoint.get(key, {}))
            if broken := [name for name in broken if name.removeprefix('module.') not in self.allowed]:
                raise AsrError(
                    f'step {checkpoint["meta"]["iter"]}: {some(broken)} {"is" if len(broken) == 1 else "are"} not '
                    f'finite: the training diverged, and no checkpoint was written; go on from an earlier one with a '
                    f'lower learning rate, or clip gradients (optim_wrapper.clip_grad)'
                )
        if hasattr(runner.train_loop, 'position'):
            checkpoint['meta'][POSITION] = runner.train_loop.position(checkpoint['meta'])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare what a training goes on from with what the config builds.

        Raises:
            CheckpointError: weights or optimiser are those of another one.
        """
        if not runner._resume:
            return
        path = Path(runner._load_from)
        load_state(bare(runner.model), checkpoint['state_dict'], path)
        if groups(runner.optim_wrapper.state_dict()) != groups(checkpoint['optimizer']):
            raise CheckpointError(
                f'{path}: its optimiser trains other weights than the config says (learns, frozen stages, '
                f'paramwise_cfg); use the config it was trained with, or start from its weights with --load-from'
            )
        if hasattr(runner.train_loop, 'take_up'):
            runner.train_loop.take_up(checkpoint)


def groups(state: dict[str, Any]) -> list[int]:
    """Number of weights in each group, in the state of an optimiser, or of several by name."""
    if 'param_groups' in state:
        return [len(group['params']) for group in state['param_groups']]
    return [count for inner in state.values() if isinstance(inner, dict) for count in groups(inner)]
