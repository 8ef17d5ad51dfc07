"""BABILong: what is generated follows from its facts, and what is scored is what the model answers."""

import csv
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from segment_recurrence_pytorch import SegmentWrapper, babilong, tasks
from segment_recurrence_pytorch.babilong import (
    ANSWERS,
    STORIES,
    BABILong,
    Sample,
    decode_bytes,
    encode_bytes,
    make_samples,
    make_story,
    read_samples,
    score,
    score_folder,
)
from segment_recurrence_pytorch.loss import IGNORE
from tests.conftest import make_infini, make_rmt
from tests.reference import babilong_answer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# the first are of the published data
@pytest.mark.parametrize(
    ('text', 'question', 'answer'),
    [
        ('John travelled to the hallway. Mary journeyed to the bathroom. Daniel went back to the bathroom. John moved '
         'to the bedroom.', 'Where is Mary?', 'bathroom'),
        ('Sandra went to the office. Some words in between. Sandra travelled to the bathroom.', 'Where is Sandra?',
         'bathroom'),
        ('Mary went to the office. Mary got the milk there. John moved to the garden. Mary went to the garden. Mary '
         'dropped the milk. John took the milk there. John moved to the hallway.', 'Where is the milk?', 'hallway'),
        ('Mary went to the office. Mary got the milk there. Mary went to the garden. Mary dropped the milk. Mary went '
         'to the kitchen.', 'Where was the milk before the garden?', 'office'),
        ('The office is north of the garden. The garden is west of the kitchen.', 'What is the garden west of?',
         'kitchen'),
        ('The office is north of the garden. The garden is west of the kitchen.', 'What is south of the office?',
         'garden'),
        ('Fred went to the office. Fred got the milk there. Bill moved to the office. Fred handed the milk to Bill. '
         'Bill gave the milk to Fred.', 'Who gave the milk to Fred?', 'Bill'),
    ],
)  # fmt: skip
def test_the_solver_of_these_tests_can_read(text, question, answer):
    assert babilong_answer(text, question) == answer


@pytest.mark.parametrize('task', STORIES)
def test_the_answer_follows_from_the_facts(task):
    generator, counts = random.Random(0), Counter()
    for max_facts in (1, 2, 5, 10, 60):
        for _ in range(200):
            facts, question, answer = make_story(task, generator, max_facts=max_facts)
            assert babilong_answer(' '.join(facts), question) == answer
            assert any(answer in answers for answers in ANSWERS[task])
            assert answer not in re.findall(r'\w+', question)
            counts[answer] += 1
    assert set(counts) == {answer for answers in ANSWERS[task] for answer in answers}


def test_a_number_of_facts_is_kept():
    """From 2 to max_facts, unless there is nothing to ask yet."""
    generator = random.Random(0)
    counts = Counter(len(make_story('qa1', generator, max_facts=7).facts) for _ in range(500))
    assert set(counts) == set(range(2, 8))
    assert {len(make_story('qa4', generator, max_facts=9).facts) for _ in range(20)} == {2}
    assert min(len(make_story('qa3', generator, max_facts=1).facts) for _ in range(50)) == 3


def test_the_filler_has_no_word_of_a_fact():
    words = {word for task in STORIES for i in range(300) for word in
             re.findall(r'\w+', ' '.join(make_story(task, random.Random(i), max_facts=30).facts))}  # fmt: skip
    filler = re.findall(r'\w+', ' '.join((*babilong.ADJECTIVES, *babilong.NOUNS, *babilong.VERBS)))
    assert not words & set(filler)


@pytest.mark.parametrize('task', STORIES)
@pytest.mark.parametrize('length', [0, 1, 300, 301, 5000])
def test_facts_are_hidden_in_filler_of_any_length(task, length):
    samples = make_samples(task, 20, length=length, seed=3)
    facts = [make_samples(task, 20, length=0, seed=3)]
    for text, question, target in samples:
        assert babilong_answer(text, question) == target
        if length >= 1000:
            assert len(text) == length
    if length < 2:
        assert samples[0] == facts[0][0]
    assert samples == make_samples(task, 20, length=length, seed=3)
    assert samples != make_samples(task, 20, length=length, seed=4)


def test_facts_are_everywhere_in_the_text():
    samples = make_samples('qa4', 300, length=10_000)
    places = [match.start() for text, _, _ in samples for match in re.finditer(r'is \w+ of the', text)]
    shares = Counter(place * 4 // 10_000 for place in places)
    assert all(100 < shares[quarter] < 200 for quarter in range(4))


def texts_of(tokens, labels):
    """What the rows of a batch say, and what is asked of each: the text, the question and the answer."""
    for row, asked in zip(tokens, labels, strict=True):
        answer = decode_bytes(asked[asked != IGNORE].tolist())
        read = decode_bytes(row[: len(row) - len(answer) + 1].tolist())
        # the answer so far is what is read at each of its positions
        assert decode_bytes(row.tolist()) == read + answer[:-1]
        assert asked[: len(row) - len(answer)].eq(IGNORE).all()
        assert (read[-1], answer[-1]) == ('\n', '\n')
        text, question = re.fullmatch(r'(.*[. ])?((?:What|Where|Who)[^.]*\?)\n', read, re.DOTALL).groups()
        yield text or '', question, answer[:-1]


@pytest.mark.parametrize('task', STORIES)
@pytest.mark.parametrize(('length', 'segments'), [(512, 1), (512, 2), (100, 7), (16, 60), (700, 30)])
def test_a_batch_says_what_it_asks(task, length, segments):
    made = BABILong(task, length, max_facts=4)
    tokens, labels = made.batch(segments, 4, seeded())
    assert tokens.shape == labels.shape == (4, segments * length)
    for text, question, answer in texts_of(tokens, labels):
        assert babilong_answer(text, question) == answer
        if segments > 1:  # the segments of the question hold no fact
            last = -(-len(f'{question}\n{answer}') // length) * length
            before = text[: segments * length - last]
            assert babilong_answer(before, question) == answer
            assert not re.search('|'.join((*babilong.PEOPLE, *babilong.GIVERS, 'is')), text[len(before) :])
    again, _ = made.batch(segments, 4, seeded())
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, made.batch(segments, 4, seeded(1))[0])


def test_pieces_are_the_batch_and_are_small(monkeypatch):
    made = BABILong('qa2', 16, max_facts=3)
    whole, labels = made.batch(600, 2, seeded())
    pieces = list(made.pieces(600, 2, seeded()))
    assert max(piece.tokens.shape[1] for piece in pieces) <= tasks.PIECE_SEGMENTS * 16
    assert [piece.labels is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    monkeypatch.setattr(babilong, 'PIECE_SEGMENTS', 7)
    tokens, again = made.batch(600, 2, seeded())
    assert torch.equal(whole, tokens)
    assert torch.equal(labels, again)
    # a sequence of millions of tokens begins at once
    assert next(made.pieces(1_000_000, 1, seeded())).tokens.shape == (1, 7 * 16)


def test_tokens_of_a_tokenizer():
    """One token a word."""
    words: dict[str, int] = {}

    def encode(text):
        return [words.setdefault(word, len(words)) for word in re.findall(r'\S+|\n', text)]

    made = BABILong('qa1', 8, max_facts=3, encode=encode, num_tokens=200)
    tokens, labels = made.batch(20, 3, seeded())
    names = list(words)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert [names[token] for token in asked[-2:]][1] == '\n'
        text = ' '.join(names[token] for token in row[:-4])
        question = ' '.join(names[token] for token in row[-5:-2])
        assert babilong_answer(text, question) == names[asked[-2]] == names[row[-1]]
    assert made.without_memory == pytest.approx((1 / 6 + 1) / 2)


@pytest.mark.parametrize('task', STORIES)
def test_without_memory_is_what_guessing_gets(task):
    """The best guess: at each token of the answer, the likeliest next one among the answers that fit so far."""
    made, right, asked = BABILong(task, 256, max_facts=6), Counter(), Counter()
    tokens, labels = made.batch(12, 800, seeded())
    for _, question, answer in texts_of(tokens, labels):
        kind = question.split()[0] + str(len(re.findall('|'.join(babilong.GIVERS), question)))
        kinds = babilong.PLACES if task != 'qa5' else babilong.OBJECTS if question[:4] == 'What' else babilong.GIVERS
        open_ = [each + '\n' for each in kinds if each not in re.findall(r'\w+', question)]
        for i, letter in enumerate(answer + '\n'):
            fits = Counter(each[i] for each in open_ if each.startswith(answer[:i]))
            right[kind] += letter == max(fits, key=lambda each: (fits[each], each))
            asked[kind] += 1
    shares = {kind: right[kind] / asked[kind] for kind in asked}
    assert max(shares.values()) < made.without_memory + 0.04
    assert max(shares.values()) > made.without_memory - 0.06


def test_a_model_trains_and_is_scored_on_it():
    """`tasks.accuracy` and `score` agree on which answers are right from first to last token."""
    torch.manual_seed(1)
    made = BABILong('qa1', 32, max_facts=2)
    wrapper = SegmentWrapper(make_rmt(num_tokens=256, seq_len=32), segment_length=32)
    tokens, labels = made.batch(6, 4, seeded())
    loss, num_targets, _ = wrapper.loss(tokens, labels=labels, backward=True)
    assert num_targets == (labels != IGNORE).sum()
    assert loss.isfinite()
    assert 0 <= tasks.accuracy(wrapper, made, 6, batch_size=4, generator=seeded()) <= 1


@pytest.mark.parametrize('make', [make_rmt, make_infini])
def test_what_is_scored_is_the_greedy_answer_of_the_model(make):
    """Also for samples of different lengths in a batch."""
    wrapper = SegmentWrapper(make(num_tokens=256, **({'seq_len': 16} if make is make_rmt else {})), segment_length=16)
    samples = [*make_samples('qa1', 2, length=90), *make_samples('qa4', 3, length=130)]
    accuracy, outputs = score(wrapper, samples, batch_size=3, max_new_tokens=5)
    assert accuracy == 0
    for (text, question, _), output in zip(samples, outputs, strict=True):
        read = torch.tensor([encode_bytes(f'{text} {question}\n')])
        for _ in range(5):
            logits, _ = wrapper.logits(read)
            read = torch.cat((read, logits[:, -1:].argmax(-1)), dim=1)
        assert output == decode_bytes(read[0, -5:].tolist()).partition('\n')[0].strip()


class Answering:
    """Stands for a wrapper. It answers what `answer` says to the text that it reads."""

    def __init__(self, answer):
        self.answer = answer
        self.model = SimpleNamespace(device=torch.device('cpu'))

    def generate_tokens(self, prompts, count, *, temperature, progress):
        assert (temperature, progress) == (0, False)
        answers = [encode_bytes(self.answer(decode_bytes(prompt.tolist())))[:count] for prompt in prompts]
        return torch.tensor([row + [10] * (count - len(row)) for row in answers])


def solved(prompt):
    text, _, question = prompt.strip().rpartition('. ')
    return babilong_answer(f'{text}.', question)


@pytest.mark.parametrize('task', STORIES)
def test_perfect_and_chance(task):
    samples = make_samples(task, 400, length=600, seed=5)
    perfect = Answering(solved)
    assert score(perfect, samples).accuracy == 1
    generator = random.Random(0)

    def guess(prompt):
        question = prompt.strip().rpartition('. ')[2]
        answers = babilong.PLACES if task != 'qa5' else babilong.OBJECTS if 'What' in question else babilong.GIVERS
        return generator.choice([each for each in answers if each not in re.findall(r'\w+', question)])

    chance = {'qa1': 1 / 6, 'qa2': 1 / 6, 'qa3': 1 / 5, 'qa4': 1 / 5, 'qa5': 0.3}[task]
    assert abs(score(Answering(guess), samples).accuracy - chance) < 0.07
    assert score(Answering(lambda _: 'nowhere'), samples).accuracy == 0


def test_what_counts_as_the_same_answer():
    samples = [Sample('Mary went to the office.', 'Where is Mary? ', 'office')]
    for output, right in {
        'office': 1, ' Office.': 1, 'OFFICE \nand more': 1, 'the office': 0, 'offic': 0, 'office kitchen': 0, '': 0,
    }.items():  # fmt: skip
        accuracy, outputs = score(Answering(lambda _, output=output: output), samples, max_new_tokens=20)
        assert (accuracy, outputs) == (right, [output.partition('\n')[0].strip()])
    seen = []
    score(Answering(lambda prompt: seen.append(prompt) or 'x'), samples, template='Read: {input}\nQ: {question}\nA: ')
    assert seen == ['Read: Mary went to the office.\nQ: Where is Mary?\nA: ']
    assert decode_bytes([104, 105, 300, 255]) == 'hi\ufffd\ufffd'


def write_folder(folder):
    """A folder as it is published: data/qa1/0k.json, and so on; and what is in it."""
    written = {}
    for task in ('qa1', 'qa2', 'qa5'):
        for name, length in (('0k', 0), ('1k', 1000)):
            path = folder / 'data' / task / f'{name}.json'
            path.parent.mkdir(parents=True, exist_ok=True)
            written[task, name] = make_samples(task, 9, length=length)
            path.write_text(json.dumps([each._asdict() for each in written[task, name]]))
    (folder / 'data' / 'README.md').write_text('no samples')
    (folder / 'data' / 'qa1' / 'notes.txt').write_text('no samples')
    return written


def test_a_folder_of_the_user_is_scored(tmp_path):
    write_folder(tmp_path)
    everything = {task: {'0k': 1.0, '1k': 1.0} for task in ('qa1', 'qa2', 'qa5')}
    assert score_folder(Answering(solved), tmp_path) == everything
    assert score_folder(Answering(solved), str(tmp_path / 'data'), tasks=['qa2'], lengths=['1k']) == {'qa2': {'1k': 1}}
    assert score_folder(Answering(lambda _: 'garden'), tmp_path, tasks=['qa5'], batch_size=2) == {
        'qa5': {'0k': 0, '1k': 0}
    }


def test_json_lines_and_csv_are_the_same_samples(tmp_path):
    samples = [Sample('A "quoted" text,\nwith\u2028lines. ' * 9000, 'Where is Mary? ', 'garden')] * 2
    (tmp_path / 'a.json').write_text(json.dumps([each._asdict() for each in samples]))
    (tmp_path / 'b.json').write_text(
        '\n'.join(json.dumps(each._asdict() | {'more': 1}, ensure_ascii=False) for each in samples) + '\n'
    )
    with open(tmp_path / 'c.csv', 'w', newline='') as file:  # as pandas writes them, with the number of the row
        rows = csv.writer(file)
        rows.writerow(['', 'target', 'input', 'question'])
        rows.writerows([i, each.target, each.input, each.question] for i, each in enumerate(samples))
    limit = csv.field_size_limit()
    for name in ('a.json', 'b.json', 'c.csv'):
        assert read_samples(tmp_path / name) == samples
    assert csv.field_size_limit() == limit


def test_damaged_data_is_refused_by_name(tmp_path):
    write_folder(tmp_path)
    path, model = tmp_path / 'data' / 'qa2' / '1k.json', Answering(lambda _: pytest.fail('a model has read something'))
    good = path.read_text()

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            score_folder(model, tmp_path, **options)

    for content, message in {
        good[:-30]: 'is damaged: ',
        '[]': 'holds no sample',
        '': 'holds no sample',
        '[{"input": "a", "question": "b"}]': "is damaged: sample 1 has no text 'target'",
        '[{"input": "a", "question": "b", "target": 3}]': "is damaged: sample 1 has no text 'target'",
        '{"input": "a", "question": "b", "target": "c"}\n3': "is damaged: sample 2 has no text 'input'",
    }.items():
        path.write_text(content)
        refused(rf'qa2/1k\.json {message}')
    path.write_bytes(b'[\xff\xfe')
    refused(r'qa2/1k\.json is damaged: .*utf-8')
    path.unlink()
    path.mkdir()
    refused(r'qa2/1k\.json cannot be read: Is a directory')
    path.rmdir()
    wrong = tmp_path / 'data' / 'qa2' / '1k.csv'
    wrong.write_text('input,question,target\n"a,b,c\n')
    refused(r'qa2/1k\.csv is damaged: unexpected end of data')
    wrong.write_text('input,question,target\na,b\n')
    refused(r"qa2/1k\.csv is damaged: sample 1 has no text 'target'")
    path.write_text(good)
    refused(r'qa2/1k\.csv and .*qa2/1k\.json are both qa2 at 1k: remove one of them')
    wrong.unlink()
    refused(r'holds no samples of qa3: files are called', tasks=['qa1', 'qa3'])
    refused(r'holds no samples of 64k: files are called', lengths=['64k'])
    with pytest.raises(ValueError, match=r'nowhere holds no samples: files are called qa1/4k\.json or qa1/4k\.csv'):
        score_folder(model, tmp_path / 'nowhere')


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="task is 'qa6': give one of qa1, qa2, qa3, qa4, qa5"):
        BABILong('qa6')
    with pytest.raises(ValueError, match='segment_length is 0: give a whole number from 1 on'):
        BABILong(segment_length=0)
    with pytest.raises(ValueError, match='max_facts is 0: give a whole number from 1 on'):
        BABILong(max_facts=0)
    with pytest.raises(ValueError, match='length is -1: give a whole number of characters from 0 on'):
        make_samples('qa1', 3, length=-1)
    with pytest.raises(ValueError, match='count is 0'):
        make_samples('qa1', 0, length=9)
    with pytest.raises(ValueError, match=r'3 segments of 16 tokens: the shortest of 100 stories needs .*: give'):
        BABILong('qa2', 16).batch(3, 2, seeded())
    with pytest.raises(ValueError, match='0 segments of 512 tokens: the shortest'):
        BABILong().batch(0, 2, seeded())
    with pytest.raises(ValueError, match='batch_size is 0'):
        BABILong().batch(3, 0, seeded())
    with pytest.raises(ValueError, match=r'2\.5 segments: give a whole number'):
        BABILong().batch(2.5, 2, seeded())
    with pytest.raises(ValueError, match='there are no samples to score'):
        score(Answering(solved), [])
    with pytest.raises(ValueError, match='max_new_tokens is 0'):
        score(Answering(solved), make_samples('qa1', 1, length=9), max_new_tokens=0)


def test_a_text_that_is_made_has_the_tokens_of_a_text_that_is_scored():
    """With a tokenizer that joins a space with the word after it, as GPT-2 has: `score` encodes whole texts."""
    words: dict[str, int] = {}

    def encode(text):
        return [words.setdefault(word, len(words)) for word in re.findall(r' ?\w+|\W', text)]

    task = BABILong('qa1', 64, max_facts=3, encode=encode, num_tokens=1000)
    tokens, _ = task.batch(3, 8, seeded())
    names = list(words)
    for row in tokens.tolist():
        text = ''.join(names[token] for token in row)
        assert text.count('\n') == 1
        assert encode(text) == row
