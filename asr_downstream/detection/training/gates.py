"""A hook that writes the statistics of gates over a training of a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from asr_downstream.detection.training.loops import bare
from asr_downstream.folding.analysis.training import FILE, GateRecorder
from asr_downstream.registry import HOOKS

__all__ = ['GatesHook']


@HOOKS.register_module()
class GatesHook(Hook):
    """Writes ``gates.jsonl`` to the work dir, see `asr_downstream.folding.analysis.training`.

        custom_hooks = [dict(type='asr_downstream.GatesHook', interval=100)]

    ``asr-downstream analyze stripes`` draws what it has written.

    Args:
        interval: number of steps from line to line.
        images: that a line is about, at least.
    """

    def __init__(self, interval: int = 100, images: int = 64) -> None:
        self.interval, self.images = interval, images
        self.recorder: GateRecorder | None = None

    def before_train(self, runner: Runner) -> None:
        """Open the file, on the main process."""
        if is_main_process():
            path = Path(runner.work_dir) / FILE
            self.recorder = GateRecorder(bare(runner.model), path, self.interval, self.images, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Watch the step if it is due."""
        if self.recorder is not None:
            self.recorder.before(runner.iter + 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Take its gates."""
        if self.recorder is not None:
            self.recorder.after(runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        """Stop watching."""
        if self.recorder is not None:
            self.recorder.close()
