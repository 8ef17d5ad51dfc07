"""The Recurrent Memory Transformer (arXiv 2207.06881, 2304.11062): it carries memory tokens from segment to segment."""

from recurrent_memory_transformer_pytorch.rmt import RecurrentMemoryTransformer
from recurrent_memory_transformer_pytorch.state import PastMemories, RMTState, XLMemory
from recurrent_memory_transformer_pytorch.wrapper import RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import Cursor, LossReturn, SegmentModel, SegmentWrapper, Stream, __version__, detach

__all__ = [
    'Cursor',
    'LossReturn',
    'PastMemories',
    'RMTState',
    'RecurrentMemoryTransformer',
    'RecurrentMemoryTransformerWrapper',
    'SegmentModel',
    'SegmentWrapper',
    'Stream',
    'XLMemory',
    '__version__',
    'detach',
]
