"""Train with an attention, ship the stock model.

    plug(model, spec)      attach attentions to the sites of a model
    fold(model)            put constant gates into the weights: the stock model again
    fold_calibrated(model, batches)  the same, with gates that depend on the input replaced by their mean over data
    fold_native(model, batches)  squeeze-and-excitation that a model has by itself, folded away in the same way
    fuse_conv_bn(model, x) convolutions and norms as one, for deployment
    record(model)          what gates and states are on real data
    verify(a, b, inputs)   how far two models differ
    describe(model)        the table of the sites
    save_gates(model, path)  what the gates have learnt, in a file of kilobytes; apply_gates puts it into a base
    load_plugged(folder)   what save_pretrained of a plugged model of diffusers or transformers has written
    far.replace(model)     multi-head LSTMs in the place of self-attention

The core needs torch and mmengine. The adapters are `asr_downstream.detection` (MMDetection: extra ``det``) and those of
the other extras; importing this package imports none of them. A name is imported when it is first used (PEP 562): the
command ``asr-downstream --help`` needs no torch.
"""

import sys
from typing import TYPE_CHECKING

from asr_downstream.console.lazy import attach

if TYPE_CHECKING:
    from asr_downstream import far
    from asr_downstream.attention import ChannelAttention, pool
    from asr_downstream.errors import AsrError, CheckpointError, DataError, FoldError, PlugError
    from asr_downstream.folding.adapters import apply_gates, list_gates, load_gates, save_gates, unload
    from asr_downstream.folding.calibrated import fold_calibrated
    from asr_downstream.folding.fold import fold
    from asr_downstream.folding.fuse_conv_bn import fuse_conv_bn
    from asr_downstream.folding.native.fold import fold_native
    from asr_downstream.folding.native.rebuild import remove_native, transfer_weights
    from asr_downstream.folding.verify import verify
    from asr_downstream.modules.native import register_native
    from asr_downstream.plugging.attach import rebind
    from asr_downstream.plugging.describe import describe
    from asr_downstream.plugging.load import load_plugged
    from asr_downstream.plugging.plug import plug
    from asr_downstream.plugging.record import record
    from asr_downstream.plugging.sites import SITES, register_site
    from asr_downstream.registry import ATTENTIONS, MODELS, PLUGS

__version__ = '0.1.0'

__all__ = [
    'ATTENTIONS',
    'MODELS',
    'PLUGS',
    'SITES',
    'AsrError',
    'ChannelAttention',
    'CheckpointError',
    'DataError',
    'FoldError',
    'PlugError',
    'apply_gates',
    'describe',
    'far',
    'fold',
    'fold_calibrated',
    'fold_native',
    'fuse_conv_bn',
    'list_gates',
    'load_gates',
    'load_plugged',
    'plug',
    'pool',
    'rebind',
    'record',
    'register_native',
    'register_site',
    'remove_native',
    'save_gates',
    'transfer_weights',
    'unload',
    'verify',
]

# Module -> the public names that it defines.
DEFINED_IN = {
    'folding.adapters': ('apply_gates', 'list_gates', 'load_gates', 'save_gates', 'unload'),
    'attention': ('ChannelAttention', 'pool'),
    'errors': ('AsrError', 'CheckpointError', 'DataError', 'FoldError', 'PlugError'),
    'folding.calibrated': ('fold_calibrated',),
    'folding.fold': ('fold',),
    'folding.fuse_conv_bn': ('fuse_conv_bn',),
    'folding.native.fold': ('fold_native',),
    'folding.native.rebuild': ('remove_native', 'transfer_weights'),
    'folding.verify': ('verify',),
    'modules.native': ('register_native',),
    'plugging.attach': ('rebind',),
    'plugging.describe': ('describe',),
    'plugging.load': ('load_plugged',),
    'plugging.plug': ('plug',),
    'plugging.record': ('record',),
    'plugging.sites': ('SITES', 'register_site'),
    'registry': ('ATTENTIONS', 'MODELS', 'PLUGS'),
}
# Rooms that need no extra: ``asr_downstream.far`` is there without an import of its own.
ROOMS = (
    'attention',
    'console',
    'errors',
    'far',
    'files',
    'folding',
    'measure',
    'models',
    'modules',
    'plugging',
    'registry',
)

if not TYPE_CHECKING:  # a type checker that saw __getattr__ would find every misspelt name
    __getattr__, __dir__ = attach(sys.modules[__name__], DEFINED_IN, ROOMS)
