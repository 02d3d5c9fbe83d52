"""Denoising for FAR: the self-attention of a run of diffusion/train.py replaced by LSTMs, trained on its data.

Model, noise schedule, condition and sample grids are those of the run, how it is trained is up to the FAR config. What
comes out is a run again, for diffusion/evaluate.py and diffusion/sample.py.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from asr_downstream.console.text import some
from asr_downstream.diffusion import config as diffusion
from asr_downstream.diffusion.models.build import check_gates, gated
from asr_downstream.diffusion.runs import load_run, read_run_config
from asr_downstream.diffusion.training.task import Denoising
from asr_downstream.engine import defaults
from asr_downstream.engine.config import portable
from asr_downstream.engine.optim import decay_of, decaying_groups
from asr_downstream.errors import AsrError, PlugError
from asr_downstream.far.config import SCHEMA
from asr_downstream.files.configs import plain
from asr_downstream.plugging.describe import describe
from asr_downstream.registry import TASKS

__all__ = ['Replaced']

# Of the keys that every training has, what the FAR config does not say of a diffusion training.
NOT_TRAINING = ('custom_imports', 'data', 'output_dir')
CLASSIFICATION = ('augment', 'image_mean', 'image_std')


@TASKS.register_module(name='Denoising')
class Replaced(Denoising):
    """Denoising by a model whose self-attention is replaced.

    Args:
        config: a FAR config, or that of a stage, with ``teacher=dict(run=...)``.
        model: the student; default: the teacher, with the averaged weights of the run, if it has some.

    Raises:
        AsrError: the run is not there, the config asks for what only a classifier has, or they do not fit each other.
        PlugError: gates of the run depend on the image, or would go with the attention.
    """

    schema = SCHEMA
    fixed = ('teacher', 'replace', 'learns', 'task_weight', 'distance', 'hoyer')

    def __init__(self, config: Config, model: nn.Module | None = None) -> None:
        self.far = config
        folder = folder_of(config)
        self.stored = read_run_config(folder)
        settings = put_over(self.stored, config)
        parts = load_run(folder, data=True, config=settings).parts
        check_folds(parts.model)
        if model is not None:
            check_gates(gated(parts.model), model)
            parts.model = model
        super().__init__(settings, parts)

    def use(self, config: Config) -> None:
        """Use a FAR config from here on."""
        self.far = config

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """Matrices and kernels decay, vectors (biases, norms) do not."""
        return decaying_groups(self.model, decay_of(config))

    def example(self, batch: int = 1) -> dict[str, Any]:
        """Arguments of a forward on noise."""
        return self.parts.inputs(batch)

    def config_text(self) -> str:
        """Resolved diffusion config, with what was replaced."""
        settings = put_over(self.stored, self.far)  # again: `use` may have changed the steps
        condition = self.parts.condition.complete(settings.to_dict()['condition'])
        return portable(settings, condition=condition, replace=plain(getattr(self.model, 'replace_spec', None)))


def check_folds(teacher: nn.Module) -> None:
    """Refuse gates that cannot be folded when the model is shipped, before it is trained.

    Raises:
        PlugError: see above.
    """
    if dynamic := [site.path for site in describe(teacher).sites if not site.folds]:
        raise PlugError(
            f'teacher: the gates of {some(dynamic)} depend on the image, so the model could not be shipped; take a run '
            f'without a plug, or one whose gates are constant, such as ASR'
        )


def folder_of(config: Config) -> Path:
    """Folder of the teacher, of a config that Denoising can work with.

    Raises:
        AsrError: it cannot.
    """
    spec = plain(config.teacher)
    if set(spec) != {'run'} or not isinstance(spec['run'], str):
        raise AsrError(f"teacher={spec}: should be dict(run='work_dirs/...'), a folder of diffusion/train.py")
    if 'teacher' in (config.learns, *(stage.get('learns') for stage in config.stages)):
        raise AsrError(
            "learns='teacher': the teacher of Denoising is a run; train it with diffusion/train.py, give its folder "
            'as teacher=dict(run=...), and leave this stage out'
        )
    if given := [key for key in CLASSIFICATION if config[key]]:
        raise AsrError(
            f'{", ".join(given)}: is of Classification; Denoising takes images as the run of the teacher did'
        )
    if not Path(spec['run']).is_dir():
        raise AsrError(f'teacher: {spec["run"]}: no such run; train it with diffusion/train.py first')
    return Path(spec['run'])


def put_over(stored: Config, config: Config) -> Config:
    """Diffusion config of a training: that of the run, trained as the FAR config says.

    The data are those of the FAR config if it says where they are, at the resolution of the run.
    """
    keys = [key for key in inspect.get_annotations(defaults) if key not in NOT_TRAINING]
    changes = {key: plain(config[key]) for key in keys}
    changes['custom_imports'] = both_imports(stored, config)
    changes |= {'learns': 'all', 'save_pipeline_steps': 0}  # what learns is up to the stages; LSTMs are no pipeline
    if config.data.get('path'):
        resolution = stored.data.get('resolution')
        changes['data'] = {**plain(stored.data), **plain(config.data), 'resolution': resolution}
    return diffusion.SCHEMA.from_dict({**plain(stored.to_dict()), **changes}, str(stored.filename))


def both_imports(stored: Config, config: Config) -> dict[str, Any] | None:
    """``custom_imports`` of two configs as one, each module once."""
    found: list[str] = []
    for named in (stored.custom_imports, config.custom_imports):
        modules = plain(named['imports']) if named else []
        found += [name for name in ([modules] if isinstance(modules, str) else modules) if name not in found]
    return {'imports': found} if found else None
