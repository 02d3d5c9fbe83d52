"""Plugged layers: stock layers that scale their parameters, not their output, by constant gates.

With constant gates v, ``BN(x) * v == batch_norm(x, mean, var, gamma * v, beta * v)`` and
``conv(x; W, b) * v == conv(x; W v, b v)``, in training too: a plugged layer hands scaled parameters to the stock
functional, so no feature map is multiplied or kept for the backward pass. Each class below adds to its stock class
only the gates; parameter names, buffers and ``isinstance`` stay those of the stock class, and a layer is plugged and
unplugged by changing its class, so that everyone who holds it holds it still.

`LAYERS` is the table of what can be plugged and folded; a layer of a framework is added when the first one is met.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr_downstream.errors import PlugError
from asr_downstream.modules.affine import Constants, output_channels
from asr_downstream.modules.slots import HasGates
from asr_downstream.plugging.followed import Followed, followers
from asr_downstream.plugging.gating.gates import together
from asr_downstream.plugging.gating.shelf import Ready, Shelf
from asr_downstream.plugging.kernels.gated_batch_norm import can_fuse, gated_batch_norm
from asr_downstream.plugging.kernels.recompute import can_regain, can_rescale, regained_scale, rescaled_layer
from asr_downstream.registry import FRAMEWORKS, framework_data

__all__ = ['LAYERS', 'Plugged', 'plugged_class']


class Plugged(HasGates):
    """Mixin of every plugged layer. ``gate``: constant gates, or None; ``dynamic``: input-dependent ones, or None.

    Attributes:
        stock: the class that the layer had and gets back.
        channel_dim: axis of the channels in the output.
        positions: axes of the output besides batch and channels, at a size to try an attention on.
        recomputes: whether the backward pass can compute again what gates would keep, see
            `asr_downstream.plugging.kernels.recompute`.
        shelf: where the forward of the model leaves the gates of this site; None: the layer computes its own.
    """

    stock: ClassVar[type[nn.Module]]
    channel_dim: ClassVar[int] = 1
    positions: ClassVar[tuple[int, ...]] = (2, 2)
    recomputes: ClassVar[bool] = False
    shelf: Shelf | None = None

    @classmethod
    def channels_of(cls, layer: Any) -> int:
        """Number of output channels of a stock ``layer``."""
        return output_channels(layer)

    def stock_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Stock forward with the parameters given."""
        raise PlugError(f'{type(self).__name__} has no forward')

    def constants(self, anchor: Tensor | None = None) -> Constants:
        """What the constant gates come to. ``anchor``: see `ConstantGate.forward`."""
        return together(self.gate or (), anchor)  # type: ignore[attr-defined]

    def constant(self, anchor: Tensor | None = None) -> Tensor | None:
        """Product of the constant gates of the outputs, shape ``(C,)``; None without any."""
        return self.constants(anchor).gate

    def ready(self, anchor: Tensor) -> Ready | None:
        """Constant gates in a forward, from the bank of the model or computed here; None without any."""
        if self.gate is None:  # type: ignore[attr-defined]
            return None
        found = None if self.shelf is None else self.shelf.take(self)  # type: ignore[arg-type]
        return found or Ready(self.constants(anchor))

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ready = self.ready(input)
        if ready is not None and self.dynamic is None and can_rescale(self, input, ready):
            return rescaled_layer(self, input, ready)
        weight, bias = (self.weight, self.bias) if ready is None else ready.parameters(self)
        y = self.stock_forward(input, weight, bias, *args, **kwargs)
        if self.dynamic is None:
            return y
        return regained_scale(self, input, weight, bias, y) if can_regain(self, y) else self.scale_output(y)

    def scale_output(self, y: Tensor) -> Tensor:
        """Apply the input-dependent gates to the output ``y``."""
        if self.channel_dim == -1:
            y = y.movedim(-1, 1)
        for gate in self.dynamic:  # type: ignore[attr-defined]
            y = gate(y)
        return y.movedim(1, -1) if self.channel_dim == -1 else y


class _BatchNorm(Plugged):
    # The name is torch's own: mmengine's initialisers choose layers by the names of their bases.
    def forward(self: Any, input: Tensor) -> Tensor:
        if self.dynamic is None or not can_fuse(self, input):
            return super().forward(input)
        self._check_input_dim(input)
        ready = self.ready(input)
        return gated_batch_norm(self, input, *((self.weight, self.bias) if ready is None else ready.parameters(self)))

    def stock_forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                factor = 1.0 / float(self.num_batches_tracked)
        use_buffers = not self.training or self.track_running_stats
        return F.batch_norm(
            x,
            self.running_mean if use_buffers else None,
            self.running_var if use_buffers else None,
            weight,
            bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )


class PluggedBatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    stock = nn.BatchNorm1d
    positions = (2,)


class PluggedBatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    stock = nn.BatchNorm2d


class PluggedBatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    stock = nn.BatchNorm3d
    positions = (2, 2, 2)


class _SyncBatchNorm(_BatchNorm):
    """While statistics are synchronised the output is scaled, since torch has no functional form of that kernel."""

    def forward(self: Any, input: Tensor) -> Tensor:
        synchronised = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
        if not synchronised:
            return super().forward(input)
        y = nn.SyncBatchNorm.forward(self, input)
        ready = self.ready(input)
        if ready is not None:
            gate, shift = self.along(ready.v, y), ready.constants.shift
            y = y * gate if shift is None else torch.addcmul(self.along(shift, y), y, gate)
        return y if self.dynamic is None else self.scale_output(y)

    @staticmethod
    def along(v: Any, y: Tensor) -> Tensor:
        """View ``(C,)`` so that it broadcasts with ``y``, in the precision of ``y``."""
        return v.view(1, -1, *(1,) * (y.dim() - 2)).to(y.dtype)


class PluggedSyncBatchNorm(_SyncBatchNorm, nn.SyncBatchNorm):
    stock = nn.SyncBatchNorm


class PluggedGroupNorm(Plugged, nn.GroupNorm):
    stock = nn.GroupNorm

    def stock_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class PluggedLayerNorm(Plugged, nn.LayerNorm):
    stock = nn.LayerNorm
    channel_dim = -1
    positions = (2,)

    @classmethod
    def channels_of(cls, layer: nn.LayerNorm) -> int:
        if len(layer.normalized_shape) != 1:
            raise PlugError(
                f'normalized_shape={tuple(layer.normalized_shape)}: only a LayerNorm over the last axis has channels'
            )
        return layer.normalized_shape[0]

    def stock_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _InstanceNorm(Plugged):
    def stock_forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        single = x.dim() == self._get_no_batch_dim()
        y = F.instance_norm(
            x[None] if single else x,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )
        return y[0] if single else y


class PluggedInstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    stock = nn.InstanceNorm1d
    positions = (2,)


class PluggedInstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    stock = nn.InstanceNorm2d


class PluggedInstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    stock = nn.InstanceNorm3d
    positions = (2, 2, 2)


class _Conv(Plugged):
    recomputes = True

    def has_backward(self: Any, x: Tensor) -> bool:
        """Whether `stock_backward` is the gradient: other paddings are made by other functions."""
        return self.padding_mode == 'zeros' and not isinstance(self.padding, str) and x.dim() == self.weight.dim()

    def stock_backward(
        self: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: bool, input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Gradients of input, weight and bias; of the last and the first if they are wanted."""
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [weight.shape[0]], self.stride, self.padding, self.dilation, False,
            (0,) * len(self.stride), self.groups, [input, True, bias],
        )  # fmt: skip

    def stock_forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class PluggedConv1d(_Conv, nn.Conv1d):
    stock = nn.Conv1d
    positions = (2,)


class PluggedConv2d(_Conv, nn.Conv2d):
    stock = nn.Conv2d


class PluggedConv3d(_Conv, nn.Conv3d):
    stock = nn.Conv3d
    positions = (2, 2, 2)


class _ConvTranspose(Plugged):
    def stock_forward(
        self: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel_size) - 1]
        return transpose(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)


class PluggedConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    stock = nn.ConvTranspose1d
    positions = (2,)


class PluggedConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    stock = nn.ConvTranspose2d


class PluggedConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    stock = nn.ConvTranspose3d
    positions = (2, 2, 2)


class PluggedLinear(Plugged, nn.Linear):
    stock = nn.Linear
    channel_dim = -1
    positions = (2,)
    recomputes = True

    def has_backward(self, x: Tensor) -> bool:
        """See `_Conv`."""
        return True

    def stock_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: bool, input: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """See `_Conv`."""
        rows = dy.reshape(-1, dy.shape[-1])
        dw = rows.t() @ x.reshape(-1, x.shape[-1])
        return dy @ weight if input else None, dw, rows.sum(0) if bias else None

    def stock_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


LAYERS: dict[type[nn.Module], type[Plugged]] = {
    plugged.stock: plugged
    for plugged in (
        PluggedBatchNorm1d,
        PluggedBatchNorm2d,
        PluggedBatchNorm3d,
        PluggedSyncBatchNorm,
        PluggedGroupNorm,
        PluggedLayerNorm,
        PluggedInstanceNorm1d,
        PluggedInstanceNorm2d,
        PluggedInstanceNorm3d,
        PluggedConv1d,
        PluggedConv2d,
        PluggedConv3d,
        PluggedConvTranspose1d,
        PluggedConvTranspose2d,
        PluggedConvTranspose3d,
        PluggedLinear,
    )  # fmt: skip
}


# Qualified name of a class of mmengine, which the core is built on, -> mixin of its plugged class: what
# norm_cfg=dict(type='SyncBN') builds, and what revert_sync_batchnorm puts in its place. Layers of other frameworks are
# data of their adapters, see `asr_downstream.registry.FRAMEWORKS`.
MMENGINE_LAYERS: dict[str, type[Plugged]] = {
    'mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm': PluggedSyncBatchNorm,
    'mmengine.model.utils._BatchNormXd': _BatchNorm,
}


def plugged_class(stock: type[nn.Module]) -> type[Plugged] | None:
    """Plugged class of a stock class; None: it is no layer that can be plugged.

    That of a framework's layer is made when the first one is met.
    """
    if stock not in LAYERS:
        mixin = framework_mixin(stock)
        if mixin is None:
            return None
        then = followers(stock)
        body = {'stock': stock, '__module__': __name__, '__reduce_ex__': reduce_by_stock, '__doc__': stock.__doc__}
        bases = (Followed, mixin, stock) if then else (mixin, stock)
        LAYERS[stock] = type(f'Plugged{stock.__name__}', bases, {**body, 'then': then})
    return LAYERS[stock]


def framework_mixin(stock: type[nn.Module]) -> type[Plugged] | None:
    """Mixin of a framework's own kind of a layer, which computes the same; None: the class is no such kind."""
    name = f'{stock.__module__}.{stock.__qualname__}'
    location = FRAMEWORKS.get(name.partition('.')[0])
    if location is None:
        return MMENGINE_LAYERS.get(name)
    same = getattr(framework_data(location), 'LAYERS', {}).get(name)
    return None if same is None else LAYERS[same]


def reduce_by_stock(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle a layer of a class that was made: by its stock class, which can be imported."""
    return blank, (layer.stock,), layer.__dict__


def blank(stock: type[nn.Module]) -> Any:
    """Return a plugged layer without anything in it, to be filled by pickle."""
    cls: Any = plugged_class(stock)
    return cls.__new__(cls)
