"""Training: MMEngine's Runner, with the data and the checkpoints checked before it starts, and a way to stop."""

from __future__ import annotations

import importlib.util
import io
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.hooks import Hook
from mmengine.runner import Runner

from asr_downstream.console.processes import Processes
from asr_downstream.console.stopping import until_stopped
from asr_downstream.detection.data.coco import check_datasets
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.detection.training.checkpoints import newest, noted, read_to_resume
from asr_downstream.detection.training.launch import is_first
from asr_downstream.detection.training.learning import OWN, LearningHook, LearningRunner, learning_of
from asr_downstream.detection.training.loops import DivergenceHook, StopHook, bare
from asr_downstream.detection.training.sampler import DrawsHook
from asr_downstream.detection.training.save import GuardHook
from asr_downstream.detection.types import kind_of, pretrained
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.far import describe as describe_far
from asr_downstream.files.atomic import check_writable
from asr_downstream.files.locks import occupied
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.plugging.attach import rebind
from asr_downstream.plugging.describe import describe

__all__ = ['REPORTS', 'average', 'plan', 'prepare', 'report_to', 'train']

# Where training may report besides its own log -> back end of MMEngine, package.
REPORTS = {'tensorboard': ('TensorboardVisBackend', 'tensorboard'), 'wandb': ('WandbVisBackend', 'wandb')}

# What gloo and NCCL say where another process is gone.
LOST = re.compile('closed by peer|reset by peer|Broken pipe|NCCL (error|communicator)|gloo', re.IGNORECASE)


def prepare(config: Config, work_dir: Path, resume: str | None = None, trust: bool = False) -> None:
    """Check everything that a training will read, and set where it writes; changes ``config`` in place.

    The loop becomes one that can be stopped and resumed within an epoch, and the hook that writes checkpoints one that
    writes whole ones; with ``fold_eval=True`` in the config, validation is of a folded copy.

    Args:
        config: the training config.
        work_dir: folder for logs and checkpoints.
        resume: ``'latest'`` for the newest whole checkpoint in ``work_dir``, ``'auto'`` for the same if there is one,
            or a checkpoint's path.
        trust: read checkpoints that need unpickling.

    Raises:
        AsrError: data or checkpoint are missing or unsound, or ``work_dir`` cannot be written.
    """
    check_datasets(config, 'train_dataloader', 'val_dataloader')
    if lacking := lacks_torchvision(config):
        raise AsrError(lacking)
    check_writable(work_dir)
    before = noted(work_dir)
    if resume is None and not config.get('resume') and before is not None and before.is_file():
        raise AsrError(
            f'{work_dir}: has checkpoints of an earlier run; continue it with --resume, or choose another --work-dir'
        )
    config.work_dir = str(work_dir)
    if resume is None and config.get('resume'):
        start = config.get('load_from')
        if start and Path(start).resolve().parent != work_dir.resolve():
            raise AsrError(
                f'{config.filename}: resume=True would go on from {start}, which is of another folder than {work_dir}; '
                f'--resume {start} does, --cfg-options resume=False load_from=None trains anew'
            )
        resume = start or 'auto'  # MMEngine would look for the newest by itself, unchecked
    if resume is not None:
        take_up(config, work_dir, resume, trust)
    loop = config.train_cfg
    default = 'EpochBasedTrainLoop' if loop.get('by_epoch', True) is not False else 'IterBasedTrainLoop'
    kind = kind_of(loop.get('type', default))
    if kind in ('EpochBasedTrainLoop', 'IterBasedTrainLoop'):
        loop.pop('by_epoch', None)
        loop['type'] = f'asr_downstream.{kind}'
    write_whole(config)
    if config.get('fold_eval'):
        validation = config.get('val_cfg')
        if validation is None or kind_of(validation.get('type', 'ValLoop')) not in (
            'ValLoop',
            'asr_downstream.ValLoop',
        ):
            what = 'no val_cfg' if validation is None else f'val_cfg of type {validation.type}'
            raise AsrError(f"{config.filename}: fold_eval=True needs MMEngine's ValLoop, the config has {what}")
        validation['type'] = 'asr_downstream.ValLoop'
    if '://' in (config.get('load_from') or '') and not trust:
        raise CheckpointError(
            f'{config.load_from}: MMEngine unpickles what it fetches, which can run code; fetch it yourself and give '
            f'the file, or add --trust'
        )
    for name in [config.get('load_from'), *pretrained(config.model)]:
        if name and '://' not in name:  # what is fetched by name is mmengine's to read
            read_checkpoint(Path(name), trust)


def lacks_torchvision(config: Config) -> str:
    """What to do about weights that MMEngine asks torchvision for, where that is not installed; '' if all is well."""
    asked = [name for name in pretrained(config.model) if (name or '').startswith('torchvision://')]
    if not asked or importlib.util.find_spec('torchvision') is not None:
        return ''
    return (
        f'{asked[0]}: torchvision, which knows where these weights are, is not installed; install the one of your '
        f'torch (in a checkout: pip install -c constraints.txt torchvision), or name a file: '
        f'--cfg-options model.backbone.init_cfg.checkpoint=FILE'
    )


def take_up(config: Config, work_dir: Path, resume: str, trust: bool) -> None:
    """Set what a training goes on from, and its seed; without a checkpoint, ``'auto'`` starts one.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    say = print if is_first(config) else silent
    if resume not in ('auto', 'latest'):
        start = Path(resume)
    elif (found := newest(work_dir, config, trust, say)) is not None:
        start = found
    elif resume == 'auto':
        return
    else:
        raise CheckpointError(f'{work_dir}: has no checkpoint to resume from; start without --resume')
    seed = read_to_resume(start, config, trust)['meta'].get('seed')
    randomness = config.get('randomness') or {}
    if seed is not None and seed != randomness.get('seed'):  # MMEngine keeps it, but not for the order of the data
        if randomness.get('seed') is not None:
            say(f'{start}: was trained with seed {seed}, not {randomness["seed"]}; goes on with {seed}')
        config.randomness = {**randomness, 'seed': int(seed)}
    config[OWN] = None if config.get('resume') else config.get('load_from')
    config.load_from, config.resume = str(start), True


def silent(line: str) -> None:
    """Say nothing: another process of the launch says it."""


def write_whole(config: Config) -> None:
    """Put the hook of this package in the place of MMEngine's `CheckpointHook`, wherever the config has that."""
    hooks = config.setdefault('default_hooks', {})
    hooks.setdefault('checkpoint', {'type': 'CheckpointHook'})  # which MMEngine would add
    for hook in (hooks['checkpoint'], *(config.get('custom_hooks') or [])):
        if isinstance(hook, dict) and kind_of(hook.get('type', 'CheckpointHook')) == 'CheckpointHook':
            hook['type'] = 'asr_downstream.CheckpointHook'


def average(config: Config, momentum: float = 2e-4) -> None:
    """Add MMEngine's exponential moving average of weights and buffers to a config, unless it has one."""
    hooks = [dict(hook) for hook in config.get('custom_hooks') or []]
    if not any(kind_of(hook.get('type')) == 'EMAHook' for hook in hooks):
        ema = {'type': 'EMAHook', 'ema_type': 'ExpMomentumEMA', 'momentum': momentum, 'update_buffers': True}
        config.custom_hooks = [*hooks, {**ema, 'priority': 49}]


def report_to(config: Config, names: Sequence[str]) -> None:
    """Add back ends of `REPORTS` to a config.

    Raises:
        AsrError: a package is not installed.
    """
    visualizer = config.get('visualizer') or {'type': 'DetLocalVisualizer', 'name': 'visualizer'}
    backends = [dict(backend) for backend in visualizer.get('vis_backends') or [{'type': 'LocalVisBackend'}]]
    for name in names:
        kind, package = REPORTS[name]
        if importlib.util.find_spec(package) is None:
            raise AsrError(f'--report-to {name}: the package {package} is not installed; pip install {package}')
        if not any(kind_of(backend['type']) == kind for backend in backends):
            backends.append({'type': kind})
    config.visualizer = {**visualizer, 'vis_backends': backends}


def train(config: Config, hooks: Sequence[Hook] = ()) -> Path | None:
    """Train; prints the plugged sites first.

    Ctrl-C, or a termination, ends it after the step, with a checkpoint to resume from.

    Args:
        config: as `prepare` has left it.
        hooks: for the Runner, besides those of the config.

    Returns:
        The last checkpoint, or None if the config writes none.

    Raises:
        AsrError: ``fold_eval=True`` of a model that does not fold; the training diverged, or cannot write; another
            training writes to the folder.
        Stopped: it was told to, and has noted a checkpoint.
    """
    work_dir = Path(config.work_dir)
    with ExitStack() as stack:
        Processes.of_launch().together(lambda: occupy(work_dir, stack) if is_first(config) else None)
        if config.get('resume') and is_complete(config):
            return Path(config.load_from)
        signal = stack.enter_context(until_stopped())
        runner = build_runner(config)
        watch = DivergenceHook()
        for hook in (*hooks, DrawsHook(), LearningHook(), GuardHook(), watch, StopHook(signal, watch=watch)):
            runner.register_hook(hook)
        began = time.time_ns()
        try:
            runner.train()
            barrier()  # the first process is still writing
        except RuntimeError as error:
            if runner.world_size > 1 and LOST.search(str(error)):
                raise AsrError(
                    f'another process of the launch has ended; last checkpoint: {noted(work_dir) or "none"}, from '
                    f'which --resume continues'
                ) from error
            raise
        note = work_dir / 'last_checkpoint'
        written = note.is_file() and note.stat().st_mtime_ns >= began  # not by an earlier run in this folder
        if written:
            return noted(work_dir)
        return Path(config.load_from) if config.get('resume') else None


def occupy(work_dir: Path, stack: ExitStack) -> None:
    """Keep the folder to this training, and tidy up what one has left that was killed while it wrote."""
    stack.enter_context(occupied(work_dir))
    for left in work_dir.glob('.*.pth.tmp'):
        left.unlink()


def is_complete(config: Config) -> bool:
    """Whether the checkpoint that a training goes on from has all of its epochs or iterations; says so."""
    # `prepare` has read it with the trust that was given, and MMEngine will read it so
    meta = read_checkpoint(Path(config.load_from), trust=True, mmap=True)['meta']
    for key, unit in (('max_epochs', 'epoch'), ('max_iters', 'iter')):
        total = config.train_cfg.get(key)
        if total is not None and meta[unit] >= total:
            if is_first(config):
                what = {'epoch': 'epochs', 'iter': 'iterations'}[unit]
                print(f'{config.load_from}: has all {total} {what} already; raise train_cfg.{key} to go on')
            return True
    return False


def build_runner(config: Config) -> Runner:
    """Build MMEngine's Runner, and say what its model is.

    Raises:
        AsrError: ``fold_eval=True`` of a model that does not fold; ``learns`` means nothing in it.
        CheckpointError: not everything learns, and ``load_from`` is of another model.
    """
    runner = LearningRunner.from_cfg(config)
    rebind(runner.model)  # sync_bn=... has rebuilt its batch norms by now
    description = describe(bare(runner.model))
    runner.logger.info(f'\n{description}')
    replaced = describe_far(bare(runner.model))
    if replaced.rows:
        runner.logger.info(f'\n{replaced}')
    if config.get('fold_eval') and not (description.sites and all(site.folds for site in description.sites)):
        what = "gates that depend on the input; those of dict(type='ASR') fold" if description.sites else 'no gates'
        raise AsrError(f'{config.filename}: fold_eval=True, but the model has {what}')
    return runner


def plan(config: Config, trust: bool = False) -> str:
    """Say what a training would do, without doing it: sites, parameters, what learns, data, steps.

    Args:
        config: the training config.
        trust: read a base that needs unpickling.
    """
    check_datasets(config, 'train_dataloader', 'val_dataloader')
    model = build_detector(config)
    with redirect_stdout(io.StringIO()):
        loader = Runner.build_dataloader(config.train_dataloader)
    total = sum(p.numel() for p in model.parameters())
    foldable = sum(row.parameters for row in describe(model).sites if row.folds)
    epochs = config.train_cfg.get('max_epochs')
    steps = f'{epochs} epochs of {len(loader)} steps' if epochs else f'{config.train_cfg.get("max_iters")} steps'
    replaced = describe_far(model)
    return '\n'.join(
        [
            str(describe(model)),
            *([str(replaced)] if replaced.rows else []),
            f'parameters: {total:,}, of which {foldable:,} fold away',
            str(learning_of(config, model, trust)),
            f'data: {len(loader.dataset)} images in {config.get("data_root")}',
            f'steps: {steps}, batch size {config.train_dataloader.batch_size}',
            f'optimiser: {dict(config.optim_wrapper.optimizer)}',
            *filter(None, [lacks_torchvision(config)]),
        ]
    )
