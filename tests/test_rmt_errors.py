"""What the Recurrent Memory Transformer refuses."""

import math

import pytest
import torch

from recurrent_memory_transformer_pytorch import RMTState
from tests.conftest import ids, make_infini, make_rmt

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
    ({'memory_noise': math.nan}, 'memory_noise is nan: give 0, or a finite number above it'),
    ({'memory_noise': math.inf}, 'memory_noise is inf: give 0, or a finite number above it'),
    ({'ff_mult': math.inf}, 'ff_mult is inf: give a finite number above 0'),
    ({'ff_mult': math.nan}, 'ff_mult is nan: give a finite number above 0'),
    ({'ff_mult': 0.09}, r'ff_mult is 0\.09: with dim=16 no inner feature is left, give 0\.0938 or more'),
    ({'ff_dropout': math.nan}, r'ff_dropout is nan: a dropout probability must be in \[0, 1\)'),
    ({'rotary_theta': math.inf, 'rotary_pos_emb': True}, 'rotary_theta is inf: give a finite number above 0'),
    ({'first_text_position': -1}, 'first_text_position is -1: give 0, or a finite number above it'),
    ({'axial_mem_len': 2, 'num_memory_tokens': 0}, 'axial_mem_len is 2, num_memory_tokens 0: there is no memory'),
    ({'dim': True}, 'dim is True: give a finite number above 0'),
    ({'num_tokens': True}, 'num_tokens is True: give a finite number above 0'),
]


@pytest.mark.parametrize(('options', 'message'), BAD_CONSTRUCTION)
def test_bad_construction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_rmt(**options)


@pytest.mark.parametrize('make', [make_rmt, make_infini])
def test_the_smallest_feed_forward_that_the_error_names_is_made(make):
    assert make(ff_mult=0.0938).layers[0].ff.proj_out.in_features == 1


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
