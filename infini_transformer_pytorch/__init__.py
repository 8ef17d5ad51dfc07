"""The Infini-Transformer (arXiv 2404.07143): local causal attention, with a compressive memory in every head."""

from infini_transformer_pytorch.attention import CachedKV, FastweightMemory
from infini_transformer_pytorch.infini import InfiniTransformer, TransformerReturn
from infini_transformer_pytorch.memory import Memories
from infini_transformer_pytorch.wrapper import InfiniTransformerWrapper
from segment_recurrence_pytorch import Cursor, LossReturn, SegmentModel, SegmentWrapper, Stream, __version__, detach

__all__ = [
    'CachedKV',
    'Cursor',
    'FastweightMemory',
    'InfiniTransformer',
    'InfiniTransformerWrapper',
    'LossReturn',
    'Memories',
    'SegmentModel',
    'SegmentWrapper',
    'Stream',
    'TransformerReturn',
    '__version__',
    'detach',
]
