"""BABILong (arXiv 2406.10149): a question about a few facts that are hidden in a long text.

The first five tasks, each with facts in the words of bAbI (arXiv 1502.05698):

    qa1   Where is Mary?                              the place to which she went last
    qa2   Where is the milk?                          where its holder is, or where it was left
    qa3   Where was the milk before the garden?       the place before its last stay in the garden
    qa4   What is north of the garden?                from two sentences such as: The office is north of the garden.
    qa5   What did Fred give to Mary?                 who gave what to whom, the last time that it fits the question

`BABILong` makes new texts of any length as a `Task`, to train on and for `tasks.accuracy`. `make_samples` makes them as
text. `score_folder` scores a model on published samples, such as the data set RMT-team/babilong, in a folder of the
user. `score` does it for a list of samples. All facts, questions and filler that are made here come from a seed, and
nothing is downloaded.

What a model reads is `{input} {question}` and a line break, and it has to write the answer and a line break.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segment_recurrence_pytorch.checks import check_count, check_whole, is_whole
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.tasks import PIECE_SEGMENTS, Example, Task, check_batch
from segment_recurrence_pytorch.wrapper import SegmentWrapper

PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
OBJECTS = ('apple', 'football', 'milk')
PEOPLE = ('Daniel', 'John', 'Mary', 'Sandra')
GIVERS = ('Bill', 'Fred', 'Jeff', 'Mary')  # the people of qa5
OPPOSITE = {'north': 'south', 'south': 'north', 'east': 'west', 'west': 'east'}
MOVED = ('journeyed', 'moved', 'travelled', 'went', 'went back')
TOOK = ('got', 'grabbed', 'picked up', 'took')
LEFT = ('discarded', 'dropped', 'left', 'put down')
GAVE = ('gave', 'handed', 'passed')

# the words of the filler, none of which is in a fact
ADJECTIVES = (
    'ancient', 'bright', 'calm', 'dusty', 'empty', 'gentle', 'heavy', 'quiet', 'rusty', 'silver', 'steep',
    'wide',
)  # fmt: skip
NOUNS = (
    'bridge', 'candle', 'clock', 'cloud', 'engine', 'forest', 'lantern', 'letter', 'mountain', 'river', 'ship',
    'stone',
)  # fmt: skip
VERBS = (
    'carried', 'covered', 'crossed', 'followed', 'hid', 'lit', 'met', 'reached', 'shook',
    'touched', 'watched', 'turned',
)  # fmt: skip

TEMPLATE = '{input} {question}\n'
END = '\n'  # of an answer
REDRAWS = 100  # stories that are drawn until one fits into the text


class Sample(NamedTuple):
    """A sample in the format of BABILong.

    Attributes:
        input: the text with the facts.
        question: a question about them.
        target: the answer, one word.
    """

    input: str
    question: str
    target: str


class Story(NamedTuple):
    """Facts, and a question that they answer.

    Attributes:
        facts: sentences, in order.
        question: a question about them.
        answer: the answer, one word.
    """

    facts: list[str]
    question: str
    answer: str


class Score(NamedTuple):
    """What `score` returns.

    Attributes:
        accuracy: the share of the samples that were answered correctly.
        outputs: what the model answered, for each sample.
    """

    accuracy: float
    outputs: list[str]


def encode_bytes(text: str) -> list[int]:
    """Returns the bytes of a text in UTF-8, as token ids."""
    return list(text.encode())


def decode_bytes(tokens: Sequence[int]) -> str:
    """Returns the text that bytes say. Tokens that are no bytes, and bytes that are no text, become a mark."""
    return b''.join(bytes([token]) if token < 256 else b'\xff' for token in tokens).decode(errors='replace')


def make_story(task: str, generator: random.Random, *, max_facts: int = 10) -> Story:
    """Returns new facts, and a question that they answer.

    Args:
        task: 'qa1' to 'qa5'.
        generator: the generator of the random numbers.
        max_facts: the largest number of facts, unless no question can be asked yet. The number is random, from 2 on;
            qa4 always has 2. Default: 10.

    Raises:
        ValueError: if the task is not one of these, or if max_facts is no whole number from 1 on.
    """
    if task not in STORIES:
        raise ValueError(f'task is {task!r}: give one of {", ".join(STORIES)}')
    check_whole(max_facts=max_facts)
    return STORIES[task](generator, generator.randint(min(2, max_facts), max_facts))


def make_samples(task: str, count: int, *, length: int, seed: int = 0, max_facts: int = 10) -> list[Sample]:
    """Returns new samples, whose facts are spread over a text of filler.

    `json.dump([sample._asdict() for sample in samples], file)` writes them as the published files are.

    Args:
        task: 'qa1' to 'qa5'.
        count: number of samples.
        length: number of characters of each input. A text that the facts alone fill is longer.
        seed: the seed of the random numbers. Default: 0.
        max_facts: see `make_story`. Default: 10.

    Raises:
        ValueError: if a value is outside its range.
    """
    check_whole(count=count)
    if not is_whole(length) or length < 0:
        raise ValueError(f'length is {length!r}: give a whole number of characters from 0 on')
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        facts, question, answer = make_story(task, generator, max_facts=max_facts)
        sentences = [' ' + fact for fact in facts]
        room = max(0, length + 1 - sum(map(len, sentences)))  # the space before the first sentence is not counted
        text = ''.join(_hidden(sentences, room, generator, str))
        found.append(Sample(text[1:], question, answer))
    return found


class BABILong(Task):
    """A task of BABILong over bytes, or over the tokens of a tokenizer. See the table in `babilong`.

    The facts are at random places in all segments except the last ones, which hold the question. With so few segments
    that there are no others, the facts are in the same segments, as a first stage to learn from. Every sequence is
    filled up with filler.

    Args:
        task: 'qa1' to 'qa5'. Default: 'qa1'.
        segment_length: number of tokens of a segment. Default: 512.
        max_facts: see `make_story`. Stories that do not fit into a sequence are drawn again. Default: 10.
        encode: a function from a text to a list of token ids. The sentences of a text are encoded one by one, each
            with the space before it, which a tokenizer such as that of GPT-2 joins with the word after it. So it must
            add no tokens that mark the start or the end of a text. Default: `encode_bytes`.
        num_tokens: size of the vocabulary of `encode`. Default: 256.

    Raises:
        ValueError: if a value is outside its range.
    """

    def __init__(
        self,
        task: str = 'qa1',
        segment_length: int = 512,
        *,
        max_facts: int = 10,
        encode: Callable[[str], list[int]] = encode_bytes,
        num_tokens: int = 256,
    ):
        check_whole(segment_length=segment_length, num_tokens=num_tokens)
        make_story(task, random.Random(0), max_facts=max_facts)
        self.task = task
        self.segment_length = segment_length
        self.max_facts = max_facts
        self.encode = encode
        self.num_tokens = num_tokens
        self.without_memory = max(_guessed([encode(answer + END) for answer in each]) for each in ANSWERS[task])

    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """See `Task.pieces`. The last piece has the labels: the answer and the line break after it."""
        check_batch(segments, batch_size)
        seeds = torch.randint(0, 2**62, (batch_size,), generator=generator).tolist()
        rows = [self._row(segments, random.Random(seed)) for seed in seeds]
        # the segments of the longest question are one piece, so that all answers are in it
        last = max(-(-(len(question) + len(answer) - 1) // self.segment_length) for _, question, answer in rows)
        for start in range(0, segments - last, PIECE_SEGMENTS):
            size = (min(segments - last, start + PIECE_SEGMENTS) - start) * self.segment_length
            yield Example(torch.tensor([list(islice(tokens, size)) for tokens, _, _ in rows]), None)
        tokens = torch.tensor([[*tokens, *question, *answer[:-1]] for tokens, question, answer in rows])
        labels = torch.full_like(tokens, IGNORE)
        for row, (_, _, answer) in zip(labels, rows, strict=True):
            row[-len(answer) :] = torch.tensor(answer)
        yield Example(tokens, labels)

    def _row(self, segments: int, generator: random.Random) -> tuple[Iterator[int], list[int], list[int]]:
        """Returns the tokens of a sequence up to its question, and the tokens of the question and of the answer."""
        total, need = segments * self.segment_length, 0
        for _ in range(REDRAWS):
            story = make_story(self.task, generator, max_facts=self.max_facts)
            facts = [self.encode(' ' + fact) for fact in story.facts]
            question, answer = self.encode(f' {story.question}\n'), self.encode(story.answer + END)
            asked, told = len(question) + len(answer) - 1, sum(map(len, facts))
            last = -(-asked // self.segment_length) * self.segment_length
            before = (total - last) or (total - asked)  # room for the facts; the latter without segments before
            if told <= before:
                parts: list[tuple[int, list]] = [(before - told, facts), (total - before - asked, [])]
                hidden = (piece for room, each in parts for piece in _hidden(each, room, generator, self.encode))
                return (token for piece in hidden for token in piece), question, answer
            need = min(need or told + last, told + last)
        raise ValueError(
            f'{segments} segments of {self.segment_length} tokens: the shortest of {REDRAWS} stories needs {need}: '
            f'give longer or more segments, or less than max_facts={self.max_facts}'
        )


@torch.no_grad()
def score(
    wrapper: SegmentWrapper,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    encode: Callable[[str], list[int]] = encode_bytes,
    decode: Callable[[list[int]], str] = decode_bytes,
    template: str = TEMPLATE,
    max_new_tokens: int | None = None,
) -> Score:
    """Returns the share of the questions that a model answers exactly, and its answers.

    An answer is what the model most likely writes up to the end of the line. Upper and lower case, and a full stop at
    the end, make no difference. (The published leaderboard also counts a longer answer, in which the target is the only
    word that could be an answer.)

    Args:
        wrapper: the model in a wrapper.
        samples: the samples.
        batch_size: number of samples that are read at once. Default: 8.
        encode: a function from a text to a list of token ids. Default: `encode_bytes`.
        decode: a function from a list of token ids to a text. Default: `decode_bytes`.
        template: what the model reads, with {input} and {question}, for example with an instruction. Default:
            `TEMPLATE`, what `BABILong` trains on.
        max_new_tokens: number of tokens that the model writes. Default: None, as many as the longest target has.

    Raises:
        ValueError: if there are no samples, or if an argument does not fit.
    """
    check_whole(batch_size=batch_size)
    check_count('max_new_tokens', max_new_tokens)
    if not samples:
        raise ValueError('there are no samples to score')
    outputs: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = [
            torch.tensor(encode(template.format(input=each.input.strip(), question=each.question.strip())))
            for each in batch
        ]
        count = max_new_tokens or max(len(encode(each.target + END)) for each in batch)
        device = wrapper.model.device
        new = wrapper.generate_tokens([prompt.to(device) for prompt in prompts], count, temperature=0.0, progress=False)
        outputs += [decode(row).partition(END)[0].strip() for row in new.tolist()]
    right = [_plain(output) == _plain(each.target) for output, each in zip(outputs, samples, strict=True)]
    return Score(sum(right) / len(right), outputs)


def score_folder(
    wrapper: SegmentWrapper,
    folder: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Returns the accuracy of a model on the samples in a folder, by task and length: {'qa1': {'4k': 0.9}}.

    The folder has a file for each task and length, somewhere inside it, such as data/qa1/4k.json. All files are read
    and checked before the model reads the first one.

    Args:
        wrapper: the model in a wrapper.
        folder: the folder.
        tasks: the tasks to score, such as ['qa1']. Default: None, all that are there.
        lengths: the lengths to score, such as ['4k']. Default: None, all that are there.
        options: the other arguments of `score`.

    Raises:
        ValueError: if there is no file for a task and length, or more than one, or if one is damaged. The message names
            it.
    """
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(Path(folder).rglob('qa*/*')):
        name = path.parent.name, path.stem
        if path.suffix not in ('.json', '.csv') or not re.fullmatch(r'qa\d+', name[0]):
            continue
        if (tasks is None or name[0] in tasks) and (lengths is None or name[1] in lengths):
            if name in files:
                raise ValueError(f'{files[name]} and {path} are both {name[0]} at {name[1]}: remove one of them')
            files[name] = path
    for index, wanted in enumerate((tasks, lengths)):
        for each in wanted or ():
            if not any(name[index] == each for name in files):
                raise ValueError(f'{folder} holds no samples of {each}: files are called qa1/4k.json or qa1/4k.csv')
    if not files:
        raise ValueError(f'{folder} holds no samples: files are called qa1/4k.json or qa1/4k.csv')
    samples = {name: read_samples(path) for name, path in files.items()}
    found: dict[str, dict[str, float]] = {}
    for (task, length), those in samples.items():
        found.setdefault(task, {})[length] = score(wrapper, those, **options).accuracy
    return found


def read_samples(path: str | Path) -> list[Sample]:
    """Returns the samples in a file of BABILong: JSON (a list, or one sample a line) or CSV, with input, question and
    target.

    Args:
        path: the file. Its name ends with .json or .csv.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.csv':
            limit = csv.field_size_limit(sys.maxsize)  # the default is 128 KiB, which long inputs exceed
            try:
                rows = list(csv.DictReader(io.StringIO(text), strict=True))
            finally:
                csv.field_size_limit(limit)
        elif text.lstrip().startswith('['):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split('\n') if line.strip()]
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    except (csv.Error, ValueError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    samples = []
    for number, row in enumerate(rows, 1):
        for field in Sample._fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f'{path} is damaged: sample {number} has no text {field!r}')
        samples.append(Sample(*(row[field] for field in Sample._fields)))
    if not samples:
        raise ValueError(f'{path} holds no sample')
    return samples


def _plain(answer: str) -> str:
    return answer.strip().rstrip('.').rstrip().lower()


def _hidden(facts: list, room: int, generator: random.Random, encode: Callable[[str], Any]) -> Iterator[Any]:
    """Yields facts in order, with `room` characters or tokens of filler at random places between them.

    Each begins with a space, but a sentence of filler for which too little room is left: of that, only the end is used.
    """
    used = 0
    for border, fact in [*zip(sorted(generator.randint(0, room) for _ in facts), facts, strict=True), (room, None)]:
        while used < border:
            a, b = (f'{generator.choice(ADJECTIVES)} {generator.choice(NOUNS)}' for _ in range(2))
            piece = encode(f' The {a} {generator.choice(VERBS)} the {b}.')[used - room :]
            used += len(piece)
            yield piece
        if fact is not None:
            yield fact


class _World:
    """People who go to places, take, leave and give objects, and what can be asked about it.

    Attributes:
        facts: what happened, in sentences.
        place: where each person is.
        stays: the places where each object was, in order, without repetition.
        gifts: who gave what to whom, in order.
    """

    def __init__(self, generator: random.Random, people: tuple[str, ...]):
        self.generator = generator
        self.people = people
        self.facts: list[str] = []
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.stays: dict[str, list[str]] = {}
        self.gifts: list[tuple[str, str, str]] = []

    def move(self) -> None:
        """Somebody goes to another place, with what they hold."""
        choice = self.generator.choice
        person = choice(self.people)
        place = choice([each for each in PLACES if each != self.place.get(person)])
        self.place[person] = place
        for thing, holder in self.holder.items():
            if holder == person:
                self.stays[thing].append(place)
        self.facts.append(f'{person} {choice(MOVED)} to the {place}.')

    def handle(self, giving: bool) -> None:
        """Somebody takes an object, leaves it, or gives it to somebody at the same place. If nobody can, they move.

        Args:
            giving: whether objects can be given.
        """
        choice = self.generator.choice
        acts: list[tuple[str, str, str, str]] = []
        for thing in OBJECTS:
            if thing in self.holder:
                person = self.holder[thing]
                acts.append(('leave', person, thing, ''))
                near = [each for each, at in self.place.items() if at == self.place[person] and each != person]
                acts += [('give', person, thing, each) for each in near if giving]
            else:
                here = self.stays.get(thing, [None])[-1]  # an object that nobody took yet can be anywhere
                acts += [('take', person, thing, '') for person, at in self.place.items() if here in (None, at)]
        if not acts:
            self.move()
            return
        act, person, thing, receiver = choice(acts)
        if act == 'take':
            self.holder[thing] = person
            self.stays.setdefault(thing, [self.place[person]])
            self.facts.append(f'{person} {choice(TOOK)} the {thing} there.')
        elif act == 'leave':
            del self.holder[thing]
            self.facts.append(f'{person} {choice(LEFT)} the {thing}.')
        else:
            self.holder[thing] = receiver
            self.gifts.append((person, thing, receiver))
            self.facts.append(f'{person} {choice(GAVE)} the {thing} to {receiver}.')

    def live(self, count: int, *, moves: float, until: Callable[[], Any], giving: bool = False) -> None:
        """Lets `count` things happen, and more until a question can be asked.

        Args:
            count: number of facts.
            moves: share of the facts that are moves.
            until: whether a question can be asked.
            giving: whether objects can be given. Default: False.
        """
        while len(self.facts) < count or not until():
            if self.generator.random() < moves:
                self.move()
            else:
                self.handle(giving)


def _qa1(generator: random.Random, count: int) -> Story:
    world = _World(generator, PEOPLE)
    world.live(count, moves=1.0, until=lambda: True)
    person = generator.choice(list(world.place))
    return Story(world.facts, f'Where is {person}?', world.place[person])


def _qa2(generator: random.Random, count: int) -> Story:
    world = _World(generator, PEOPLE)
    world.live(count, moves=0.5, until=lambda: world.stays)
    thing = generator.choice(list(world.stays))
    return Story(world.facts, f'Where is the {thing}?', world.stays[thing][-1])


def _qa3(generator: random.Random, count: int) -> Story:
    world = _World(generator, PEOPLE)
    world.live(count, moves=0.5, until=lambda: any(len(stays) > 1 for stays in world.stays.values()))
    thing = generator.choice([each for each, stays in world.stays.items() if len(stays) > 1])
    stays = world.stays[thing]
    place = generator.choice(stays[1:])
    last = len(stays) - 1 - stays[::-1].index(place)
    return Story(world.facts, f'Where was the {thing} before the {place}?', stays[last - 1])


def _qa4(generator: random.Random, count: int) -> Story:
    a, b, c = generator.sample(PLACES, 3)
    first = generator.choice(list(OPPOSITE))
    # if b were in the opposite direction of c, c would be in the first direction of b, as a is
    second = generator.choice([each for each in OPPOSITE if each != OPPOSITE[first]])
    relations = [(a, first, b), (b, second, c)]
    generator.shuffle(relations)
    facts = [f'The {one} is {direction} of the {other}.' for one, direction, other in relations]
    one, direction, other = generator.choice(relations)
    if generator.random() < 0.5:
        return Story(facts, f'What is {direction} of the {other}?', one)
    return Story(facts, f'What is the {one} {direction} of?', other)


def _qa5(generator: random.Random, count: int) -> Story:
    world = _World(generator, GIVERS)
    world.live(count, moves=0.3, until=lambda: world.gifts, giving=True)
    who, what, whom = generator.choice(world.gifts)
    question, known, asked = generator.choice(
        [
            (f'Who gave the {what} to {whom}?', (None, what, whom), 0),
            (f'Who gave the {what}?', (None, what, None), 0),
            (f'What did {who} give to {whom}?', (who, None, whom), 1),
            (f'Who received the {what}?', (None, what, None), 2),
            (f'Who did {who} give the {what} to?', (who, what, None), 2),
        ]
    )
    fits = [gift for gift in world.gifts if all(part in (None, have) for part, have in zip(known, gift, strict=True))]
    return Story(world.facts, question, fits[-1][asked])


STORIES: dict[str, Callable[[random.Random, int], Story]] = {
    'qa1': _qa1, 'qa2': _qa2, 'qa3': _qa3, 'qa4': _qa4, 'qa5': _qa5,
}  # fmt: skip


def _less_one(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [tuple(each for each in names if each != left_out) for left_out in names]


# The answers among which only the facts decide, for each kind of question. All are equally likely. A question that
# names one of them is not answered with it
ANSWERS: dict[str, list[tuple[str, ...]]] = {
    'qa1': [PLACES],
    'qa2': [PLACES],
    'qa3': _less_one(PLACES),
    'qa4': _less_one(PLACES),
    'qa5': [OBJECTS, GIVERS, *_less_one(GIVERS)],
}


def _guessed(answers: list[list[int]]) -> float:
    """Returns the share of the tokens that the best guess gets right if all answers are equally likely, and the tokens
    before are known."""
    following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for tokens in answers:
        for i, token in enumerate(tokens):
            following[tuple(tokens[:i])][token] += 1
    return sum(max(counts.values()) for counts in following.values()) / sum(map(len, answers))
