"""`replace`: put multi-head LSTMs in the places of self-attentions. All is checked and built before a change."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.far.model.attentions import HOSTS, Host, StandIn, TransformersStandIn, find_host, has, stand_in
from asr_downstream.far.model.describe import Description, describe
from asr_downstream.far.model.linear import MultiHeadLinear
from asr_downstream.far.model.lstm import MultiHeadLSTM
from asr_downstream.far.model.mixer import MIXERS, VARIANTS, Mixer
from asr_downstream.modules.check import check_bare, check_module, check_sites_bare
from asr_downstream.plugging.plug import own_random_stream
from asr_downstream.plugging.save import watch
from asr_downstream.registry import REBUILDERS, find

__all__ = ['Place', 'find_attentions', 'places', 'replace']

TAKES = ('type', 'variant', 'layers', 'heads', 'projection', 'execution', 'widths', 'scan', 'mixer')
for each in (MultiHeadLSTM, MultiHeadLinear):
    MIXERS.register_module(name=each.name, module=each)
# Parts of an attention that stand for queries, keys and values, and go with them.
QKV = re.compile(r'(to_)?(q|k|v|qkv|kv|query|key|value|c_attn)(_proj|_bias|_norm)?|norm_[qk]|attn_drop.*')
DROPOUTS = ('proj_drop', 'resid_dropout', 'dropout')
PROJECTIONS = ('proj', 'out_proj', 'o_proj', 'to_out.0', 'to_out', 'c_proj', 'output.dense')
HEADS = ('num_heads', 'heads', 'num_attention_heads', 'n_heads', 'nhead')


@dataclass(frozen=True)
class Place:
    """An attention that can be replaced.

    Attributes:
        path: in ``named_modules()``.
        attention: the module.
        host: what is known of its class.
        heads: number of heads.
    """

    path: str
    attention: nn.Module
    host: Host
    heads: int

    @property
    def projection(self) -> nn.Linear:
        """Its output projection."""
        return self.attention.get_submodule(self.host.projection)  # type: ignore[return-value]


def replace(model: nn.Module, spec: dict[str, Any]) -> Description:
    """Replace self-attentions of ``model`` by multi-head LSTMs, in place.

    Everything else stays the same objects with the same weights, and so does the global random state.

    Args:
        model: a ViT or DeiT of transformers, a UNet or DiT of diffusers, or any module with attentions
            ``(B, N, C) -> (B, N, C)``.
        spec: ``dict(type='FAR', variant='M3', layers='all', execution='auto')``. ``layers``: ``'all'`` (every
            self-attention that `HOSTS` knows), numbers into that list, or fnmatch patterns. For a class that is not
            known, name it by pattern and say, where it cannot be seen, ``heads`` and ``projection`` (path of its output
            projection). ``widths``: of pruned models, ``{path: [(ahead, back), ...]}``. ``scan``: in which order heads
            read the tokens of an image, ``'raster'`` or ``'cross'``, see `asr_downstream.far.model.scan`.
            ``mixer``: ``'lstm'``, or ``'linear'`` attention, as a control.

    Returns:
        The table of the replacements, as `describe` gives it.

    Raises:
        PlugError: nothing matches, or a match has what an LSTM would ignore; the model has not been touched.
    """
    check_module(model, 'replace', PlugError)
    if not isinstance(spec, dict) or spec.get('type') != 'FAR':
        raise PlugError(f"replace: expected dict(type='FAR', variant='M3', layers='all'), got {spec!r}")
    for key in spec:
        if key not in TAKES:
            raise PlugError(f'FAR: takes no {key!r}; {did_you_mean(str(key), TAKES)}')
    check_kinds(spec)
    check_bare(model, PlugError)
    if getattr(model, 'replace_spec', None) is not None:
        raise PlugError(f'{type(model).__name__}: has replacements already; start from the teacher')
    found = find_attentions(model, spec.get('layers', 'all'), spec.get('heads'), spec.get('projection'))
    check_sites_bare(model, [place.path for place in found], PlugError)
    widths = spec.get('widths') or {}
    if unknown := widths.keys() - {place.path for place in found}:
        raise PlugError(f'FAR: widths has {some(sorted(unknown))}, which are not replaced here')
    built = [build_mixer(place, spec, widths.get(place.path)) for place in found]
    for place, (mixer, projection) in zip(found, built, strict=True):
        put(place.attention, place.host.projection, projection)
        new = place.host.build(place.attention, mixer, place.host)
        if new is not place.attention:
            put(model, place.path, new)
    model.replace_spec = copy.deepcopy({**spec, 'layers': [p.path for p in found]})  # type: ignore[assignment]
    watch(model)
    return describe(model)


REBUILDERS.register_module(module=replace)


def check_kinds(spec: dict[str, Any]) -> None:
    """Refuse values of a spec that are of another kind than they should be.

    Raises:
        PlugError: there is one.
    """
    for key, kind, should in (
        ('variant', str, f'one of {", ".join(VARIANTS)}'),
        ('mixer', str, "'lstm' or 'linear'"),
        ('execution', str, "a text such as 'auto'"),
        ('projection', str | None, 'a path inside the module'),
        ('scan', str | dict, "'raster', 'cross', or a dict such as dict(type='cross', before=1)"),
        ('widths', dict | None, 'a dict: path of an attention -> pairs of numbers of hidden units'),
    ):
        if key in spec and not isinstance(spec[key], kind):
            raise PlugError(f'FAR: {key}={spec[key]!r} should be {should}')
    heads = spec.get('heads')
    if heads is not None and (type(heads) is not int or heads < 1):
        raise PlugError(f'FAR: heads={heads!r} should be a whole number of at least 1')
    for path, pairs in (spec.get('widths') or {}).items():
        if not isinstance(pairs, list | tuple) or not all(is_pair(pair) for pair in pairs):
            raise PlugError(f'FAR: widths of {path}: {pairs!r} should be pairs (ahead, back) of hidden units')


def is_pair(value: Any) -> bool:
    """Whether these are two numbers of hidden units."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value)


def build_mixer(place: Place, spec: dict[str, Any], widths: Any) -> tuple[Mixer, nn.Module]:
    """A mixer for a place and what its output projection becomes."""
    variant = spec.get('variant', 'M3')
    old = place.projection
    own = {**spec, 'widths': widths, 'before': place.host.before}
    out = old.out_features if variant in VARIANTS and VARIANTS[variant].projection == 'own' else old.in_features
    try:
        kind: Any = find(MIXERS, spec.get('mixer', MultiHeadLSTM.name))
        if strange := [key for key in MultiHeadLSTM.takes if spec.get(key) is not None and key not in kind.takes]:
            raise PlugError(f'FAR: mixer={kind.name!r} takes no {strange[0]!r}; leave it out')
        with own_random_stream(0, place.path):
            settings = {key: own[key] for key in kind.takes if key in own}
            mixer = kind(channels_of(place), place.heads, variant, out_channels=out, **settings)
            fresh = nn.Linear(old.in_features, old.out_features, old.bias is not None)
    except PlugError as error:
        raise PlugError(f'{place.path}: {error}') from None
    follows = VARIANTS[variant].projection
    projection = {'kept': old, 'fresh': fresh, 'own': nn.Identity()}[follows]
    for module in (mixer, projection if follows == 'fresh' else mixer):
        module.to(old.weight.device, old.weight.dtype)
    return mixer, projection


def channels_of(place: Place) -> int:
    """Channels of the tokens that an attention reads."""
    for name in ('q_proj', 'to_q', 'qkv', 'query', 'c_attn'):
        layer = getattr(place.attention, name, None)
        if isinstance(layer, nn.Linear):
            return layer.in_features
    return place.projection.out_features


def find_attentions(
    model: nn.Module, layers: Any = 'all', heads: int | None = None, projection: str | None = None
) -> list[Place]:
    """Find the self-attentions that ``layers`` means.

    Raises:
        PlugError: there is none, or one cannot be replaced; the message says why.
    """
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    numbered = listed and all(type(n) is int for n in layers)
    if listed and not numbered and not all(isinstance(pattern, str) for pattern in layers):
        raise PlugError(f"FAR: layers={layers!r} should be 'all', numbers of layers, or patterns")
    if (layers == 'all' or numbered) and (heads is not None or projection is not None):
        raise PlugError('FAR: heads and projection go with patterns, layers=[...]; those of known classes are seen')
    if layers == 'all':
        found = places(model)
        if not found:
            raise PlugError(f'{type(model).__name__}: {why_none(model)}')
        return found
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise PlugError(f"FAR: layers={layers!r} should be 'all', numbers of layers, or patterns")
    if numbered:
        found = places(model)
        if wrong := [n for n in layers if not 0 <= n < len(found)]:
            raise PlugError(f'FAR: layers has {wrong}, but there are {len(found)} self-attentions, from 0 on')
        return [found[n] for n in sorted(set(layers))]
    modules = dict(model.named_modules())
    chosen: dict[str, Place] = {}
    for pattern in layers:
        matches = {path: m for path, m in modules.items() if path and fnmatchcase(path, str(pattern))}
        if not matches:
            names = [place.path for place in places(model)]
            raise PlugError(f'FAR: nothing in {type(model).__name__} matches {pattern!r}; attentions: {some(names)}')
        chosen |= {path: place_of(path, module, heads, projection) for path, module in matches.items()}
    inside = [path for path in chosen if any(path.startswith(f'{other}.') for other in chosen)]
    if inside:
        raise PlugError(f'FAR: {some(inside)} lie inside of other modules that match; make the patterns narrower')
    return [chosen[path] for path in modules if path in chosen]


def places(model: nn.Module) -> list[Place]:
    """Every self-attention of a known class that can be replaced; cross-attention is passed over.

    Raises:
        PlugError: one has positions or masks of its own.
    """
    found: list[Place] = []
    for path, module in model.named_modules():
        host = find_host(module)
        inside = any(path.startswith(f'{other.path}.') for other in found)
        if path and host is not None and not inside and not isinstance(module, StandIn) and not is_cross(path, module):
            found.append(place_of(path, module, None, None))
    return found


def place_of(path: str, module: nn.Module, heads: int | None, projection: str | None) -> Place:
    """Describe one attention.

    Raises:
        PlugError: it cannot be replaced.
    """
    name = type(module).__name__
    if isinstance(module, StandIn):
        raise PlugError(f'{path}: is replaced already')
    if is_cross(path, module):
        raise PlugError(
            f'{path}: is cross-attention ({name}); an LSTM over one sequence can only replace self-attention'
        )
    if reasons := [reason for m in module.modules() if (reason := own_positions(m))]:
        raise PlugError(f'{path}: {reasons[0]}')
    host = find_host(module)
    if host is None or projection is not None:
        host = generic(path, module, projection)
    count = (
        heads
        if heads is not None
        else next((getattr(module, a) for a in (host.heads, *HEADS) if hasattr(module, a)), None)
    )
    if not isinstance(count, int):
        raise PlugError(f'{path}: the number of heads of {name} cannot be seen; give heads=... in the spec')
    layer = module.get_submodule(host.projection)
    if not isinstance(layer, nn.Linear):
        raise PlugError(f'{path}: its output projection {host.projection} is {type(layer).__name__}, not Linear')
    if rest := left_behind(module, host):
        raise PlugError(f'{path}: {name} has {some(rest)}, which would be lost with it; leave it out of layers=[...]')
    if getattr(module, 'added_kv_proj_dim', None) is not None or getattr(module, 'is_causal', False):
        raise PlugError(f'{path}: {name} reads added or only earlier tokens, which a bidirectional LSTM cannot do')
    return Place(path, module, host, count)


def generic(path: str, module: nn.Module, projection: str | None) -> Host:
    """Data on a module ``(B, N, C) -> (B, N, C)`` of a class that is not known."""
    name = projection or next((p for p in PROJECTIONS if has(module, p)), None)
    if name is None or not has(module, name):
        there = some([n for n, m in module.named_modules() if isinstance(m, nn.Linear)])
        raise PlugError(
            f'{path}: {type(module).__name__} has no output projection {name or "that is known"}; give its path inside '
            f"the module, projection='...' (linear layers there: {there})"
        )
    known_host = find_host(module)
    if known_host is not None:
        return changed(known_host, projection=name)
    kind = TransformersStandIn if type(module).__module__.startswith('transformers.') else StandIn
    after = tuple(n for n in DROPOUTS if isinstance(getattr(module, n, None), nn.Dropout))
    return Host(stand_in(kind), name, 'num_heads', after)


def left_behind(module: nn.Module, host: Host) -> list[str]:
    """Names of weights, in attentions that are only known by their names, that are neither kept nor of q, k or v."""
    if host.seen:
        return []
    kept = tuple(f'{path}.' for path in (host.projection, *host.after))
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if not name.startswith(kept) and not QKV.fullmatch(name.partition('.')[0])]


def is_cross(path: str, module: nn.Module) -> bool:
    """Whether an attention reads two sequences, by what its class or its name says."""
    last = path.rpartition('.')[2]
    parents = path.split('.')
    named = last in ('attn2', 'multihead_attn') or 'cross' in ' '.join(parents[-2:])
    return named or bool(getattr(module, 'is_cross_attention', False))


def why_none(model: nn.Module) -> str:
    """Say why a model has nothing to replace."""
    for path, module in model.named_modules():
        if reason := own_positions(module):
            return f'has no self-attention that can be replaced; {path}: {reason}'
    classes = dict.fromkeys(name.rpartition('.')[2] for name in HOSTS)
    return (
        f'has no self-attention that is known; name modules (B, N, C) -> (B, N, C) by pattern, '
        f"layers=['blocks.*.attn'] (known classes: {', '.join(classes)})"
    )


def own_positions(module: nn.Module) -> str:
    """Say which relative positions an attention has; '' if none."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    biased = [name for name, _ in own if 'relative' in name or 'rel_pos' in name]
    if not biased:
        return ''
    return (
        f'{type(module).__name__} has relative positions ({biased[0]}), and windows of Swin have masks too, which an '
        f'LSTM would ignore; leave it out of layers=[...]'
    )


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set a submodule."""
    parent, _, name = path.rpartition('.')
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(name)] = module
    else:
        setattr(owner, name, module)
