"""Gives a pretrained language model a memory, trains it on long texts, and compares it with the model without one.

    python examples/memory_for_a_pretrained_model.py                     # offline, within two minutes on one CPU thread
    python examples/memory_for_a_pretrained_model.py --method infini
    python examples/memory_for_a_pretrained_model.py --model Qwen/Qwen2.5-0.5B --segment-length 512 --batch-size 1

Without --model, a tiny Llama learns bytes first, in segments that it reads one by one. Then the model is trained on,
once without a memory and once with one, on the same texts, segments and steps. Both read rows of several segments; only
the memory carries something from one segment to the next. The text is the source of Python's standard library.

The default run shows that a memory costs the model nothing: 60 steps are too few for it to gain anything on text.

It needs the extra `hf`: pip install '.[hf]'
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from infini_transformer_pytorch.huggingface import add_infini_attention
from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.checkpoint import save_weights
from segment_recurrence_pytorch.data import load_corpus
from segment_recurrence_pytorch.training import warmup_cosine


def main(
    *,
    model: str | None = None,
    method: str = 'rmt',
    segment_length: int = 64,
    segments: int = 4,
    batch_size: int = 16,
    base_steps: int = 200,
    steps: int = 60,
    lr: float = 1e-3,
    save: str | None = None,
) -> dict[str, list[float]]:
    """Runs the comparison, and returns the bits per token on validation texts before and after training, with and
    without a memory."""
    torch.manual_seed(0)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    corpus = load_corpus()
    if model is None:
        encode: Callable[[Tensor], Tensor] = Tensor.long
        decode = bytes
    else:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)

        def encode(document: Tensor) -> Tensor:
            text = bytes(document.tolist()).decode(errors='replace')
            return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)

        decode = tokenizer.decode
    length = segments * segment_length + 1
    train = texts(corpus.train, encode, length, 2000 if model is None else 200)
    valid = texts(corpus.valid, encode, length, 64 if model is None else 16).to(device)

    if model is None:
        tiny = LlamaConfig(vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=2 * segment_length)  # fmt: skip
        base = LlamaForCausalLM(tiny).to(device)
        learn(without_memory(base, segment_length), train, base_steps, batch_size, 3e-3)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype='auto').to(device)

    found: dict[str, list[float]] = {}
    for name in ('without memory', method):
        lm = copy.deepcopy(base)
        if name == 'without memory':
            wrapper = without_memory(lm, segment_length)
        elif method == 'infini':
            memory: SegmentModel = add_infini_attention(lm)
            wrapper = SegmentWrapper(memory, segment_length=segment_length)
        else:
            memory = RecurrentMemoryLM(lm, num_memory_tokens=4)
            wrapper = SegmentWrapper(memory, segment_length=segment_length)
        before = bits_per_token(wrapper, valid)
        learn(wrapper, train, steps, batch_size, lr)
        found[name] = [before, bits_per_token(wrapper, valid)]
        print(f'{name:>15}: {before:.3f} bits per token, {found[name][1]:.3f} after {steps} steps')

    new = wrapper.generate_tokens(valid[:1, : 2 * segment_length], 40, temperature=0.8)
    print('it writes on:', decode(new[0].tolist()))
    if save:
        save_weights(wrapper, save)
    return found


def texts(documents: list[Tensor], encode: Callable[[Tensor], Tensor], length: int, count: int) -> Tensor:
    """Returns the beginnings of documents that have enough tokens, (count, length), in a random order."""
    rows: list[Tensor] = []
    for index in torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist():
        tokens = encode(documents[index][: 16 * length])  # more than enough bytes
        pieces = tokens[: len(tokens) // length * length].view(-1, length)
        rows.extend(pieces)
        if len(rows) >= count:
            break
    if not rows:
        raise SystemExit(f'no document has {length} tokens: take a smaller --segments or --segment-length')
    return torch.stack(rows[:count])


def without_memory(lm: Any, segment_length: int) -> SegmentWrapper:
    """Returns the language model as it is: it reads each segment by itself."""
    return SegmentWrapper(RecurrentMemoryLM(lm, num_memory_tokens=0), segment_length=segment_length)


def learn(wrapper: SegmentWrapper, train: Tensor, steps: int, batch_size: int, lr: float) -> None:
    """Trains on random rows. Gradients go through all segments, while one window of segments is held at a time."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(wrapper.model.param_groups(lr, weight_decay=0.01))
    wrapper.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step / steps))
    for _ in range(steps):
        rows = torch.randint(len(train), (batch_size,), generator=draw)
        wrapper.loss(train[rows].to(wrapper.model.device), backward=True)
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    wrapper.eval()


@torch.no_grad()
def bits_per_token(wrapper: SegmentWrapper, rows: Tensor) -> float:
    """Returns the loss of rows of tokens in bits."""
    wrapper.eval()
    return wrapper.loss(rows).loss.item() / math.log(2)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', help='name or folder of a model of transformers. Default: a tiny Llama over bytes')
    parser.add_argument('--method', choices=('rmt', 'infini'), default='rmt')
    parser.add_argument('--segment-length', type=int, default=64, help='tokens of a segment')
    parser.add_argument('--segments', type=int, default=4, help='segments of a row')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--base-steps', type=int, default=200, help='steps of the tiny Llama before it gets a memory')
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--lr', type=float, default=1e-3, help='learning rate; take about 2e-5 for a real model')
    parser.add_argument('--save', help='file for the weights of the model with a memory')
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if isinstance(value, (int, float)) and value <= 0:
            parser.error(f'--{name.replace("_", "-")} is {value}: give a number above 0')
    main(**vars(arguments))
