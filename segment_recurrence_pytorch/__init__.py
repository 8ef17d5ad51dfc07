"""The part of the library that both models share: the model contract, the wrapper, generation and attention."""

from segment_recurrence_pytorch.cursor import Cursor
from segment_recurrence_pytorch.generation import Stream
from segment_recurrence_pytorch.layers import attend, choose_backend, record_attention
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import detach
from segment_recurrence_pytorch.version import __version__
from segment_recurrence_pytorch.wrapper import LossReturn, SegmentWrapper

__all__ = [
    'Cursor',
    'LossReturn',
    'SegmentModel',
    'SegmentWrapper',
    'Stream',
    '__version__',
    'attend',
    'choose_backend',
    'detach',
    'record_attention',
]
