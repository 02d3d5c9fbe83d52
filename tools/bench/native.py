"""Small classifiers of CIFAR-10 with squeeze-and-excitation of their own, and how much of it can be removed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from asr_downstream import fold_native
from asr_downstream.console.progress import bar
from asr_downstream.console.text import render
from asr_downstream.engine.data.images import Images, build_images
from asr_downstream.files.atomic import write_atomically, write_json
from asr_downstream.measure.versions import versions

__all__ = ['MODELS', 'run']

BATCH = 128
HELD_OUT = 10  # one in so many images
CALIBRATION = 1000  # training images that gates are averaged over
BUDGETS = (None, 0.01, 0.005, 0.002, 0.0)


def regnet() -> nn.Module:
    """A RegNet-Y of transformers with ReLU: its gates fold into the norm before the activation."""
    from transformers import RegNetConfig, RegNetForImageClassification

    return RegNetForImageClassification(
        RegNetConfig(
            layer_type='y',
            embedding_size=24,
            hidden_sizes=[24, 48, 96],
            depths=[1, 2, 3],
            groups_width=24,
            num_labels=10,
        )
    )


def efficientnet() -> nn.Module:
    """An EfficientNet of transformers with SiLU: its gates fold into the convolution after the activation."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            in_channels=[32, 16, 24, 40],
            out_channels=[16, 24, 40, 64],
            kernel_sizes=[3, 3, 3, 3],
            strides=[1, 1, 2, 2],
            num_block_repeats=[1, 1, 2, 2],
            expand_ratios=[1, 3, 3, 3],
            depthwise_padding=[],
            hidden_dim=1280,
            dropout_rate=0.1,
            drop_connect_rate=0.05,
            batch_norm_momentum=0.1,
            num_labels=10,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {'regnet-y': regnet, 'efficientnet': efficientnet}


def run(name: str, data: Path, out: Path, epochs: int, seed: int, minutes: float) -> dict[str, Any]:
    """Train a model, remove its attention within several budgets, print the table and write ``out/NAME-SEED.json``.

    Args:
        name: one of `MODELS`.
        data: a zip file or folder of images, a folder a class.
        out: folder to write; a training that was stopped goes on from there.
        epochs: of the training.
        seed: of the weights and batches.
        minutes: most that the training may take; it then ends with the epoch, its learning rate not yet at 0.
    """
    x, y = load(data)
    held_out = torch.arange(len(x)) % HELD_OUT == 0
    model = trained(MODELS[name], (x[~held_out], y[~held_out]), out / f'{name}-{seed}.pt', epochs, seed, minutes * 60)
    metric = partial(accuracy, images=(x[held_out], y[held_out]))
    draw = torch.randperm(int((~held_out).sum()), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    batches = [scaled(part) for part in x[~held_out][draw].split(BATCH)]
    rows = []
    for budget in BUDGETS:
        _, report = fold_native(model, batches, step=logits, metric=metric, max_drop=budget, rounds=40)
        found = report.as_dict()
        if budget is None:
            print(report)
        rows.append({'max_drop': budget, **found})
        print(table(rows), flush=True)
    result = {
        'model': name,
        'epochs': epochs,
        'seed': seed,
        'images': {'training': int((~held_out).sum()), 'held_out': int(held_out.sum()), 'calibration': len(draw)},
        'budgets': rows,
        'versions': versions(),
    }
    write_json(out / f'{name}-{seed}.json', result)
    return result


def load(data: Path) -> tuple[Tensor, Tensor]:
    """All images as bytes ``(N, 3, 32, 32)``, and their classes."""
    source = dict(type='Zip' if data.suffix == '.zip' else 'ImageFolder', path=str(data), resolution=32)
    images: Images = build_images(source, 3)
    found = [((images[i] + 1) * 127.5).round().to(torch.uint8) for i in bar(range(len(images)), 'reading')]
    return torch.stack(found), torch.tensor(images.source.labels)


def scaled(x: Tensor) -> Tensor:
    """Bytes as numbers around 0."""
    return x.float() / 63.75 - 2


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What a classifier says of images."""
    return model(x).logits


@torch.no_grad()
def accuracy(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Share of images whose class a model finds."""
    x, y = images
    parts = zip(x.split(500), y.split(500), strict=True)
    return sum(int((logits(model, scaled(a)).argmax(1) == b).sum()) for a, b in parts) / len(y)


def augmented(x: Tensor, stream: torch.Generator) -> Tensor:
    """Shift images of one batch by up to 4 pixels, and mirror half of them."""
    dy, dx = torch.randint(0, 9, (2,), generator=stream).tolist()
    x = F.pad(x, (4, 4, 4, 4))[..., dy : dy + 32, dx : dx + 32]
    mirrored = torch.rand(len(x), generator=stream) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def trained(
    build: Callable[[], nn.Module], images: tuple[Tensor, Tensor], path: Path, epochs: int, seed: int, seconds: float
) -> nn.Module:
    """Train a classifier, or go on with what is in ``path``; in eval mode."""
    x, y = images
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    batch = min(BATCH, len(x))
    steps = len(x) // batch * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.2)
    state: dict[str, Any] = {'epoch': 0, 'seconds': 0.0}
    if path.is_file():
        state = torch.load(path)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        schedule.load_state_dict(state['schedule'])
    for epoch in range(state['epoch'], epochs):
        if state['seconds'] > seconds:
            print(f'{state["seconds"]:.0f} s are spent: ends after {epoch} of {epochs} epochs')
            break
        begin, stream, total = time.perf_counter(), torch.Generator().manual_seed(seed * 1000 + epoch), 0.0
        torch.manual_seed(seed * 1000 + epoch)
        model.train()
        order = torch.randperm(len(x), generator=stream)[: len(x) // batch * batch]
        for index in order.split(batch):
            loss = F.cross_entropy(logits(model, augmented(scaled(x[index]), stream)), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        state = {
            'epoch': epoch + 1,
            'seconds': state['seconds'] + time.perf_counter() - begin,
            'model': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'schedule': schedule.state_dict(),
        }
        write_atomically(path, partial(torch.save, state))
        print(f'epoch {epoch + 1}: loss {total * batch / len(order):.3f}, {state["seconds"]:.0f} s', flush=True)
    return model.eval()


def table(rows: list[dict[str, Any]]) -> str:
    """One row a budget."""
    found = Table('max_drop', 'removed', 'accuracy', 'parameters', 'time of a batch')
    first = rows[0]
    total = len(first['blocks'])
    before = first['calibration']['metric_before']
    found.add_row('as it was', f'0 of {total}', f'{before:.4f}', f'{first["parameters_before"]:,}', '1')
    for row in rows:
        turns = row['latency_ratio']
        found.add_row(
            'any' if row['max_drop'] is None else f'{row["max_drop"]:g}',
            f'{len(row["removed"])} of {total}',
            f'{row["calibration"]["metric_after"]:.4f}',
            f'{row["parameters_after"]:,}',
            '1' if turns is None else f'{turns["median"]:.2f} ({turns["low"]:.2f}-{turns["high"]:.2f})',
        )
    return render(found)
