"""`RecurrentMemoryLM`: memory tokens around a pretrained language model of each family."""

import gc
import weakref

import pytest
import torch

pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')

from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.testing import check_model
from tests.conftest import close, same_gradients
from tests.pretrained import (  # noqa: F401  softmax_in_float64 acts on every test
    FAMILIES,
    LENGTH,
    decoded,
    families,
    gradients_of,
    softmax_in_float64,
    tiny_lm,
    tokens,
)

CASES = [(name, '') for name in FAMILIES] + [('llama', 'eager'), ('gpt2', 'eager')]
every_family = families(CASES)


def wrapped(name='llama', attention='', num_memory_tokens=3, **options):
    model = RecurrentMemoryLM(tiny_lm(name, attention), num_memory_tokens=num_memory_tokens, **options)
    return SegmentWrapper(model, segment_length=LENGTH)


def naive(model, x):
    """The published way (booydar): the language model itself reads [memory | text | memory], segment after segment. But
    where positions are learned, the text has those of a text alone."""
    lm, m = model.lm, model.num_memory_tokens
    memory, logits = model.initial_memory.expand(len(x), -1, -1), []
    for piece in x.split(LENGTH, dim=1):
        rows = memory / model.embed_scale
        embeds = torch.cat((rows, lm.get_input_embeddings()(piece), rows), dim=1)
        more = {}
        if lm.config.model_type == 'gpt2':
            count = embeds.shape[1]
            positions = [max(0, row - m) for row in range(count)]
            lowest = torch.finfo(embeds.dtype).min
            unseen = torch.full((1, 1, count, count), lowest, dtype=embeds.dtype).triu(1)
            more = {'position_ids': torch.tensor([positions]), 'attention_mask': unseen}
        out = lm(inputs_embeds=embeds, output_hidden_states=True, use_cache=False, **more)
        memory = out.hidden_states[-1][:, -m:]
        logits.append(out.logits[:, m:-m])
    return torch.cat(logits, dim=1), memory


@every_family
@torch.no_grad()
def test_logits_and_memory_are_those_of_the_published_way(name, attention):
    wrapper, x = wrapped(name, attention), tokens(3, 21)
    close(wrapper.logits(x), naive(wrapper.model, x))


@torch.no_grad()
def test_text_has_the_positions_with_which_it_was_pretrained():
    """The rows of the table that stand behind those of a text and of the memory are not read."""
    wrapper, x = wrapped('gpt2'), tokens(2, 21)
    want = wrapper.logits(x)[0]
    table = wrapper.model.lm.transformer.wpe.weight
    table[LENGTH + 3 :] = torch.nan
    assert torch.equal(wrapper.logits(x)[0], want)
    table[LENGTH + 2] = torch.nan
    assert not wrapper.logits(x)[0].isfinite().all()


@every_family
def test_replay_and_recomputing_are_one_graph(name, attention):
    wrapper, x = wrapped(name, attention), tokens(3, 21)
    loss = wrapper.loss(x).loss
    loss.backward()
    want = gradients_of(wrapper.model)
    assert want['initial_memory'].abs().max() > 1e-6
    close(wrapper.loss(x, backward=True).loss, loss.detach())
    same_gradients(gradients_of(wrapper.model), want)
    SegmentWrapper(wrapper.model, segment_length=LENGTH, recompute=True).loss(x).loss.backward()
    same_gradients(gradients_of(wrapper.model), want)


@every_family
@pytest.mark.parametrize('ragged', [False, True], ids=['aligned', 'ragged'])
@torch.no_grad()
def test_decoding_is_the_parallel_pass(name, attention, ragged):
    wrapper, x = wrapped(name, attention), tokens(3, 15)
    close(decoded(wrapper.model, x, LENGTH, ragged), wrapper.logits(x)[0])


def test_a_stream_that_is_dropped_keeps_nothing():
    """Without Python's search for cycles of references, which may be long in coming."""
    gc.collect()
    gc.disable()
    try:
        stream = wrapped('llama', '').stream(tokens(2, 9), max_new_tokens=3)
        list(stream)
        buffers = [weakref.ref(buffer) for buffer in stream._cache.keys]
        del stream
        assert not any(buffer() is not None for buffer in buffers)
    finally:
        gc.enable()


@every_family
def test_the_contract_holds(name, attention):
    check_model(wrapped(name, attention).model)
