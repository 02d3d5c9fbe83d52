"""Sites: which layers a spec means. Data, not code: `SITES` maps a block class to the layer that ends its branch.

The blocks of MMDetection, diffusers, transformers, torchvision, timm and this package's own networks are data, named in
`asr_downstream.registry.FRAMEWORKS`; a user adds blocks with `register_site`, which win over those of a framework.

A site may be any layer of the fold table (`asr_downstream.plugging.layers.LAYERS`): scaling the output of an affine
layer is always the same as scaling its parameters, whatever comes after it. What is *not* a site: a block's output
after its shortcut was added, or the result of SiLU or GELU, since no weight alone makes them. A gate that is wanted
after a ReLU goes on the layer before it: ``relu(z) v == relu(z v)`` for the positive gates that a sigmoid gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.modules.affine import input_channels
from asr_downstream.modules.slots import inside_gate
from asr_downstream.plugging.gating.sides import INPUT, OUTPUT
from asr_downstream.plugging.layers import LAYERS, Plugged, plugged_class
from asr_downstream.registry import FRAMEWORKS, framework_data

__all__ = [
    'NOT_SITES',
    'SITES',
    'Branch',
    'Site',
    'block_of',
    'branch_end',
    'branches',
    'find_sites',
    'known_sites',
    'register_site',
    'sites_table',
]


@dataclass(frozen=True)
class Branch:
    """How the residual branch of a block class ends.

    Attributes:
        ends: attribute paths of the layer inside the block; the first that is there and can be folded counts.
        shortcut: attribute that is true if a block has a shortcut, and so a residual branch; '' if every block has.
        part: the block is one branch of a larger block (attention and MLP of a transformer layer); the larger block is
            what a stage consists of.
        windows: the layer sees windows of an image as samples of their own: gates of one image make no sense there.
        note: for the documentation.
        others: further branches of the same block, such as the MLP beside the attention.
    """

    ends: tuple[str, ...]
    shortcut: str = ''
    part: bool = False
    windows: bool = False
    note: str = ''
    others: tuple[Branch, ...] = ()


# Entries of `register_site`: qualified name of a block class -> how its residual branch ends; subclasses of a block
# inherit its entry. They win over those of a framework, which stay in its module of data.
SITES: dict[str, Branch] = {}


# Layers that cannot be sites, and why: the second table of the documentation.
NOT_SITES: dict[str, str] = {
    'the output of a block, with its shortcut added': 'no weight of the branch scales the shortcut',
    'the result of SiLU, GELU or softmax': (
        "they are not homogeneous: f(v z) is not v f(z); `side='input'` scales what the layer after them reads"
    ),
    'the output projection of `nn.MultiheadAttention`': 'it reads the weights of its parts past their forwards',
    'a norm with affine=False': 'it has no weight; take the end of the branch',
    'an embedding': 'it is a table, not an affine map; its rows belong to tokens, timesteps or classes',
    'a layer whose weight is shared or computed': 'gates would scale the other layer too, or have nothing to fold into',
}


@dataclass(frozen=True)
class Site:
    """A layer of a model that a gate scales.

    Attributes:
        path: its name in ``model.named_modules()``.
        layer: the layer, stock or plugged.
        frozen: nothing in the block around it is trained, so neither will its gates be.
        block: path of the residual block that it belongs to, or of its parent.
        windows: it sees windows of an image as samples of their own.
        side: which of its channels the gates of a plug scale, ``'output'`` or ``'input'``.
    """

    path: str
    layer: nn.Module
    frozen: bool = False
    block: str = ''
    windows: bool = False
    side: str = OUTPUT

    @property
    def stage(self) -> str:
        """Path of the parent of the block: the sites of one width in it, one after another, are a stage."""
        return self.block.rpartition('.')[0]

    @property
    def stock(self) -> type[nn.Module]:
        """Class of the layer, without a plug."""
        return self.layer.stock if isinstance(self.layer, Plugged) else type(self.layer)

    @property
    def channels(self) -> int:
        """Number of channels that a gate scales."""
        if self.side == INPUT:
            return input_channels(self.layer)
        kind: Any = plugged_class(self.stock)
        return kind.channels_of(self.layer)


def sites_table() -> str:
    """Markdown of `known_sites` and `NOT_SITES`, for the documentation."""
    known = known_sites()
    rows = [
        f'| `{name}` | {"; and ".join(", else ".join(f"`{e}`" for e in b.ends) for b in (branch, *branch.others))} '
        f'| {remark(branch)} |'
        for name, branch in known.items()
    ]
    never = [f'| {what} | {why} |' for what, why in NOT_SITES.items()]
    return '\n'.join(
        [
            '| block | layer that ends its branch | |',
            '|---|---|---|',
            *rows,
            '',
            '| never a site | because |',
            '|---|---|',
            *never,
        ]
    )


def remark(branch: Branch) -> str:
    """Text of the last column of `sites_table`."""
    found = [branch.note] if branch.note else []
    if branch.shortcut:
        found.append(f'where `{branch.shortcut}`')
    if branch.windows:
        found.append('constant gates only: it sees windows, not images')
    return '; '.join(found)


def register_site(block: type[nn.Module] | str, path: str, shortcut: str = '') -> None:
    """Say which layer ends the residual branch of a block class.

    Args:
        block: the class, or its qualified name such as ``'mypackage.blocks.MyBlock'``.
        path: attribute path of the layer inside the block, such as ``'bn2'`` or ``'branch.3'``.
        shortcut: attribute of the block that says whether it has a shortcut; blocks without one are left out.

    Raises:
        PlugError: these are no class and no path.
    """
    if not isinstance(block, type | str) or not isinstance(path, str) or not path or not isinstance(shortcut, str):
        raise PlugError(
            f'register_site({block!r}, {path!r}): expected a class of blocks, or its qualified name, and the path of a '
            f"layer in it, as in register_site(MyBlock, 'bn2')"
        )
    SITES[block if isinstance(block, str) else qualified_name(block)] = Branch((path,), shortcut)


def qualified_name(cls: type) -> str:
    """Return ``'module.Class'``."""
    return f'{cls.__module__}.{cls.__qualname__}'


def branch_of(block: nn.Module) -> Branch | None:
    """Return the entry for the class of ``block`` or its nearest base: the user's, or that of its framework."""
    for cls in type(block).__mro__:
        name = qualified_name(cls)
        if (branch := SITES.get(name) or sites_of(cls.__module__.partition('.')[0]).get(name)) is not None:
            return branch
    return None


def sites_of(framework: str) -> Mapping[str, Branch]:
    """Entries of a package, of which the module of data may hold others too; none where it is not known."""
    return framework_data(FRAMEWORKS[framework]).SITES if framework in FRAMEWORKS else {}


def known_sites() -> dict[str, Branch]:
    """All entries: those of the adapters, in the order of `asr_downstream.registry.FRAMEWORKS`, then the user's."""
    return {name: branch for framework in FRAMEWORKS for name, branch in sites_of(framework).items()} | SITES


def branches(model: nn.Module) -> Iterator[tuple[str, nn.Module, Branch]]:
    """Name, block and branch of every branch of the known blocks of a model."""
    for name, block in model.named_modules():
        if (first := branch_of(block)) is not None:
            for branch in (first, *first.others):
                yield name, block, branch


def branch_end(block: nn.Module, branch: Branch) -> nn.Module | None:
    """Return the layer that ends the branch: the first that is there and can be folded, or else that is there."""
    found = []
    for path in branch.ends:
        try:
            found.append(attrgetter(path)(block))
        except AttributeError:
            continue
    return next((layer for layer in found if is_layer(layer)), next((f for f in found if f is not None), None))


def find_sites(model: nn.Module, sites: str | Sequence[str] = 'residual') -> list[Site]:
    """Find the sites that ``sites`` names, in the order of ``model.named_modules()``.

    Args:
        model: any module.
        sites: ``'residual'`` (the blocks of `SITES`), ``'all'`` (every layer that can be folded), or a list of fnmatch
            patterns over the names of ``named_modules()``.

    Raises:
        PlugError: nothing matches, or what matches cannot be a site; the message says what there is instead.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if sites == 'residual':
        found = residual_sites(model, names)
    elif sites == 'all':
        found = {
            name: layer for name, layer in model.named_modules() if is_layer(layer) and not inside_gate(model, name)
        }
    elif isinstance(sites, str):
        raise PlugError(f"sites={sites!r} is not known: use 'residual', 'all' or a list of patterns, [{sites!r}]")
    else:
        found = matching_sites(model, list(sites))
    return [
        Site(path, layer, is_frozen(model, path), block_of(model, path), in_windows(model, path))
        for path, layer in found.items()
    ]


def has_shortcut(value: Any) -> bool:
    """Whether a block's attribute says that it has a shortcut: an empty ``nn.Sequential`` is the identity, not none."""
    return isinstance(value, nn.Module) or bool(value)


def residual_sites(model: nn.Module, names: dict[int, str]) -> dict[str, nn.Module]:
    """Layers that end the branches of the known blocks."""
    found = {}
    without = 0
    for name, block, branch in branches(model):
        if branch.shortcut and not has_shortcut(getattr(block, branch.shortcut)):
            without += 1
            continue
        layer = branch_end(block, branch)
        path = names.get(id(layer)) if layer is not None else None
        if layer is None or path is None:
            raise PlugError(
                f'{name}: a {type(block).__name__} should end in {" or ".join(branch.ends)} (SITES), but has no such '
                f"layer; correct it with register_site(...) or name the layers with sites=['pattern']"
            )
        if not is_layer(layer):
            raise PlugError(
                f'{path}: {qualified_name(type(layer))} is not a layer that can be folded{why_not(layer)}; those are '
                f"{foldable()}; name other layers with sites=['pattern']"
            )
        found[path] = layer
    if not found and without:
        raise PlugError(
            f'{type(model).__name__} has {without} known blocks, and none of them has a shortcut, so there is no '
            f"residual branch; name layers: sites=['pattern']; that can be sites here: {some(layer_names(model))}"
        )
    if not found:
        blocks = ', '.join(sorted('.'.join(key.split('.')[-2:]) for key in known_sites()))
        raise PlugError(
            f'{type(model).__name__} has no residual block that is known (known: {blocks}). Say which layer ends yours '
            f"with register_site(Block, 'path'), or name the layers: sites=['layer1.*.bn2']; "
            f'layers that can be sites here: {some(layer_names(model))}'
        )
    return found


def matching_sites(model: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """Layers whose names match a pattern; every pattern must match something that can be a site."""
    found: dict[str, nn.Module] = {}
    modules = {name: m for name, m in model.named_modules() if not inside_gate(model, name)}
    for pattern in patterns:
        matches = {name: m for name, m in modules.items() if fnmatchcase(name, pattern)}
        layers = {name: m for name, m in matches.items() if is_layer(m)}
        if not matches:
            raise PlugError(
                f'sites: nothing in {type(model).__name__} matches {pattern!r}; '
                f'layers that can be sites: {some(layer_names(model))}'
            )
        if not layers:
            name, module = next(iter(matches.items()))
            raise PlugError(
                f'sites: {pattern!r} matches {name} ({qualified_name(type(module))}), which is not a layer that can be '
                f'folded{why_not(module)}; those are {foldable()}, and not their subclasses'
            )
        found.update(layers)
    return {name: m for name, m in modules.items() if name in found}


def is_layer(module: nn.Module) -> bool:
    """Whether this is a layer of the fold table, stock or plugged."""
    return isinstance(module, Plugged) or plugged_class(type(module)) is not None


def why_not(module: nn.Module) -> str:
    """What an adapter says of a layer that looks as if it could be folded, in brackets, or nothing."""
    for cls in type(module).__mro__:
        location = FRAMEWORKS.get(cls.__module__.partition('.')[0])
        reasons = {} if location is None else getattr(framework_data(location), 'NOT_LAYERS', {})
        if reason := reasons.get(qualified_name(cls)):
            return f' ({reason})'
    return ''


def foldable() -> str:
    """Names of the classes of the fold table."""
    return ', '.join(dict.fromkeys(cls.__name__ for cls in LAYERS))


def block_of(model: nn.Module, path: str) -> str:
    """Path of the block around a layer: one of `SITES`, else the nearest element of a list, else its parent."""
    parents = parents_of(path)
    known = {parent: branch for parent in parents if (branch := branch_of(model.get_submodule(parent))) is not None}
    nearest = list(known)[-1] if known else ''
    if known and not known[nearest].part:
        return nearest
    if known:
        parents = parents[: parents.index(nearest) + 1]
    lists = [isinstance(model.get_submodule(p), nn.Sequential | nn.ModuleList) for p in parents]
    elements = [parents[depth + 1] for depth in range(len(parents) - 1) if lists[depth]]
    if elements:
        return elements[-1]
    if known:
        return nearest
    return path if lists[-1] else parents[-1]


def in_windows(model: nn.Module, path: str) -> bool:
    """Whether a layer belongs to a block that sees windows of images."""
    around = (branch_of(model.get_submodule(parent)) for parent in parents_of(path))
    return any(branch is not None and branch.windows for branch in around)


def parents_of(path: str) -> list[str]:
    """Paths of the modules around a layer, from the model itself (``''``) inwards."""
    parts = path.split('.')
    return ['.'.join(parts[:depth]) for depth in range(len(parts))]


def is_frozen(model: nn.Module, path: str) -> bool:
    """Whether the block around a layer has parameters and none of them is trained."""
    parameters = list(model.get_submodule(path.rpartition('.')[0]).parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def layer_names(model: nn.Module) -> list[str]:
    """Names of all layers of the fold table."""
    return [name for name, m in model.named_modules() if is_layer(m) and not inside_gate(model, name)]
