"""Parts of pretrained pipelines: which folder a model is in, its weights in full, the noise schedule it was trained on.

A pipeline of diffusers is a folder, or a repository of the hub, whose ``model_index.json`` lists its parts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from asr_downstream.console.text import some
from asr_downstream.diffusion.models.process import FLOW
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import first_line
from asr_downstream.modules.slots import GATES
from asr_downstream.plugging.weights import check_weights_finite

__all__ = ['DEFINING', 'PATH', 'find_model', 'load_whole', 'noise_schedule', 'resumed_schedule', 'same_schedule']

INDEX, SCHEDULER = 'model_index.json', 'scheduler_config.json'
PATH, SUBFOLDER = 'pretrained_model_name_or_path', 'subfolder'
# What makes a noise schedule another one for the model; the rest is how it is sampled.
DEFINING = (
    'prediction_type', 'num_train_timesteps', 'beta_schedule', 'beta_start', 'beta_end', 'trained_betas',
    'rescale_betas_zero_snr', 'shift',
)  # fmt: skip
SAID = ('beta_schedule', 'num_train_timesteps', 'prediction_type')  # a config that says these needs no pipeline


class UnreadableError(AsrError):
    """A pipeline, or its scheduler, cannot be read."""


@dataclass(frozen=True)
class Pipeline:
    """A pretrained pipeline.

    Attributes:
        path: folder or id.
        parts: name -> class of each part, such as ``{'unet': 'UNet2DModel'}``.
    """

    path: str
    parts: Mapping[str, str]


def pipeline_at(path: str) -> Pipeline | None:
    """Read the index of a pipeline; None: there is none.

    Raises:
        AsrError: it is damaged.
        UnreadableError: the hub does not tell whether there is one.
    """
    try:
        content = diffusers.DiffusionPipeline.load_config(path)
        entries = {name: value for name, value in content.items() if not name.startswith('_')}
    except Exception as error:  # the hub has errors of many classes
        if (Path(path) / INDEX).is_file():
            first = str(error).strip().partition('\n')[0][:200]
            raise AsrError(f'{Path(path) / INDEX}: cannot be read ({type(error).__name__}: {first})') from error
        if Path(path).is_dir() or is_missing(error):
            return None
        raise UnreadableError(f'{path}: cannot tell whether it is a pipeline ({first_line(error)[:200]})') from error
    parts = {name: value[1] for name, value in entries.items() if isinstance(value, list) and len(value) == 2}
    return Pipeline(path, {name: kind for name, kind in parts.items() if isinstance(kind, str)})


def is_missing(error: BaseException) -> bool:
    """Whether the hub says that there is no such file; diffusers hides its error behind another one.

    No file in the cache says nothing: the hub could not be asked.
    """
    cause = error.__cause__ or error.__context__
    if isinstance(error, LocalEntryNotFoundError):
        return False
    if isinstance(error, EntryNotFoundError | RepositoryNotFoundError | HFValidationError):
        return True
    return cause is not None and is_missing(cause)


def pipeline_of(spec: Mapping[str, Any]) -> Pipeline | None:
    """Pipeline that ``dict(pretrained_model_name_or_path=..., subfolder=...)`` is from, if it is from one.

    The path of a part, ``'PIPELINE/unet'``, is as good as the subfolder.
    """
    path = str(spec[PATH])
    if (found := pipeline_at(path)) is not None:
        return found
    folder = Path(path)
    above = pipeline_at(str(folder.absolute().parent)) if SUBFOLDER not in spec and folder.is_dir() else None
    return above if above is not None and folder.absolute().name in above.parts else None


def find_model(spec: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    """Spec of a pretrained model of class ``name`` with its ``subfolder``, if it is a part of a pipeline.

    Args:
        spec: with ``pretrained_model_name_or_path``.
        name: class of diffusers.
        what: key of the config, for messages.

    Raises:
        AsrError: a pipeline has no such part, or several.
    """
    path = str(spec[PATH])
    try:
        pipeline = None if spec.get(SUBFOLDER) else pipeline_at(path)
    except UnreadableError:  # loading says it too, unless the model is in the cache
        pipeline = None
    if pipeline is not None:
        fitting = [part for part, kind in pipeline.parts.items() if kind == name]
        if len(fitting) != 1:
            parts = ', '.join(f'{part} ({kind})' for part, kind in pipeline.parts.items())
            problem = f'has {len(fitting)} parts' if fitting else 'has no part'
            raise AsrError(
                f'{what}: {path} {problem} of type={name!r}, it has {parts}; name one with subfolder=..., and its class'
            )
        if not Path(path).is_dir() or (Path(path) / fitting[0]).is_dir():  # old ones have all files beside the index
            spec = {**spec, SUBFOLDER: fitting[0]}
    return spec


def load_whole(cls: Any, what: str, **spec: Any) -> Any:
    """Load a model of diffusers or transformers, all of it, or nothing.

    Libraries load what they find: weights that lack are drawn anew or stay without memory, others are dropped.

    Args:
        cls: class of the model.
        what: key of the config, for messages.
        **spec: of ``from_pretrained``.

    Raises:
        AsrError: it cannot be loaded, is of another class, or its weights are not those of the model.
    """
    path = spec[PATH]
    where = f'{path}/{spec[SUBFOLDER]}' if spec.get(SUBFOLDER) else str(path)
    name = cls.__name__
    try:
        if issubclass(cls, diffusers.ModelMixin):
            keys = {
                k: v for k, v in spec.items() if k in (SUBFOLDER, 'revision', 'cache_dir', 'local_files_only', 'token')
            }
            stored = cls.load_config(path, **keys).get('_class_name', name)
            if stored != name:
                raise AsrError(f'{what}: {where} is a {stored}, but the config says type={name!r}')
        model, found = cls.from_pretrained(output_loading_info=True, **spec)
    except AsrError:
        raise
    except Exception as error:  # libraries raise anything for damaged files
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise AsrError(f'{what}: {name} cannot be made from {where}, which cannot be loaded ({first})') from error
    strange = sorted(found['unexpected_keys'])
    if gates := [key for key in strange if GATES.search(key)]:
        raise AsrError(
            f'{what}: {where} has the gates of a plugged model ({some(gates, 2)}), which {name} would drop; fold it '
            f'first, or go on with the run that wrote it'
        )
    apart = {'lacks': sorted(found['missing_keys']), 'has, and the model lacks,': strange}
    if problems := [f'{verb} {some(keys, 3)}' for verb, keys in apart.items() if keys]:
        raise AsrError(
            f'{what}: {where}, a {name}, {"; ".join(problems)}; its weights are of another model, or damaged'
        )
    check_weights_finite(model.state_dict(), Path(where), model)
    return model


def noise_schedule(said: dict[str, Any] | None, model: Mapping[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Noise schedule of a training: what the config says, and for the rest that of the pipeline of the model.

    Args:
        said: ``noise_scheduler`` of the config.
        model: ``model`` of the config.
        default: where neither says anything.

    Raises:
        AsrError: the config contradicts the pipeline, or its scheduler cannot be read.
    """
    try:
        pipeline = pipeline_of(model) if PATH in model else None
        if pipeline is None or 'scheduler' not in pipeline.parts:
            return default if said is None else said
        stored = schedule_of(pipeline)
    except UnreadableError as error:
        if said is not None and (PATH in said or all(key in said for key in SAID)):
            warnings.warn(f'noise_scheduler: could not be compared with that of the pipeline: {error}', stacklevel=2)
            return said
        raise AsrError(
            f'cannot tell which schedule the model was trained with: {error}; mend it, or say noise_scheduler with '
            f'{", ".join(SAID)}'
        ) from error
    if said is None:
        return stored
    if key := contradiction(said, stored):
        raise AsrError(
            f'noise_scheduler: {key}={said[key]!r}, but {pipeline.path} was trained with '
            f'{key}={value_of(key, stored)!r}; leave noise_scheduler out to take its schedule, or save the '
            f'model without its pipeline and start from that to train it for another one'
        )
    return {**stored, **said}


def resumed_schedule(
    said: dict[str, Any] | None, model: Mapping[str, Any], before: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Noise schedule of a training that is resumed: the one it began with, unless the config says another one.

    Args:
        said: ``noise_scheduler`` of the config; of a pretrained model it may leave out what the training began with.
        model: ``model`` of the config.
        before: what the checkpoint was trained with.
        say: called with a line if the pipeline of the model has another schedule.

    Returns:
        The schedule; None: the config says another one.
    """
    if PATH not in model:
        return {**before, **said} if said is not None and same_schedule(said, before) else None
    if said is not None and contradiction(said, before):
        return None
    try:
        pipeline = pipeline_of(model)
        stored = schedule_of(pipeline) if pipeline is not None and 'scheduler' in pipeline.parts else before
    except AsrError:  # the training does not need it
        stored = before
    if key := next((key for key in DEFINING if not equal(value_of(key, stored), value_of(key, before))), None):
        say(
            f'noise_scheduler: {model[PATH]} was trained with {key}={value_of(key, stored)!r}, this run with '
            f'{key}={value_of(key, before)!r}, and goes on with that'
        )
    return {**before, **(said or {})}


def same_schedule(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two noise schedules are the same for the model; what they leave out are the defaults of diffusers."""
    return all(equal(value_of(key, a), value_of(key, b)) for key in (*DEFINING, PATH, SUBFOLDER))


def contradiction(said: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """First defining key that is said and differs from what is stored; ``'type'`` where one is a flow."""
    if 'type' in said and (said['type'] == FLOW) != (stored.get('type') == FLOW):
        return 'type'
    return next((key for key in DEFINING if key in said and not equal(said[key], value_of(key, stored))), None)


def value_of(key: str, schedule: Mapping[str, Any]) -> Any:
    """Value of a key of a noise schedule, or the default of diffusers."""
    cls = diffusers.FlowMatchEulerDiscreteScheduler if schedule.get('type') == FLOW else diffusers.DDPMScheduler
    known = inspect.signature(cls).parameters
    return schedule.get(key, known[key].default if key in known else None)


def schedule_of(pipeline: Pipeline) -> dict[str, Any]:
    """Schedule of a pipeline as ``dict(type='DDPMScheduler', ...)``, whichever sampler it comes with, or as a flow."""
    where = f'{pipeline.path}, its scheduler'
    beside = Path(pipeline.path).is_dir() and not (Path(pipeline.path) / 'scheduler').is_dir()
    try:
        found = diffusers.DDPMScheduler.load_config(pipeline.path, **({} if beside else {SUBFOLDER: 'scheduler'}))
        stored = {key: value for key, value in found.items() if not key.startswith('_')}
    except Exception as error:  # the hub has errors of many classes
        first = str(error).strip().partition('\n')[0][:200]
        raise UnreadableError(f'{where}: {SCHEDULER} cannot be read ({first})') from error
    if found.get('_class_name') == FLOW or stored.get('prediction_type') == 'flow_prediction':
        return flow_of(stored)
    if lacking := {'num_train_timesteps', 'beta_schedule'} - stored.keys():
        kind = found.get('_class_name', pipeline.parts['scheduler'])
        raise UnreadableError(
            f'{where}, a {kind}, has no {some(sorted(lacking))}: of models without betas only those of {FLOW} are '
            f'trained here'
        )
    known = inspect.signature(diffusers.DDPMScheduler).parameters
    return {'type': 'DDPMScheduler', **{key: stored[key] for key in known if key in stored}}


def flow_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Flow matching as ``dict(type='FlowMatchEulerDiscreteScheduler', ...)``, of its own scheduler or of a solver's."""
    known = inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler).parameters
    solver = stored.get('prediction_type') == 'flow_prediction'
    keys = ('num_train_timesteps',) if solver else tuple(known)
    schedule = {key: stored[key] for key in keys if key in stored}
    return {'type': FLOW, **schedule, **({'shift': stored.get('flow_shift', 1.0)} if solver else {})}


def equal(a: Any, b: Any) -> bool:
    """Whether two values of a schedule are the same; lists and tuples may be."""
    return list(a) == list(b) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else a == b
