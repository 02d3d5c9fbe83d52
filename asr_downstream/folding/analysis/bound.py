"""How noise grows from block to block, and a bound on it.

A residual block gives ``y = act(S(x) + v * f(x))``: a shortcut S, a branch f, constant gates v, and an activation that
brings no two inputs further apart. So a change of x grows at most by ``|S| + max |v| |f|``: ``|S|`` is 1 for a plain
shortcut, and ``|f|`` the product of the operator norms of the linear parts between the activations of the branch. With
one linear layer as the branch that is the bound of the ASR paper (Theorem 6.1 of an early version); several layers are
multiplied here. It is a bound, from above and far from what happens; any constant scale below 1 lowers it, learned by
attention or not. Gates that depend on the input have none: how they move with the input is not in it.

What is measured beside it is the growth of one noise in one forward: ``|change of y| / |change of x|``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed
from asr_downstream.errors import AsrError, FoldError
from asr_downstream.folding.passes import Step
from asr_downstream.modules.copies import batch_of, copy_of
from asr_downstream.modules.slots import inside_gate
from asr_downstream.plugging.attach import detach
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.sites import branch_end, branches

__all__ = ['BlockGrowth', 'Growth', 'measure_growth', 'operator_norm']

LINEAR = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.Identity, nn.AvgPool2d)
CONTRACTING = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Dropout, nn.MaxPool2d, nn.Sigmoid, nn.Tanh)
ITERATIONS = 100


@dataclass(frozen=True)
class BlockGrowth:
    """One residual block.

    Attributes:
        path: of the block.
        growth: of the noise, mean over images.
        largest: growth, largest over images.
        gate: largest magnitude of its constant gates; 1 without gates, None where they depend on the input.
        branch: operator norm of the branch without gates, from above: that of its parts multiplied; None: not known.
        shortcut: operator norm of the shortcut.
        why: there is no bound; '' if there is one.
    """

    path: str
    growth: float
    largest: float
    gate: float | None = None
    branch: float | None = None
    shortcut: float | None = None
    why: str = ''

    @property
    def bound(self) -> float | None:
        """Growth that no noise exceeds."""
        if self.gate is None or self.branch is None or self.shortcut is None:
            return None
        return self.shortcut + self.gate * self.branch


@dataclass(frozen=True, repr=False)
class Growth(Printed):
    """Growth of noise in a model.

    Attributes:
        name: of the model.
        noise: what it was.
        blocks: in the order of the model.
    """

    name: str
    noise: str
    blocks: tuple[BlockGrowth, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {'noise': self.noise, 'blocks': [{**asdict(block), 'bound': block.bound} for block in self.blocks]}

    def parts(self) -> list[Table | str]:
        table = Table('block', title=f'{self.name}: growth of {self.noise} noise by block')
        for head in ('growth, mean', 'largest', 'bound', 'largest gate', 'branch', 'shortcut'):
            table.add_column(head, justify='right')
        table.add_column('')
        for b in self.blocks:
            numbers = (b.bound, b.gate, b.branch, b.shortcut)
            cells = ('' if n is None else f'{n:.3f}' for n in numbers)
            table.add_row(b.path, f'{b.growth:.3f}', f'{b.largest:.3f}', *cells, b.why)
        return [table]


@dataclass
class Event:
    """A layer that ran: its path, and which tensors it took and gave."""

    path: str
    module: nn.Module
    given: int
    gave: int
    shape: tuple[int, ...]


@dataclass
class Block:
    """What is known of a block in a forward."""

    path: str
    site: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    first: int = 0
    events: list[Event] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)  # so that no id is used twice


@torch.no_grad()
def measure_growth(
    name: str, model: nn.Module, batch: Any, step: Step, noisy: AbstractContextManager[None], noise: str
) -> Growth:
    """Measure how noise grows in the residual blocks of a model, and bound it.

    Args:
        name: of the model.
        model: in eval mode.
        batch: to run, without noise and with it.
        step: runs the model on a batch.
        noisy: inside it, the images that the model sees have noise.
        noise: what it is, for the report.

    Raises:
        AsrError: no residual block is known.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise AsrError(f'{name}: {type(model).__name__} has no residual block that is known, so no growth in one')
    with watched(model, blocks, events=True):
        step(model, batch_of(batch))
    with noisy, watched(model, blocks, events=False):
        step(model, batch_of(batch))
    once = [block for block in blocks if len(block.inputs) == len(block.outputs) == 2]  # of tensors
    return Growth(name, noise, tuple(map(examined, once)))


def blocks_of(model: nn.Module) -> list[Block]:
    """Residual blocks whose branch ends in a layer."""
    found = []
    for path, module, branch in branches(model):
        end = branch_end(module, branch)
        if end is not None and not inside_gate(model, path):
            found.append(Block(path, end))
    return found


@contextmanager
def watched(model: nn.Module, blocks: Sequence[Block], events: bool) -> Any:
    """Note what goes into and out of blocks, and which layers run in them."""
    handles: list[Any] = []

    def begin(block: Block, module: nn.Module, args: Any) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        block.inputs.append(args[0].detach().clone())
        block.first = id(args[0]) if events else block.first
        block.alive.append(args[0])

    def end(block: Block, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        block.outputs.append(output.detach().clone())
        block.alive.append(output)

    def note(block: Block, path: str, module: nn.Module, args: Any, output: Any) -> None:
        block.events.append(Event(path, module, id(args[0]), id(output), tuple(args[0].shape)))
        block.alive += [args[0], output]

    for block in blocks:
        whole = model.get_submodule(block.path)
        handles.append(whole.register_forward_pre_hook(partial(begin, block)))
        handles.append(whole.register_forward_hook(partial(end, block)))
        for path, layer in whole.named_modules() if events else ():
            if isinstance(layer, (*LINEAR, *CONTRACTING)) and not inside_gate(whole, path):
                handles.append(layer.register_forward_hook(partial(note, block, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def examined(block: Block) -> BlockGrowth:
    """Growth in a block, and its bound where there is one."""
    before, after = ((b - a).double().flatten(1).norm(dim=1) for a, b in (block.inputs, block.outputs))
    some = before > 0
    growth = after[some] / before[some] if some.any() else torch.zeros(1, dtype=torch.float64)
    found = BlockGrowth(block.path, float(growth.mean()), float(growth.max()))
    try:
        gate, branch, shortcut = norms_of(block)
    except AsrError as error:
        return BlockGrowth(**{**asdict(found), 'why': str(error)})
    bounded = BlockGrowth(block.path, found.growth, found.largest, gate, branch, shortcut)
    if bounded.bound is not None and found.largest > bounded.bound * 1.001:
        return BlockGrowth(**{**asdict(found), 'why': 'it computes more than its layers say'})
    return bounded


def norms_of(block: Block) -> tuple[float, float, float]:
    """Largest gate, and norms of branch and shortcut.

    Raises:
        AsrError: they are not known.
    """
    numbers = [n for n, event in enumerate(block.events) if event.module is block.site]
    if len(numbers) != 1:
        raise AsrError('the end of its branch did not run once')
    layer: Any = block.site
    if isinstance(layer, Plugged) and layer.dynamic is not None:  # type: ignore[attr-defined]
        raise AsrError('gates depend on the input')
    gates = layer.constant() if isinstance(layer, Plugged) else None
    branch = way_to(block, numbers[0])
    if branch is None:
        raise AsrError('not all of its branch is layers that are known')
    aside = [way_to(block, n) for n, event in enumerate(block.events) if event not in branch]
    shortcuts = [way for way in aside if way and not set(map(id, way)) & set(map(id, branch))]
    shortcut = max(shortcuts, key=len, default=[])
    largest = 1.0 if gates is None else float(gates.abs().max())
    return largest, norm_of(branch, block.site), norm_of(shortcut, None) if shortcut else 1.0


def way_to(block: Block, number: int) -> list[Event] | None:
    """Layers from the input of a block to one of its layers, each on the output of the last; None: another way."""
    way = [block.events[number]]
    for event in reversed(block.events[:number]):
        if event.gave == way[0].given:
            way.insert(0, event)
    return way if way[0].given == block.first else None


def norm_of(way: Sequence[Event], site: nn.Module | None) -> float:
    """Product of the norms of the linear parts of a way, between its activations; gates of ``site`` are left out."""
    product = 1.0
    part: list[nn.Module] = []
    shape: tuple[int, ...] = ()
    for event in [*way, None]:
        if event is not None and isinstance(event.module, LINEAR):
            shape = shape or event.shape
            part.append(stock(event.module) if event.module is site else event.module)
        elif part:
            product *= operator_norm(part, shape)
            part, shape = [], ()
    return product


def stock(layer: nn.Module) -> nn.Module:
    """A layer without its gates."""
    if not isinstance(layer, Plugged):
        return layer
    found: nn.Module = copy_of(layer, FoldError)
    detach(found)
    return found


def operator_norm(layers: Sequence[nn.Module], shape: tuple[int, ...]) -> float:
    """Largest growth of a change through linear layers, one after another, by power iteration.

    Args:
        layers: affine; what they add is left out.
        shape: of their input, with any batch.
    """
    example = next((p for layer in layers for p in layer.parameters()), torch.zeros(()))
    run = nn.Sequential(*layers)
    zero = torch.zeros(1, *shape[1:], dtype=example.dtype, device=example.device)
    vector = torch.randn(zero.shape, generator=torch.Generator().manual_seed(0)).to(zero)
    vector = vector / vector.norm()
    found = 0.0
    with torch.enable_grad():
        for _ in range(ITERATIONS):
            given = vector.detach().requires_grad_(True)
            out = run(given) - run(zero)
            (back,) = torch.autograd.grad(out, given, out.detach())
            size = float(back.norm())
            before, found = found, size**0.5
            if size == 0 or abs(found - before) <= 1e-6 * found:
                break
            vector = back / size
    return found
