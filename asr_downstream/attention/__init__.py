"""Channel attentions: descriptor ``(B, C)`` or map ``(B, C, *)`` -> gates ``(B, C)``. One file an attention."""

from asr_downstream.attention.base import ChannelAttention, pool
from asr_downstream.attention.cbam import CBAM
from asr_downstream.attention.dia_lstm import DIALSTM
from asr_downstream.attention.eca import ECA
from asr_downstream.attention.ie import IE
from asr_downstream.attention.layer_scale import LayerScale
from asr_downstream.attention.se import SE
from asr_downstream.attention.sigmoid_vector import SigmoidVector
from asr_downstream.attention.spa import SPA
from asr_downstream.attention.srm import SRM

__all__ = [
    'CBAM',
    'DIALSTM',
    'ECA',
    'IE',
    'SE',
    'SPA',
    'SRM',
    'ChannelAttention',
    'LayerScale',
    'SigmoidVector',
    'pool',
]
