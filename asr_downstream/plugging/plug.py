"""`plug`: attach attentions to the sites of a model. Everything is checked and built before anything is changed."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.modules.check import check_bare, check_module, check_own, check_sites_bare, check_weights
from asr_downstream.plugging.attach import attach
from asr_downstream.plugging.bank import hooks as bank
from asr_downstream.plugging.describe import Description, describe
from asr_downstream.plugging.gating.gates import ConstantGate, DynamicGate, Gate
from asr_downstream.plugging.gating.shared_unit import SharedUnit, check_free, register
from asr_downstream.plugging.gating.sides import OUTPUT
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.plugs import Selection
from asr_downstream.plugging.plugs.start import check_starts, scale, warn_of_zeros
from asr_downstream.plugging.save import Attached, attached, starts, watch
from asr_downstream.plugging.sites import Site, find_sites
from asr_downstream.registry import PLUGS, REBUILDERS, build

__all__ = ['plug']

Spec = dict[str, Any] | Sequence[dict[str, Any]]


def plug(model: nn.Module, spec: Spec, *, frozen: bool = False) -> Description:
    """Attach the attentions of ``spec`` to ``model``, in place.

    The layers at the sites become plugged subclasses of their stock classes; parameter names, identities and values
    stay, and so does the global random state: of two models of one seed, the plugged one has the same stock weights.

    Args:
        model: any module: an mmdet backbone or detector, a UNet, a module of your own; not wrapped by DDP or FSDP yet.
            Of diffusers and transformers give the whole model, and name the sites: its ``save_pretrained`` then knows
            of the gates, see `asr_downstream.load_plugged`.
        spec: ``dict(type='ASR', attention=dict(type='SE'), sites='residual', repeat=1, init=0.1, preserve=False)``
            or a list of such dicts, applied from the layer outwards: ``[ASR, Attention]``; ``shift=True`` and
            ``side='input'``: see `asr_downstream.plugging.gating.sides`. ``dict(type='Start', value=0.5)``, first in
            a list, has no gates: see `asr_downstream.plugging.plugs.start`.
        frozen: whether sites in frozen blocks are plugged like others: where only the gates learn, they learn there
            too, see `asr_downstream.plugging.learning.restrict.restrict`.

    Returns:
        The table of the sites, as `describe` gives it.

    Raises:
        PlugError: unknown names or arguments, no site, a layer that cannot be plugged, or gates that do not fit; the
            model has not been touched.
    """
    check_module(model, 'plug', PlugError)
    specs = spec_list(spec)
    if not specs:
        raise PlugError("the spec is empty: expected dict(type='ASR', attention=dict(type='SE')) or a list of such")
    plugs: list[Selection] = [build(PLUGS, s) for s in specs]

    layers: dict[str, nn.Module] = {}
    gates: defaultdict[str, list[Gate]] = defaultdict(list)
    units: list[SharedUnit] = []
    records: list[Attached] = []
    scaled: dict[str, float] = {}  # path -> by what
    check_bare(model, PlugError)
    for number, item in enumerate(plugs):
        sites = item.select(trainable_sites(model, item, frozen))
        for site in sites:
            check_layer(model, site)
            layers[site.path] = site.layer
        check_sites_bare(model, [site.path for site in sites], PlugError)
        check_own(model, {site.path: site.layer for site in sites}, PlugError)
        before = sum(other.start is None for other in plugs[:number])  # gates are the same with a Start and without
        built, shared = item.build(sites, partial(own_random_stream, before))
        units += shared
        constant = all(isinstance(gate, ConstantGate) for of_site in built.values() for gate in of_site)
        records.append(attached(specs[number], list(built), constant, item.start))
        if item.start is not None:
            check_starts(list(built), starts(model) | scaled, gates)
            scaled.update(dict.fromkeys(built, item.start))
        for path, of_site in built.items():
            if any(isinstance(g, DynamicGate) for g in gates.get(path, ())) and any(
                isinstance(g, ConstantGate) and g.side == OUTPUT for g in of_site
            ):
                raise PlugError(
                    f'{path}: constant gates outside of an input-dependent attention do not fold; '
                    f'put the ASR first in the list: [ASR, Attention]'
                )
            if of_site:
                gates[path] += of_site

    if units:
        check_free(model)
    register(model, units)
    warn_of_zeros(layers, scaled)
    for path, value in scaled.items():
        scale(layers[path], value)
    for path, of_site in gates.items():
        attach(
            layers[path],
            [g for g in of_site if isinstance(g, ConstantGate)],
            [g for g in of_site if isinstance(g, DynamicGate)],
        )
    bank.install(model, [g for of_site in gates.values() for g in of_site if isinstance(g, ConstantGate)])
    model.plug_sites = [*getattr(model, 'plug_sites', []), *records]  # type: ignore[assignment]
    model.plug_spec = [*getattr(model, 'plug_spec', []), *copy.deepcopy(specs)]  # type: ignore[assignment]
    if gates:
        watch(model)
    return describe(model)


REBUILDERS.register_module(module=plug)


def spec_list(spec: Any) -> list[dict[str, Any]]:
    """The specs as a list.

    Raises:
        PlugError: it is neither a dict nor a list.
    """
    if isinstance(spec, dict):
        return [spec]
    if not isinstance(spec, list | tuple):
        raise PlugError(f"plug: expected a dict like dict(type='ASR', attention=dict(type='SE')), got {spec!r}")
    return list(spec)


def trainable_sites(model: nn.Module, item: Selection, also_frozen: bool) -> list[Site]:
    """Sites of one plug. Frozen ones are skipped, with a warning, unless ``sites`` is a list that names them."""
    sites = find_sites(model, item.sites)
    if also_frozen or not any(p.requires_grad for p in model.parameters()):
        return sites  # everything is frozen: the gates alone are to be trained
    frozen = [site.path for site in sites if site.frozen]
    if not frozen:
        return sites
    advice = 'unfreeze them first (mmdet: frozen_stages=0 or -1)'
    if not isinstance(item.sites, str):
        warnings.warn(
            f'{len(frozen)} sites lie in frozen blocks and may never train: {some(frozen)}; '
            f'{advice}, or leave them out of sites=[...]',
            stacklevel=3,
        )
        return sites
    rest = [site for site in sites if not site.frozen]
    if not rest:
        raise PlugError(
            f'all {len(frozen)} sites lie in frozen blocks: {some(frozen)}; {advice}, or name them with sites=[...]'
        )
    warnings.warn(
        f'{len(frozen)} sites lie in frozen blocks, where nothing would train, and were not plugged: '
        f'{some(frozen)}; to plug them, {advice}',
        stacklevel=3,
    )
    return rest


def check_layer(model: nn.Module, site: Site) -> None:
    """Refuse a layer that has gates already, or no weight that gates can be folded into."""
    layer = site.layer
    if isinstance(layer, Plugged):
        raise PlugError(
            f'{site.path}: is plugged already; fold() the model first, or give all plugs in one list: [ASR, Attention]'
        )
    parents = site.path.split('.')[:-1]
    for depth in range(len(parents) + 1):
        if isinstance(parent := model.get_submodule('.'.join(parents[:depth])), nn.TransformerEncoderLayer):
            raise PlugError(
                f'{site.path}: {type(parent).__name__} reads its weights past the forwards of its layers in eval, '
                f'so gates would be ignored; leave it out of sites=[...]'
            )
    if getattr(layer, 'weight', None) is None:
        raise PlugError(
            f'{site.path}: {type(layer).__name__} has affine=False, so there is no weight to fold gates into; '
            f'build it with affine=True, or plug the layer before it'
        )
    check_weights(site.path, layer, PlugError)
    try:
        _ = site.channels
    except PlugError as error:
        raise PlugError(f'{site.path}: {error}') from None


@contextmanager
def own_random_stream(number: int, name: str) -> Iterator[None]:
    """Draw from a stream of the plug's number and ``name``, seeded by the global one, which stays as it was."""
    generator = torch.default_generator  # torch.manual_seed would seed the accelerators as well
    state = generator.get_state()
    try:
        generator.manual_seed(int(torch.randint(2**62, ())) ^ zlib.crc32(f'{number}.{name}'.encode()))
        yield
    finally:
        generator.set_state(state)
