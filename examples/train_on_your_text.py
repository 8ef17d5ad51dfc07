"""Trains a model of bytes on a file of yours, and shows what it writes with its memory, and without.

    python -m examples.train_on_your_text                            # the source of Python's standard library
    python -m examples.train_on_your_text my-book.txt --model infini
    python -m examples.train_on_your_text my-book.txt --prompt "It was "

The loop is that of `train_enwik8.py` without checkpoints, plots and many processes: rows of a batch read their
documents in order, and the state is carried from step to step.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.data import Streams, load_corpus
from segment_recurrence_pytorch.training import bits_per_byte, first_bytes, train_loss, valid_streams, warmup_cosine


def made(model: str, dim: int, segment_length: int) -> SegmentWrapper:
    """Returns a new model of bytes in its wrapper."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(num_tokens=256, dim=dim, depth=2, heads=4, dim_head=dim // 4)
    new: SegmentModel
    if model == 'rmt':
        new = RecurrentMemoryTransformer(seq_len=segment_length, num_memory_tokens=8, **sizes)
    else:
        new = InfiniTransformer(**sizes)
    return SegmentWrapper(new, segment_length=segment_length)


def written(wrapper: SegmentWrapper, prompt: Tensor, count: int, memory: bool) -> str:
    """Returns a prompt and what the model writes after it. Without memory, each segment starts from nothing."""
    draw, text, length = torch.Generator().manual_seed(0), prompt, wrapper.segment_length
    if memory:
        text = torch.cat((text, wrapper.generate_tokens(text, count, top_p=0.9, generator=draw)), dim=1)
    while text.shape[1] < prompt.shape[1] + count:
        segment = text[:, (text.shape[1] - 1) // length * length :]
        text = torch.cat((text, wrapper.generate_tokens(segment, 1, top_p=0.9, generator=draw)), dim=1)
    return bytes(text[0].tolist()).decode(errors='replace')


def main(
    path: str | None = None,
    model: str = 'rmt',
    steps: int = 400,
    prompt: str = 'def ',
    dim: int = 96,
    segment_length: int = 64,
    valid_bytes: int = 65536,
    count: int = 240,
) -> dict[str, float]:
    """Trains, and returns the bits per byte of held-out text with its memory, and with a new one for each segment."""
    corpus = load_corpus(path)
    print(f'{corpus.name}: {sum(map(len, corpus.train)):,} bytes to learn from')
    kept = first_bytes(corpus.valid, valid_bytes)
    valid_streams(kept, 4 * segment_length)  # too short a text is refused before the training
    wrapper = made(model, dim, segment_length)
    optimizer = torch.optim.AdamW(wrapper.model.param_groups(2e-3, 0.01), betas=(0.9, 0.98))
    streams, state = Streams(corpus.train, 16, 4 * segment_length, loop=True), None
    for step in (bar := tqdm(range(steps), desc='training', disable=None)):
        for group in optimizer.param_groups:
            group.setdefault('first_lr', group['lr'])
            group['lr'] = group['first_lr'] * warmup_cosine(step / steps)
        loss, _, state = train_loss(wrapper, next(streams), state, memory=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f'{loss.item() / math.log(2):.3f} bits per byte')
    found = {}
    for name, memory in (('with its memory', True), ('without', False)):
        found[name] = bits_per_byte(wrapper, valid_streams(kept, 4 * segment_length), memory)
        print(f'\n--- {name}: {found[name]:.3f} bits per byte of held-out text. It writes:')
        print(written(wrapper, torch.tensor([list(prompt.encode())]), count, memory))
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', nargs='?', help='a text: raw, .gz, .bz2, .xz or .zip (default: the source of Python)')
    parser.add_argument('--model', choices=['rmt', 'infini'], default='rmt', help='(default: %(default)s)')
    parser.add_argument('--steps', type=int, default=400, help='of the training (default: %(default)s)')
    parser.add_argument('--prompt', default='def ', help='what it writes on from (default: %(default)r)')
    arguments = parser.parse_args()
    if arguments.steps < 1 or not arguments.prompt:
        parser.error('give --steps of 1 or more, and a --prompt of at least one character')
    try:
        main(**vars(arguments))
    except ValueError as error:  # the file is missing, damaged or too short
        parser.error(str(error))
