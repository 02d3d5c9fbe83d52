"""Plugs by name, for ``--plug``: data, with the sizes that the papers have for CIFAR."""

from __future__ import annotations

from typing import Any

__all__ = ['PLUGS']

SE = dict(type='SE', reduction=16)
DIALSTM = dict(type='DIALSTM', reduction=4)
ASR_SE = dict(type='ASR', attention=SE)

# Name -> spec of the plug; None: the stock model.
PLUGS: dict[str, dict[str, Any] | list[dict[str, Any]] | None] = {
    'stock': None,
    'se': dict(type='Attention', attention=SE),
    'asr-se': ASR_SE,
    'asr-se-x2': dict(ASR_SE, repeat=2),
    'asr-se-x3': dict(ASR_SE, repeat=3),
    'asr-se-x4': dict(ASR_SE, repeat=4),
    'asr-se-preserve': dict(ASR_SE, preserve=True),
    'asr-se+se': [ASR_SE, dict(type='Attention', attention=SE)],
    'dia': dict(type='DIA', attention=DIALSTM),
    'dia-se': dict(type='DIA', attention=SE),
    'asr-dia': dict(type='ASR', attention=DIALSTM),
    'asr-dia-preserve': dict(type='ASR', attention=DIALSTM, preserve=True),
    'eca': dict(type='Attention', attention=dict(type='ECA')),
    'asr-eca': dict(type='ASR', attention=dict(type='ECA')),
    'ie': dict(type='Attention', attention=dict(type='IE')),
    'asr-ie': dict(type='ASR', attention=dict(type='IE')),
    'srm': dict(type='Attention', attention=dict(type='SRM')),
    'asr-srm': dict(type='ASR', attention=dict(type='SRM')),
    'layerscale': dict(type='Attention', attention=dict(type='LayerScale', init_value=0.5)),
    'sigmoid': dict(type='Attention', attention=dict(type='SigmoidVector')),
    'start': dict(type='Start', value=0.5),
    'start-quarter': dict(type='Start', value=0.25),
    'start-eighth': dict(type='Start', value=0.125),
    'start-zero': dict(type='Start', value=0.0),
}
