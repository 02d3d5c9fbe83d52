"""What attention costs, site by site, against the same model without it.

Both models run whole, and counters are read before and after each site, so that each site is charged with what its
forward does in this model. Constant gates that are computed together, before the first layer, belong to no site: they
are the difference of the whole models that is left, as is what the backward pass launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed
from asr_downstream.errors import AsrError, FoldError
from asr_downstream.folding.analysis.gates import NATIVE, Place, places_of
from asr_downstream.folding.native.blocks import put
from asr_downstream.folding.passes import Step, default_step
from asr_downstream.folding.verify import tensors
from asr_downstream.measure import cost
from asr_downstream.measure.launches import Launches
from asr_downstream.measure.timing import Ratio, ratio, turns
from asr_downstream.modules.copies import batch_of, copy_of
from asr_downstream.plugging.attach import detach
from asr_downstream.plugging.bank.hooks import uninstall
from asr_downstream.plugging.gating.shared_unit import unregister
from asr_downstream.plugging.layers import Plugged

__all__ = ['Costs', 'SiteCost', 'Totals', 'measure_costs', 'without_attention']


ELSEWHERE = 'elsewhere'  # of a model, outside of its sites


@dataclass(frozen=True)
class SiteCost:
    """What attention adds at a site.

    Attributes:
        path: of the site.
        gates: their kind.
        parameters: of the gates; a shared unit counts at the first of its sites.
        macs: multiply-adds of a forward.
        launches: operators of a forward in eval mode.
        training_launches: of a forward in training mode.
        saved_bytes: kept for the backward pass, by a forward in training mode.
        milliseconds: of a forward in eval mode, median over rounds.
        low: lower quartile.
        high: upper quartile.
    """

    path: str
    gates: str
    parameters: int
    macs: int
    launches: int
    training_launches: int
    saved_bytes: int
    milliseconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Totals:
    """Cost of a whole model on a batch.

    Attributes:
        parameters: their number.
        macs: multiply-adds of a forward.
        launches: operators of a forward in eval mode, without gradients.
        step_launches: of a forward in training mode, loss and backward.
        saved_bytes: kept for the backward pass.
        milliseconds: of a forward in eval mode, median.
    """

    parameters: int
    macs: int
    launches: int
    step_launches: int
    saved_bytes: int
    milliseconds: float


@dataclass(frozen=True, repr=False)
class Costs(Printed):
    """Cost of the attention of a model.

    Attributes:
        name: of the model.
        batch: shape of the first tensor of the batch.
        model: as it is.
        stock: without attention.
        latency: of the model over that of the stock one, in turns.
        sites: in the order of the model.
        elsewhere: what attention adds outside of the sites: gates that are computed together.
    """

    name: str
    batch: str
    model: Totals
    stock: Totals
    latency: Ratio
    sites: tuple[SiteCost, ...]
    elsewhere: SiteCost

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            'name': self.name,
            'batch': self.batch,
            'model': asdict(self.model),
            'without_attention': asdict(self.stock),
            'latency_ratio': self.latency._asdict(),
            'sites': [asdict(site) for site in self.sites],
            'elsewhere': asdict(self.elsewhere),
        }

    def parts(self) -> list[Table | str]:
        table = Table('site', 'gates', title=f'{self.name}: what attention adds, batch {self.batch}')
        for head in ('parameters', 'MACs', 'launches', 'in training', 'saved bytes', 'ms (quartiles)'):
            table.add_column(head, justify='right')
        for s in (*self.sites, self.elsewhere):
            numbers = (f'{n:,}' for n in (s.parameters, s.macs, s.launches, s.training_launches, s.saved_bytes))
            table.add_row(s.path, s.gates, *numbers, f'{s.milliseconds:.3f} ({s.low:.3f} to {s.high:.3f})')
        table.add_section()
        a, b = self.model, self.stock
        for name, t in (('whole model', a), ('without attention', b)):
            numbers = (f'{n:,}' for n in (t.parameters, t.macs, t.launches, t.step_launches, t.saved_bytes))
            table.add_row(name, '', *numbers, f'{t.milliseconds:.3f}')
        return [
            table,
            f'latency: {self.latency} of that without attention; launches in training of whole models: a step',
        ]


def without_attention(model: nn.Module) -> nn.Module:
    """Copy a model without its gates, and without attention of its own: what a fold leaves, with other weights."""
    bare: nn.Module = copy_of(model, FoldError)
    natives = [path for path, place in places_of(bare).items() if place.kind == NATIVE]
    for module in list(bare.modules()):
        uninstall(module)
        if isinstance(module, Plugged):
            detach(module)
    unregister(bare, set())
    for path in natives:
        put(bare, path, nn.Identity())
    return bare


def measure_costs(name: str, model: nn.Module, batch: Any, step: Step = default_step, rounds: int = 30) -> Costs:
    """Measure what attention adds, at each site and in all.

    Args:
        name: of the model.
        model: plugged, or with attention of its own, in eval mode; it is not changed.
        batch: to run.
        step: runs the model on a batch; gives tensors.
        rounds: of timing both models, in turns.

    Raises:
        AsrError: there is no attention.
    """
    places = places_of(model)
    if not places:
        raise AsrError(f'{name}: {type(model).__name__} has no gates, so attention costs nothing here')
    bare = without_attention(model)
    pair = {'model': model, 'stock': bare}
    paths = list(places)
    macs = {key: count(m, paths, batch, step, flops) for key, m in pair.items()}
    launches = {key: count(m, paths, batch, step, dispatched) for key, m in pair.items()}
    trained = {key: count(m, paths, batch, step, dispatched, training=True) for key, m in pair.items()}
    saved = {key: count(m, paths, batch, step, kept, training=True) for key, m in pair.items()}
    times = time_sites(pair, paths, batch, step, rounds)
    own = parameters_of(model, places)
    whole = {key: [t[''] for t in found] for key, found in times.items()}
    rows = []
    for path in (*paths, ELSEWHERE):
        extra = [a[path] - b[path] for a, b in zip(times['model'], times['stock'], strict=True)]
        low, _, high = quantiles(extra, n=4) if len(extra) > 1 else (extra[0],) * 3
        rows.append(
            SiteCost(
                path,
                places[path].kind if path in places else '',
                own.get(path, 0),
                macs['model'][path] - macs['stock'][path],
                launches['model'][path] - launches['stock'][path],
                trained['model'][path] - trained['stock'][path],
                saved['model'][path] - saved['stock'][path],
                median(extra),
                low,
                high,
            )
        )
    *sites, elsewhere = rows
    a, b = (
        Totals(
            cost.parameters(m),
            macs[key][''],
            launches[key][''],
            step_launches(m, batch, step),
            saved[key][''],
            median(whole[key]),
        )
        for key, m in pair.items()
    )
    shape = next((str(tuple(t.shape)) for _, t in tensors(batch)), '')
    return Costs(name, shape, a, b, ratio(whole['model'], whole['stock']), tuple(sites), elsewhere)


Counter = Callable[[nn.Module], tuple[AbstractContextManager[Any], Callable[[], int]]]


def flops(model: nn.Module) -> tuple[AbstractContextManager[Any], Callable[[], int]]:
    """Counter of multiply-adds, and how it is read."""
    counter = cost.counting()
    return counter, lambda: counter.get_total_flops() // 2


def dispatched(model: nn.Module) -> tuple[AbstractContextManager[Any], Callable[[], int]]:
    """Counter of launches, and how it is read."""
    counter = Launches()
    return counter, lambda: counter.number


def kept(model: nn.Module) -> tuple[AbstractContextManager[Any], Callable[[], int]]:
    """Counter of saved bytes, and how it is read."""
    counter = cost.Saved(model)
    return counter, lambda: counter.bytes


def count(
    model: nn.Module, paths: Sequence[str], batch: Any, step: Step, counter: Counter, training: bool = False
) -> dict[str, int]:
    """What a forward counts at each of these modules, and under '' in all."""
    model = copy_of(model, FoldError)
    model.train(training)
    block, read = counter(model)
    given = batch_of(batch)
    with torch.set_grad_enabled(training), block, watching(model, paths, read) as found:
        outputs = step(model, given)  # kept until all is counted
        whole = read()
    del outputs
    return with_rest(found, whole)


def with_rest(found: dict[str, Any], whole: Any) -> dict[str, Any]:
    """Add the whole of a forward, under '', and what of it is at none of the modules."""
    return {**found, ELSEWHERE: whole - sum(found.values()), '': whole}


@contextmanager
def watching(model: nn.Module, paths: Sequence[str], read: Callable[[], Any]) -> Any:
    """Sum inside the block how much a number grows while each of these modules runs."""
    found: dict[str, Any] = dict.fromkeys(paths, 0)
    begun: dict[str, Any] = {}

    def begin(path: str, *_: Any) -> None:
        begun[path] = read()

    def end(path: str, *_: Any) -> None:
        found[path] += read() - begun[path]

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(partial(begin, path)))
        handles.append(module.register_forward_hook(partial(end, path)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def step_launches(model: nn.Module, batch: Any, step: Step) -> int:
    """Launches of a forward in training mode, the mean squares of its outputs as loss, and the backward."""
    model = copy_of(model, FoldError)
    model.train()
    model.zero_grad(set_to_none=True)
    given = batch_of(batch)
    with Launches() as launches:
        losses = [t.square().mean() for _, t in tensors(step(model, given)) if t.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
    return launches.number


def time_sites(
    models: Mapping[str, nn.Module], paths: Sequence[str], batch: Any, step: Step, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds at each of these modules, and under '' in all: of each model, one entry a round, in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(2):
            for model in models.values():
                step(model, batch_of(batch))
        for order in turns(list(models), rounds, 'timing'):
            for name in order:
                given = batch_of(batch)
                with watching(models[name], paths, clock) as times:
                    begin = clock()
                    step(models[name], given)
                    whole = clock() - begin
                found[name].append(with_rest(times, whole))
    return found


def clock() -> float:
    """Milliseconds; waits for a CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3


def parameters_of(model: nn.Module, places: Mapping[str, Place]) -> dict[str, int]:
    """Parameters of the gates at each site; what is shared counts where it is met first."""
    seen: set[int] = set()
    found = {}
    for path in places:
        module: Any = model.get_submodule(path)
        parts: list[nn.Module] = [module]
        if isinstance(module, Plugged):
            gates = [*(module.gate or ()), *(module.dynamic or ())]  # type: ignore[attr-defined]
            parts = [*gates, *(unit for gate in gates if (unit := gate.site_attention.unit) is not None)]
        fresh: dict[int, Tensor] = {id(p): p for part in parts for p in part.parameters() if id(p) not in seen}
        seen |= fresh.keys()
        found[path] = sum(p.numel() for p in fresh.values())
    return found
