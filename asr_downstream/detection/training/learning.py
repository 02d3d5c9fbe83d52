"""What learns in a detector: ``learns`` and ``norm_statistics`` of a config, in MMEngine's Runner.

    learns = 'gates'                     # a word or pattern of `asr_downstream.plugging.learning.choose.choose`
    learns = ['gates', 'bbox_head.*']    # and the head, for other classes
    norm_statistics = 'running'          # of frozen batch norms, instead of 'frozen'

The base comes from ``load_from``, and what that has no weights for, or of another shape, learns as well.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from asr_downstream.detection.training.loops import bare
from asr_downstream.errors import AsrError, CheckpointError, warn
from asr_downstream.files.configs import plain
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.folding.adapters.base import remember
from asr_downstream.modules.slots import GATES, inside_gate
from asr_downstream.plugging.learning.choose import ALL, KEPT, Learning, choose, named_by, words_of
from asr_downstream.plugging.learning.restrict import restrict, trained_beside_gates, warn_of_another_start
from asr_downstream.plugging.weights import new_weights

__all__ = ['OWN', 'LearningHook', 'LearningRunner', 'learning_of']

META = 'asr_downstream_learns'  # in the meta of a checkpoint: what learnt, and what was new then


def learning_of(config: Config, model: nn.Module, trust: bool = False) -> Learning:
    """What learns in the model of a config.

    Args:
        config: of the training.
        model: built from it; is not changed.
        trust: read checkpoints that need unpickling.

    Raises:
        AsrError: ``learns`` means nothing in this model, or does not go with ``distil``.
        CheckpointError: ``load_from`` is of another model; or the checkpoint to resume from, of another training.
    """
    words = words_of(config.get('learns', ALL))
    new: list[str] = []
    if config.get('resume') and config.get('load_from'):
        new = resumed(Path(config.load_from), words, trust)
    elif words != (ALL,):
        if distils(config.model):
            raise AsrError(
                f'{config.filename}: learns={plain(config.learns)!r}, and distil has a learns of its own; say it there'
            )
        new = added(config, model, words, trust)
    learning = choose(model, words, new, config.get('norm_statistics', 'frozen'))
    optimizer = plain((config.get('optim_wrapper') or {}).get('optimizer'))
    if not isinstance(optimizer, dict):
        return learning  # several optimisers
    return learning.measured(model, lambda params: OPTIMIZERS.build({**optimizer, 'params': params}))


def resumed(path: Path, words: tuple[str, ...], trust: bool) -> list[str]:
    """What was new when the training began that goes on from a checkpoint.

    Raises:
        CheckpointError: something else learnt in it.
    """
    found = read_checkpoint(path, trust, mmap=True)['meta'].get(META) or {'learns': [ALL], 'new': []}
    if list(found['learns']) != list(words):
        raise CheckpointError(
            f'{path}: was trained with learns={found["learns"]}, the config says {list(words)}; use the config of that '
            f'training, or start from its weights with --load-from'
        )
    return list(found['new'])


def added(config: Config, model: nn.Module, words: tuple[str, ...], trust: bool) -> list[str]:
    """Names of the weights that the base does not have.

    Raises:
        CheckpointError: it is of another model.
    """
    name = config.get('load_from')
    if not name:
        warn(
            f'{config.filename}: learns={plain(config.learns)!r}, and no load_from: what is frozen stays as it is '
            f'drawn, but for the checkpoint of an init_cfg; give the base with --load-from'
        )
        return []
    path = Path(name)
    if '://' not in name:
        checkpoint = read_checkpoint(path, trust, mmap=True)
    elif trust:
        checkpoint = CheckpointLoader.load_checkpoint(name, map_location='cpu')
    else:
        raise CheckpointError(f'{name}: is fetched by MMEngine, which unpickles it; add --trust, or give a file')
    state = state_dict_of(checkpoint, path)
    new = new_weights(model, state, path, lambda key: named_by(words, key))
    if 'gates' in words and not any(GATES.search(key) for key in state):
        warn_of_another_start(model)
    return new


def distils(node: Any) -> bool:
    """Whether a model's config, or a part of it, has ``distil``."""
    if isinstance(node, dict):
        return bool(node.get('distil')) or any(map(distils, node.values()))
    return isinstance(node, list | tuple) and any(map(distils, node))


OWN = 'own_load_from'  # what ``load_from`` of a config was before a resumption took its place


class LearningRunner(Runner):
    """MMEngine's Runner, in which what the config says learns, and the optimiser has nothing else.

    The model is restricted before it is wrapped for a launch, and before ``load_from`` is loaded.
    """

    def dump_config(self) -> None:
        """Write the config; what this training goes on from is no part of it, or another one would go on from there."""
        if not is_main_process():
            return
        config = copy.deepcopy(self.cfg)
        if OWN in config:
            config.update(resume=False, load_from=config.pop(OWN))
        name = Path(config.filename).name if config.filename else f'{self.timestamp}.py'
        config.dump(str(Path(self.work_dir) / name))

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """Build the logs; by the name in mmdet's configs, a second training of a program would write to the first."""
        if isinstance(visualizer, dict):
            visualizer = {**visualizer, 'name': f'{visualizer.get("name", "visualizer")} of {self._log_dir}'}
        return super().build_visualizer(visualizer)

    def build_model(self, model: Any) -> nn.Module:
        """Build the model."""
        built = super().build_model(model)
        # `prepare` has read what is loaded with the trust that was given, and MMEngine will read it so
        restrict(built, learning_of(self.cfg, built, trust=True))
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Build the optimiser; MMEngine's own constructor gives it what is frozen, too."""
        built = super().build_optim_wrapper(optim_wrapper)
        if KEPT in vars(bare(self.model)):
            for wrapper in built.values() if isinstance(built, OptimWrapperDict) else [built]:
                groups = wrapper.optimizer.param_groups
                for group in groups:
                    group['params'] = [p for p in group['params'] if p.requires_grad]
                groups[:] = [group for group in groups if group['params']]
        return built

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Load the base as MMEngine does, which lists what is missing: not the gates, which no base has."""
        model = bare(self.model)
        handle = model.register_load_state_dict_post_hook(pass_over_gates) if KEPT in vars(model) else None
        try:
            return super().load_checkpoint(*args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()


def pass_over_gates(model: nn.Module, keys: Any) -> None:
    """Take gates out of the missing keys, in place: a hook of `load_state_dict`."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not inside_gate(model, key)]


class LearningHook(Hook):
    """Remembers the base of a training in which not everything learns, and what learns, for its checkpoints."""

    def before_train(self, runner: Runner) -> None:
        """Remember the base, which is loaded by now; averages of weights need no copies of what is frozen."""
        model = bare(runner.model)
        learning: Learning | None = vars(model).get(KEPT)
        if learning is None:
            return
        remember(model, trained_beside_gates(model), Path(runner.work_dir) if is_main_process() else None)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                share_frozen(hook.ema_model, model, learning)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Say what learns."""
        learning: Learning | None = vars(bare(runner.model)).get(KEPT)
        if learning is not None:
            checkpoint['meta'][META] = {'learns': list(learning.learns), 'new': list(learning.new)}


def share_frozen(average: Any, model: nn.Module, learning: Learning) -> None:
    """Let the average of MMEngine's EMAHook have the frozen parameters of the model itself, in place of copies."""
    own = dict(model.named_parameters())
    shared = set()
    for name, parameter in average.module.named_parameters():
        if name not in learning.names and parameter.device == own[name].device:
            parameter.data = own[name].data
            shared.add(name)
    tensors = average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters())
    average.avg_parameters = {name: value for name, value in tensors.items() if name not in shared}
