"""Trains a model on texts of 160 tokens, lets it read a million, and asks for what was marked in the first 32.

    python -m examples.needle_in_a_million_tokens                     # three minutes of training, then a million tokens
    python -m examples.needle_in_a_million_tokens --tokens 100000
    python -m examples.needle_in_a_million_tokens --model rmt --steps 2500

A text is noise. Somewhere in its first segment stands a mark, and behind it the value to remember; the last token of
the text asks for the value. The texts are read in pieces, and between two pieces only the cursor is kept, so reading
takes the same memory for any length.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.train_a_task import train
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import Cursor, SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.tasks import Memorize


def trained(task: Memorize, model: str, steps: int) -> SegmentWrapper:
    """Returns a model that has learned to remember over at most five segments."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(num_tokens=task.num_tokens, dim=64, depth=2, heads=4, dim_head=16)
    made: SegmentModel
    if model == 'rmt':
        made = RecurrentMemoryTransformer(seq_len=task.segment_length, num_memory_tokens=4, **sizes)
    else:
        made = InfiniTransformer(**sizes)
    wrapper = SegmentWrapper(made, segment_length=task.segment_length)
    train(wrapper, task, made.param_groups(3e-3, 0.01), stages=[1, 2, 3, 4, 5], steps=steps)
    return wrapper


def read(wrapper: SegmentWrapper, task: Memorize, tokens: int, texts: int) -> tuple[Cursor, Tensor, Tensor]:
    """Reads texts piece by piece.

    Args:
        wrapper: the model.
        task: makes the texts.
        tokens: length of each text.
        texts: number of texts b.

    Returns:
        The cursor after all tokens but the last, the last token (b, 1), which is the question, and the values (b,).
    """
    draw = torch.Generator().manual_seed(1)
    cursor: Cursor | None = None
    with tqdm(total=tokens, desc='reading', unit=' tokens', unit_scale=True, disable=None) as bar:
        for piece, labels in task.pieces(tokens // task.segment_length, texts, draw):
            cursor = wrapper.read(piece if labels is None else piece[:, :-1], cursor)
            bar.update(piece.shape[1])
    assert cursor is not None
    assert labels is not None
    return cursor, piece[:, -1:], labels[:, -1]


def main(model: str = 'infini', steps: int = 1000, tokens: int = 1_000_000, texts: int = 8) -> float:
    """Trains, reads and asks, and returns the share of the answers that are right."""
    task, start = Memorize(), time.perf_counter()
    wrapper = trained(task, model, steps)
    size = sum(parameter.numel() for parameter in wrapper.parameters())
    print(f'trained {size:,} parameters on at most 160 tokens in {time.perf_counter() - start:.0f} seconds')
    start = time.perf_counter()
    cursor, question, values = read(wrapper, task, tokens, texts)
    print(f'read {texts} texts of {tokens:,} tokens in {time.perf_counter() - start:.0f} seconds')
    answers = wrapper.generate_tokens(question, 1, state=cursor, temperature=0)[:, 0]
    print('\ntext   marked in its first 32 tokens   answer')
    for i, (value, answer) in enumerate(zip(values.tolist(), answers.tolist(), strict=True)):
        print(f'{i + 1:4}   {value:29}   {answer:6}   {"right" if answer == value else "wrong"}')
    right = (answers == values).float().mean().item()
    print(f'\n{right:.0%} right; guessing would be {1 / task.values:.0%}')
    return right


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=['rmt', 'infini'], default='infini', help='(default: %(default)s)')
    parser.add_argument('--steps', type=int, default=1000, help='of the training (default: %(default)s)')
    parser.add_argument('--tokens', type=int, default=1_000_000, help='of each text (default: a million)')
    parser.add_argument('--texts', type=int, default=8, help='that are read side by side (default: %(default)s)')
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.texts) < 1 or arguments.tokens < Memorize().segment_length:
        parser.error(f'give --steps and --texts of 1 or more, and --tokens of {Memorize().segment_length} or more')
    main(**vars(arguments))
