"""Attentions of other libraries, and the modules that stand in their places: data on each class, one forward each.

A stand-in keeps the attention's output projection under its name, so that of the teacher's state dict only the weights
of queries, keys and values are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import PlugError
from asr_downstream.far.model.mixer import Mixer

__all__ = ['HOSTS', 'Host', 'StandIn', 'find_host']


class StandIn(nn.Module):
    """``(B, N, C) -> (B, N, C)``: LSTMs, then what is left of the attention.

    Args:
        attention: whose submodules, such as the output projection, are kept under their names.
        mixer: in place of queries, keys, values and their product.
        host: of the class of the attention.
    """

    def __init__(self, attention: nn.Module, mixer: Mixer, host: Host) -> None:
        super().__init__()
        self.mixer = mixer
        self.kept = tuple(path for path in (host.projection, *host.after) if has(attention, path))
        for path in self.kept:
            place_at(self, path, attention.get_submodule(path))
        self.train(attention.training)

    def mix(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """LSTMs, output projection, dropout; ``size``: rows and columns of the image, where they are known."""
        x = self.mixer(x, size)
        for path in self.kept:
            x = self.get_submodule(path)(x)
        return x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Mix tokens ``(B, N, C)``; further tensors are refused, but for boolean masks that keep all tokens."""
        refuse_others(args, kwargs, keep=True)
        return self.mix(x)


class TransformersStandIn(StandIn):
    """Returns what attentions of transformers return: the tokens, and None for the attention weights."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Mix tokens ``(B, N, C)``; further tensors are refused, but for masks that keep all tokens."""
        refuse_others(args, {'attention_mask': attention_mask, **kwargs}, keep=True)
        return self.mix(hidden_states), None


class TorchStandIn(StandIn):
    """Takes the place of `torch.nn.MultiheadAttention`, where query, key and value are the same tokens.

    Where positions were added to query and key, the LSTMs read the query, with positions.
    """

    in_proj_bias = None  # these two keep TransformerEncoderLayer off its fast path, which reads weights
    _qkv_same_embed_dim = False

    def __init__(self, attention: Any, mixer: Mixer, host: Host) -> None:
        super().__init__(attention, mixer, host)
        self.batch_first = attention.batch_first

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Mix tokens ``(B, N, C)``, or ``(N, B, C)`` if not ``batch_first``; the tokens are those of the query.

        Compares query and key, and looks into masks: on an accelerator both wait for it.
        """
        refuse_others(args, kwargs, keep=False)
        if key is not query and (key.shape != query.shape or not (traced() or torch.equal(key, query))):
            raise PlugError(
                'what stands here is for self-attention, but query and key differ: this is cross-attention; '
                'leave it out of layers=[...]'
            )
        x = query if self.batch_first else query.transpose(0, 1)
        x = self.mix(x)
        return x if self.batch_first else x.transpose(0, 1), None


class SpatialReductionStandIn(StandIn):
    """In a PVT of MMDetection: the LSTMs read all tokens, so nothing is left of the spatial reduction."""

    def forward(self, x: Tensor, hw_shape: Any, identity: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)`` and add the shortcut, as the attention does."""
        return (x if identity is None else identity) + self.mix(x, hw_shape)


class Processor(nn.Module):
    """Processor of a diffusers attention: norms, shortcut and rescaling stay those of the attention.

    Follows `diffusers.models.attention_processor.AttnProcessor2_0`.
    """

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def __call__(  # the attention looks at these names to see what it may pass
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """See `forward`."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens ``(B, N, C)`` or pixels ``(B, C, H, W)``, row by row."""
        refuse_others((), {'attention_mask': attention_mask}, keep=True)
        if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
            raise PlugError('what stands here is for self-attention, but was called with encoder states')
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        shape = x.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = attn.to_out[1](attn.to_out[0](self.mixer(x, shape[2:] if len(shape) == 4 else None)))
        if len(shape) == 4:
            x = x.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor


def place_at(module: nn.Module, path: str, child: nn.Module) -> None:
    """Register ``child`` under a dotted path, with empty modules on the way: what is beside it is left behind."""
    *parents, name = path.split('.')
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.add_module(name, child)


def refuse_others(args: tuple[Any, ...], kwargs: dict[str, Any], keep: bool) -> None:
    """Refuse what an LSTM over one sequence would ignore: a second sequence, positions, masks that hide tokens.

    Args:
        args: further positional arguments.
        kwargs: further arguments by name.
        keep: what True means in a boolean mask: that a token is kept, or hidden.

    Raises:
        PlugError: there is one.
    """
    for name, value in [*((f'argument {n + 2}', v) for n, v in enumerate(args)), *kwargs.items()]:
        parts = value if isinstance(value, tuple | list) else (value,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors:
            continue
        if len(tensors) == 1 and is_open(tensors[0], 'mask' in name, keep):
            continue
        what = 'a mask that hides tokens' if 'mask' in name else 'a further input'
        raise PlugError(
            f'{name}: {what} was given, which the replacement would ignore: use inputs of one size without padding, '
            f'or leave this attention out of layers=[...]'
        )
    if kwargs.get('is_causal'):
        raise PlugError('is_causal=True was given, but a bidirectional LSTM reads later tokens too')


def traced() -> bool:
    """Whether the model is compiled, exported or traced, so that there are no values to look at."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_open(mask: Tensor, named: bool, keep: bool) -> bool:
    """Whether a tensor is a mask that hides nothing: boolean, or, if it is named so, added to the scores.

    While a model is compiled or exported there are no values to look at, and a mask counts as open.
    """
    if traced() and (named or mask.dtype == torch.bool):
        return True
    if mask.dtype == torch.bool:
        return bool((mask == keep).all())
    return named and not bool(mask.any())


def stand_in(kind: type[StandIn]) -> Callable[[nn.Module, Mixer, Host], nn.Module]:
    """Put a new module in place of the attention."""
    return kind


def set_processor(attention: Any, mixer: Mixer, host: Host) -> nn.Module:
    """Leave the attention of diffusers where it is, without queries, keys and values, with a processor of ours."""
    for name in ('to_q', 'to_k', 'to_v', 'norm_q', 'norm_k'):
        setattr(attention, name, None)
    attention.set_processor(Processor(mixer))
    return attention


@dataclass(frozen=True)
class Host:
    """What there is to know of a class of attentions.

    Attributes:
        build: (attention, mixer, host) -> what stands in its place; the attention may be changed.
        projection: path of the output projection inside the attention.
        heads: attribute with the number of heads.
        after: paths of what follows the projection inside the attention.
        seen: whether all parts of the class are accounted for; else weights that are not q, k or v are refused.
        hooked: whether the projection is called as a module, so that its input can be seen.
        before: tokens in front of those of the image, such as the class token.
        note: for the documentation.
    """

    build: Callable[[Any, Mixer, Host], nn.Module]
    projection: str
    heads: str
    after: tuple[str, ...] = ()
    seen: bool = False
    hooked: bool = True
    before: int = 0
    note: str = ''


VIT = Host(stand_in(TransformersStandIn), 'o_proj', 'num_attention_heads', seen=True, before=1)
TIMM = Host(stand_in(StandIn), 'proj', 'num_heads', ('proj_drop',))

# Qualified name of a class, so that nothing is imported for it -> its data; subclasses inherit the entry.
HOSTS: dict[str, Host] = {
    'transformers.models.vit.modeling_vit.ViTAttention': VIT,
    'transformers.models.deit.modeling_deit.DeiTAttention': replace(VIT, before=2),  # a token to distil with as well
    'diffusers.models.attention_processor.Attention': Host(
        set_processor, 'to_out.0', 'heads', seen=True, note='self-attention of UNets and DiTs; not attn2'
    ),
    'torch.nn.modules.activation.MultiheadAttention': Host(
        stand_in(TorchStandIn),
        'out_proj',
        'num_heads',
        seen=True,
        hooked=False,
        note='also inside mmcv and MMDetection',
    ),
    'mmdet.models.backbones.pvt.SpatialReductionAttention': Host(
        stand_in(SpatialReductionStandIn),
        'attn.out_proj',
        'num_heads',
        ('proj_drop', 'dropout_layer'),
        seen=True,
        hooked=False,
        note='PVT, PVTv2: the LSTMs read all tokens, unreduced',
    ),
    'timm.models.vision_transformer.Attention': TIMM,
    'timm.layers.attention.Attention': TIMM,
}


def find_host(module: nn.Module) -> Host | None:
    """Data on the class of a module, or on the nearest of its base classes; None: it is not known."""
    for cls in type(module).__mro__:
        if host := HOSTS.get(f'{cls.__module__}.{cls.__qualname__}'):
            return host
    return None


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a submodule of this path."""
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False
