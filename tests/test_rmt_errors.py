"""What the Recurrent Memory Transformer refuses."""

import pytest
import torch

from recurrent_memory_transformer_pytorch import RMTState
from tests.conftest import ids, make_rmt

BAD_CONSTRUCTION = [
    ({'xl_mem_len': -1, 'use_xl_memories': True}, 'xl_mem_len is -1'),
    ({'xl_mem_len': 4}, 'needs use_xl_memories'),
    ({'enhanced_xl_recurrence': True}, 'needs use_xl_memories'),
    ({'enhanced_xl_recurrence': True, 'use_xl_memories': True, 'xl_mem_len': 0}, 'xl_mem_len above 0'),
    ({'kv_heads': 3, 'heads': 4}, 'does not divide'),
    ({'num_memory_tokens': -2}, 'num_memory_tokens is -2'),
    ({'dim_head': 7, 'rotary_pos_emb': True}, 'dim_head=7 must be even'),
    ({'attn_dropout': 1.0}, 'attn_dropout is 1'),
    ({'seq_len': 0}, 'seq_len is 0'),
    ({'causal': False, 'memory_mask': 'mixed'}, 'needs causal=True'),
]


@pytest.mark.parametrize(('options', 'message'), BAD_CONSTRUCTION)
def test_bad_construction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_rmt(**options)


def bad_calls():
    memory = torch.zeros(2, 3, 16, dtype=torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    yield {'x': ids(2, 7)}, 'at most seq_len=6'
    yield {'x': ids(2, 6) + 15}, r'token id is outside \[0, 20\)'
    yield {'x': ids(2, 6) - 1 - ids(2, 6)}, r'token id is outside'
    yield {'x': torch.randn(2, 6)}, 'embeddings have shape'
    yield {'x': torch.full((2, 6, 16), torch.nan, dtype=torch.float64)}, 'NaN'
    yield {'x': ids(12)}, 'give token ids'
    yield {'read_memories': memory[:, :2]}, 'shape'
    yield {'read_memories': memory[:1]}, 'shape'
    yield {'read_memories': memory.float()}, 'float32'
    yield {'read_memories': memory.to('meta')}, 'meta'
    yield {'read_memories': memory + torch.nan}, 'NaN'
    yield {'read_memories': (memory,)}, 'tuple'
    yield {'mask': mask[:, :5]}, 'mask has shape'
    yield {'mask': mask.long()}, 'mask is torch.int64'
    yield {'labels': ids(2, 5)}, 'labels have shape'
    yield {'labels': ids(2, 6) + 20}, 'label is outside'
    yield {'labels': ids(2, 6), 'return_embeddings': True}, 'ask for one'
    yield {'x': torch.tensor(3)}, 'give token ids'


@pytest.mark.parametrize(('call', 'message'), list(bad_calls()))
def test_bad_calls_are_refused(call, message):
    model = make_rmt()
    with pytest.raises(ValueError, match=message):
        model(**{'x': ids(2, 6), **call})
    with pytest.raises(ValueError, match=r'state\.xl is None, this model has XLMemory there'):
        make_rmt(use_xl_memories=True)(ids(2, 6), RMTState(torch.zeros(2, 3, 16, dtype=torch.float64)))
