"""Reads a book once, saves the place after it as a cursor, and answers many questions from the file.

    python -m examples.many_questions_one_book                    # three minutes of training on one CPU thread
    python -m examples.many_questions_one_book --tokens 1000      # too long: it begins to forget

Somewhere in the book stands where each of eight people is, among words that say nothing. The model, which is that of
`examples/associative_rmt.py`, is trained on books of at most 32 words. The cursor has the same size after a book of any
length; each question goes on from a copy of it, and the model does not see the book again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from examples.associative_rmt import AssociativeRMT
from examples.train_a_task import train
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_cursor, save_cursor
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.tasks import Example, Task

PEOPLE = ['Ada', 'Ben', 'Cleo', 'Dora', 'Emil', 'Finn', 'Gita', 'Hugo']
PLACES = ['attic', 'barn', 'cellar', 'forest', 'garden', 'kitchen', 'library', 'market',
          'mill', 'office', 'park', 'school', 'theatre', 'tower', 'village', 'yard']  # fmt: skip
FILLER = ['the', 'a', 'of', 'and', 'to', 'in', 'was', 'it', 'he', 'she', 'they', 'then', 'but', 'so', 'as', 'at',
          'on', 'for', 'with', 'all', 'one', 'said', 'came', 'went', 'had', 'some', 'no', 'yes']  # fmt: skip
WORDS = [*PEOPLE, *PLACES, *FILLER]


class WhereIsEverybody(Task):
    """Books in which a place stands behind some names, once; segments of two words. The end asks for all of them.

    Args:
        people: how many people are in a book. Default: None, a random number.
    """

    num_tokens, segment_length, without_memory = len(WORDS), 2, 1 / len(PLACES)

    def __init__(self, people: int | None = None):
        self.people = people

    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """See `Task.pieces`. The number of segments is that of the book; one more for each person asks."""
        people = self.people or 1 + int(torch.randint(min(len(PEOPLE), segments), (), generator=generator))
        book = torch.randint(len(PEOPLE) + len(PLACES), len(WORDS), (batch_size, segments, 2), generator=generator)
        who = torch.rand(batch_size, len(PEOPLE), generator=generator).argsort(1)[:, :people]
        places = torch.randint(len(PLACES), (batch_size, people), generator=generator) + len(PEOPLE)
        facts = torch.stack((who, places), dim=-1)
        where = torch.rand(batch_size, segments, generator=generator).argsort(1)[:, :people, None]
        labels = torch.stack((places, torch.full_like(places, IGNORE)), dim=-1).flip(1)
        yield Example(book.scatter(1, where.expand_as(facts), facts).flatten(1), None)
        yield Example(facts.flip(1).flatten(1), labels.flatten(1))


def main(steps: int = 900, tokens: int = 64, seed: int = 0) -> float:
    """Trains, reads a book, and asks. Returns the share of the answers that are right."""
    torch.manual_seed(seed)
    task = WhereIsEverybody()
    model = AssociativeRMT(num_tokens=task.num_tokens, dim=64, depth=2, seq_len=task.segment_length)
    wrapper = SegmentWrapper(model)
    train(wrapper, task, model.param_groups(3e-3, 0.01), stages=[2, 4, 8, 16], steps=steps, seed=seed)

    draw = torch.Generator().manual_seed(seed + 1)
    (book, _), _ = WhereIsEverybody(len(PEOPLE)).pieces(tokens // 2, 1, draw)
    print(f'the book has {book.shape[1]:,} words:', *(WORDS[word] for word in book[0, :24]), '...')
    with tempfile.TemporaryDirectory() as folder:
        file, start = Path(folder) / 'book.safetensors', time.perf_counter()
        save_cursor(wrapper.read(book), file, model)
        reading, start = time.perf_counter() - start, time.perf_counter()
        cursor = load_cursor(file, model)
        questions = torch.arange(len(PEOPLE))[:, None]
        answers = wrapper.generate_tokens(questions, 1, state=cursor.fork(len(PEOPLE)), temperature=0)[:, 0]
        answering = time.perf_counter() - start
        print(f'read in {reading:.2f} seconds into a cursor of {file.stat().st_size:,} bytes')
    right = 0
    for person, answer in enumerate(answers.tolist()):
        place = int(book[0, 1:][book[0, :-1] == person])
        right += answer == place
        print(f'Where is {WORDS[person] + "?":6} {WORDS[answer]:9}' + f'no: {WORDS[place]}' * (answer != place))
    print(f'{right} of {len(PEOPLE)} right, answered in {answering:.2f} seconds without the book')
    return right / len(PEOPLE)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=900, help='of the training (default: %(default)s)')
    parser.add_argument('--tokens', type=int, default=64, help='words of the book (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and books (default: %(default)s)')
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.tokens < 2 * len(PEOPLE):
        parser.error(f'give --steps of 1 or more, and --tokens of {2 * len(PEOPLE)} or more: {len(PEOPLE)} people')
    main(**vars(arguments))
