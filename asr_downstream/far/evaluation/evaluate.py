"""Teacher and FAR family side by side: accuracy, parameters, multiply-adds, latency, token relations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import render
from asr_downstream.errors import CheckpointError
from asr_downstream.far.card import note_accuracy
from asr_downstream.far.config import SCHEMA
from asr_downstream.far.distil.classification import Classification, accuracy
from asr_downstream.far.distil.stages import build_task, replaced
from asr_downstream.far.evaluation.token_relations import attention_maps, draw_relations, mixer_maps, similarity
from asr_downstream.far.export import FAR_FILE, load_far, read_facts
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.replace import find_attentions
from asr_downstream.far.prune.budgets import forward
from asr_downstream.measure import cost
from asr_downstream.measure.timing import faster_from, paired_times, ratio
from asr_downstream.registry import TASKS, find

__all__ = [
    'compare_relations',
    'load_family',
    'measure_family',
    'note_results',
    'relation_maps',
    'sweep',
    'sweep_table',
    'table',
    'task_of',
]

TEACHER = 'teacher'
UNTRAINED, UNIFORM = CONTROLS = 'not trained', 'uniform'  # of the token relations
TOKENS, BATCHES = (64, 128, 256, 512, 1024, 2048, 4096), (1, 8, 32)


def load_family(folder: Path) -> dict[str, nn.Module]:
    """Models below ``folder/shipped``, the teacher first, then by the number of parameters.

    Raises:
        CheckpointError: there is no teacher, or nothing else, or two have one name.
    """
    folders = sorted(path.parent for path in (folder / 'shipped').glob(f'[!.]*/{FAR_FILE}'))
    named: dict[str, Path] = {}
    for path in folders:
        name = read_facts(path).get('name', path.name)
        if not isinstance(name, str) or not name or name in CONTROLS:
            raise CheckpointError(f'{path / FAR_FILE}: name={name!r} cannot be the name of a model; give it another')
        if name in named:
            raise CheckpointError(f'{path / FAR_FILE}: the name {name!r} is that of {named[name]}; give it another')
        named[name] = path
    if TEACHER not in named or len(named) < 2:
        raise CheckpointError(f'{folder}: has no shipped teacher and FAR model; run tools/distill_far.py first')
    if read_facts(named[TEACHER])['replace'] is not None:
        raise CheckpointError(f'{named[TEACHER]}: is called {TEACHER!r}, but its attention is replaced')
    models = {name: load_far(path) for name, path in named.items()}
    rest = sorted((name for name in models if name != TEACHER), key=lambda name: -cost.parameters(models[name]))
    return {name: models[name] for name in (TEACHER, *rest)}


def task_of(folder: Path, teacher: nn.Module, data: Path | None = None) -> Classification:
    """Task that a family was trained on: its data and the images held out.

    Raises:
        CheckpointError: the folder has no stage of a classification.
        DataError: the images are not there.
    """
    for path in sorted(folder.glob('*/config.py')):
        config = SCHEMA.load(path, data=data)
        kind = find(TASKS, config.task.get('type'))
        if isinstance(kind, type) and issubclass(kind, Classification):
            return build_task(config, teacher)
    raise CheckpointError(f'{folder}: has no stage with a config.py; give the folder that tools/distill_far.py wrote')


def measure_family(models: dict[str, nn.Module], task: Classification, rounds: int = 20) -> dict[str, dict[str, Any]]:
    """Measure all models of a family on the images held out.

    Returns:
        Name -> ``accuracy`` in [0, 1], ``parameters``, ``gmacs`` of one image, ``units``, and, by batch, ``latency``
        (ratio to the teacher, from paired rounds) and ``milliseconds`` (median).
    """
    numbers: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        numbers[name] = {
            'accuracy': accuracy(model, task),
            'parameters': cost.parameters(model),
            'gmacs': cost.gmacs(forward(model, on_device(task.example(), model))),
            'units': sum(sum(map(sum, mixer.widths)) for _, mixer in mixers(model)),
            'latency': {},
            'milliseconds': {},
        }
    for batch in (1, 32):
        inputs = on_device(task.example(batch), models[TEACHER])
        calls = {name: forward(model, inputs) for name, model in models.items()}
        times = paired_times(calls, rounds, f'latency, batch {batch}', threads=torch.get_num_threads())
        for name in models:
            numbers[name]['latency'][batch] = ratio(times[name], times[TEACHER])
            numbers[name]['milliseconds'][batch] = median(times[name])
    return numbers


def note_results(folder: Path, numbers: dict[str, dict[str, Any]], task: Classification) -> None:
    """Write the accuracies of a family into the metadata of the cards of its members.

    Args:
        folder: see `load_family`.
        numbers: see `measure_family`.
        task: whose images held out they were measured on.

    Raises:
        AsrError: a card cannot be read or written.
    """
    data = task.config.data
    named = str(data.get('path') or data.type)
    name = Path(named).name if Path(named).exists() else named  # a folder of a disk, or the id of a data set
    for path in sorted(path.parent for path in (folder / 'shipped').glob(f'[!.]*/{FAR_FILE}')):
        model = read_facts(path).get('name', path.name)
        if model in numbers:
            note_accuracy(path, model, numbers[model]['accuracy'], name, len(task.held_out))


def on_device(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Arguments of a forward, where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def table(numbers: dict[str, dict[str, Any]], images: int) -> str:
    """One row a model."""
    out = Table('model', 'accuracy', 'parameters', 'GMACs', 'hidden units', 'latency, batch 1', 'batch 32')
    out.title = f'{images} images held out; latency: ratios to the teacher, paired rounds'
    for column in out.columns[1:]:
        column.justify = 'right'
    for name, row in numbers.items():
        out.add_row(
            name, f'{row["accuracy"]:.4f}', f'{row["parameters"]:,}', f'{row["gmacs"]:.4f}', f'{row["units"]:,}',
            *(str(row['latency'][batch]) for batch in (1, 32)),
        )  # fmt: skip
    return render(out)


def sweep(
    models: dict[str, nn.Module],
    tokens: Sequence[int] = TOKENS,
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Time the first attention of the teacher against what stands in for it, over random tokens.

    Other attentions of a pruned member may have other widths.

    Args:
        models: of `load_family`.
        tokens: numbers of tokens.
        batches: numbers of images.
        rounds: paired rounds.

    Returns:
        A row a shape: ``tokens``, ``batch``, and ``ratios``: name -> ratio to the teacher.
    """
    path, first = next(mixers(next(m for name, m in models.items() if name != TEACHER)))
    modules = {name: copy.deepcopy(model.get_submodule(path)) for name, model in models.items()}
    device, channels = next(models[TEACHER].parameters()).device, first.channels
    rows = []
    for batch in batches:
        for count in tokens:
            x = torch.randn(batch, count, channels, device=device)
            for _, mixer in (found for module in modules.values() for found in mixers(module)):
                mixer.fit(count)
            calls = {name: on_tokens(module, x) for name, module in modules.items()}
            text = f'{count} tokens, batch {batch}'
            times = paired_times(calls, rounds, text, warmup=1, threads=torch.get_num_threads())
            ratios = {name: ratio(times[name], times[TEACHER]) for name in modules if name != TEACHER}
            rows.append({'tokens': count, 'batch': batch, 'ratios': ratios})
    return rows


def on_tokens(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A forward of an attention."""
    return forward(Alone(module), {'x': x})


class Alone(nn.Module):
    """An attention, whose tokens go by another name in each library."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Any:
        """Mix tokens."""
        return self.attention(x)


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """One row a shape; where each member gets faster than the teacher."""
    names = list(rows[0]['ratios'])
    out = Table('batch', 'tokens', *names, title='time of an attention, ratios to that of the teacher')
    for column in out.columns:
        column.justify = 'right'
    for row in rows:
        out.add_row(str(row['batch']), str(row['tokens']), *(str(row['ratios'][name]) for name in names))
    lines = [render(out)]
    for batch in dict.fromkeys(row['batch'] for row in rows):
        for name in names:
            start = faster_from({r['tokens']: r['ratios'][name] for r in rows if r['batch'] == batch})
            found = f'faster from {start} tokens on' if start is not None else 'not faster at the most tokens'
            lines.append(f'batch {batch}, {name}: {found}')
    return '\n'.join(lines)


def compare_relations(models: dict[str, nn.Module], task: Classification, images: int, path: Path) -> dict[str, Any]:
    """Compare attention maps of the teacher with the influence of tokens in the others, and draw both.

    Two controls are measured as well: a FAR model that was never trained, for what the form alone gives, and a map in
    which every token looks at all others alike.

    Args:
        models: of `load_family`.
        task: whose images held out are used.
        images: how many.
        path: PNG to write.

    Returns:
        Name -> path of the attention -> similarity to the teacher, mean over images and tokens.
    """
    maps = relation_maps(models, task, images)
    scores = {
        name: {layer: similarity(found[layer], maps[TEACHER][layer]) for layer in found}
        for name, found in maps.items()
        if name != TEACHER
    }
    draw_relations(path, maps, scores)
    return scores


def relation_maps(models: dict[str, nn.Module], task: Classification, images: int) -> dict[str, dict[str, Tensor]]:
    """Maps of `compare_relations`: name -> path of the attention -> ``(images, N, N)``, the teacher first."""
    batch = torch.utils.data.default_collate(
        [task.validation().dataset[n] for n in range(min(images, len(task.held_out)))]
    )
    inputs = task.inputs(task.prepare(batch))
    teacher = models[TEACHER]
    untrained = replaced(task.config, copy.deepcopy(teacher)).eval()
    maps = {
        TEACHER: attention_maps(teacher, find_attentions(teacher, task.config.replace.get('layers', 'all')), inputs)
    }
    maps |= {name: mixer_maps(model, inputs) for name, model in models.items() if name != TEACHER}
    maps[UNTRAINED] = mixer_maps(untrained, inputs)
    maps[UNIFORM] = {layer: torch.ones_like(found) / found.shape[-1] for layer, found in maps[TEACHER].items()}
    return maps
