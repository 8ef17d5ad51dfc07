"""The Recurrent Memory Transformer (arXiv 2207.06881, 2304.11062): memory tokens carried between segments."""

from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer
from recurrent_memory_transformer_pytorch.state import RMTState, XLMemory
from recurrent_memory_transformer_pytorch.wrapper import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import LossReturn, SegmentModel, SegmentWrapper, __version__, detach

__all__ = [
    'LossReturn',
    'RMTState',
    'RecurrentMemoryTransformer',
    'RecurrentMemoryTransformerWrapper',
    'SegmentModel',
    'SegmentWrapper',
    'XLMemory',
    '__version__',
    'detach',
]
