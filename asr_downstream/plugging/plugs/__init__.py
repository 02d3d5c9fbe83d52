"""Plugs: what is given to the sites of a model. A plug builds it; `plug` attaches it.

Attention    an attention of its own at every site, on the feature map
DIA          one attention for the sites of a stage, on the feature map; a recurrent one carries a state along them
ASR          on a learned input: constant gates. Own attentions, or shared ones like DIA's
Start        no gates: the affine of every site, scaled once
"""

from asr_downstream.plugging.plugs.asr import ASR
from asr_downstream.plugging.plugs.attention import DIA, Attention
from asr_downstream.plugging.plugs.base import Plug
from asr_downstream.plugging.plugs.selection import Selection
from asr_downstream.plugging.plugs.start import Start

__all__ = ['ASR', 'DIA', 'Attention', 'Plug', 'Selection', 'Start']
