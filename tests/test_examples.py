"""The models in one file compute what the library's models compute with the same weights, and their scripts run."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import (
    many_processes,
    many_questions_one_book,
    minimal_infini,
    minimal_rmt,
    needle_in_a_million_tokens,
    train_a_task,
    train_on_your_text,
)
from infini_transformer_pytorch import InfiniTransformer
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.tasks import Memorize
from tests.conftest import close, ids, make_infini, make_rmt, same_gradients

LENGTH = 6  # of a segment
SIZES = dict(dim=16, depth=2, heads=2)
EXAMPLES: dict[str, ModuleType] = {'rmt': minimal_rmt, 'linear': minimal_infini, 'delta': minimal_infini}
every_model = pytest.mark.parametrize('name', EXAMPLES)
every_file = pytest.mark.parametrize('example', [minimal_rmt, minimal_infini], ids=lambda module: module.__name__)


def both(name: str):
    """The library's model in a wrapper, and the model in one file with the same weights, in float64."""
    if name == 'rmt':
        model = make_rmt(**SIZES, dim_head=8, num_memory_tokens=3, seq_len=LENGTH, write_init='previous')
        minimal = minimal_rmt.MinimalRMT(20, **SIZES, num_memory_tokens=3, seq_len=LENGTH)
    else:
        model = make_infini(**SIZES, dim_head=8, memory_rule=name)
        minimal = minimal_infini.MinimalInfini(20, **SIZES, delta=name == 'delta')
    minimal.double().load_state_dict(model.state_dict())
    return SegmentWrapper(model, segment_length=LENGTH), minimal


def tensors_of(state) -> list[Tensor]:
    """What a state holds, whichever model it is of: the memory, or M and z of each layer."""
    return [state] if isinstance(state, Tensor) else [tensor for part in state if part is not None for tensor in part]


@every_model
def test_logits_and_states_after_each_segment_are_those_of_the_library(name):
    wrapper, minimal = both(name)
    state = minimal_state = None
    for segment in ids(3, 4 * LENGTH - 2).split(LENGTH, dim=1):
        logits, state = wrapper.logits(segment, state)
        minimal_logits, minimal_state = minimal(segment, minimal_state)
        close(minimal_logits, logits)
        close(tensors_of(minimal_state), tensors_of(state.memory if name == 'rmt' else state))


@every_model
def test_loss_of_four_segments_and_its_gradients_are_those_of_the_library(name):
    """The last segment is shorter, and the last token of the text is only a target."""
    wrapper, minimal = both(name)
    tokens = ids(3, 4 * LENGTH - 1)
    loss = wrapper.loss(tokens).loss
    logits = EXAMPLES[name].read(minimal, tokens[:, :-1], LENGTH)
    minimal_loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    close(minimal_loss, loss)
    loss.backward()
    minimal_loss.backward()
    have, want = ({name: each.grad for name, each in model.named_parameters()} for model in (minimal, wrapper.model))
    assert have.keys() == want.keys()
    same_gradients(have, want)


@every_file
def test_main_prints_the_accuracy_by_number_of_segments_beside_guessing(example, capsys):
    accuracy = example.main(steps=2, sequences=3)
    lines = capsys.readouterr().out.splitlines()
    header = lines.index('segments    tokens    remembered')
    *rows, guessing = [line.split() for line in lines[header + 1 :]]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (str(segments), f'{32 * segments:,}', f'{share:.1%}') for segments, share in accuracy.items()
    ]
    assert guessing == ['guessing', '6.2%']
    assert ('longer' in rows[0], 'longer' in rows[-1]) == (False, True)


@pytest.mark.parametrize(
    'options',
    [{}, {'memory_noise': 0.3}, {'model': 'infini'}, {'model': 'infini', 'virtual_length': 1e3, 'gate_lr': 2.0}],
)
def test_train_a_task_prints_the_stages_and_how_long_the_memory_lasts(options, capsys):
    accuracy = train_a_task.main(steps=2, lengths=(1, 6), sequences=3, **options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'step     1: from here on 1 segments of 32 tokens'
    header = lines.index('segments    tokens    remembered')
    rows = [line.split() for line in lines[header + 1 : -1]]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (f'{segments}', f'{32 * segments}', f'{share:.1%}') for segments, share in accuracy.items()
    ]
    assert ('longer' in rows[0], 'longer' in rows[-1]) == (False, True)


def test_train_a_task_counts_a_middle_segment_many_times(monkeypatch):
    task, given = Memorize(), []
    model = InfiniTransformer(num_tokens=task.num_tokens, dim=8, depth=1, heads=1, dim_head=8, memory_rule='linear')
    wrapper = SegmentWrapper(model, segment_length=32)
    loss = wrapper.loss
    monkeypatch.setattr(wrapper, 'loss', lambda *args, **options: given.append(options) or loss(*args, **options))
    groups = model.param_groups(1e-3, 0.0)
    progress = train_a_task.train(wrapper, task, groups, stages=[4], steps=3, batch_size=16, virtual_length=50.0)
    assert progress.reached == {4: 1}
    assert [entry['step'] for entry in progress.history] == [3]
    for options in given:
        scale = options['per_segment']['write_scale']
        assert (scale[:, [0, 3]] == 1).all()
        assert 1 < scale.max() <= 50


@pytest.mark.parametrize('model', ['rmt', 'infini'])
def test_needle_prints_each_answer_beside_what_was_marked(model, capsys):
    """The text is read in pieces, and what was marked in it is what the task says."""
    right = needle_in_a_million_tokens.main(model=model, steps=2, tokens=9632, texts=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith('read 3 texts of 9,632 tokens in ')
    rows = [line.split() for line in lines[4:7]]
    _, labels = Memorize().batch(301, 3, torch.Generator().manual_seed(1))
    assert [int(row[1]) for row in rows] == labels[:, -1].tolist()
    assert [row[3] for row in rows] == ['right' if row[1] == row[2] else 'wrong' for row in rows]
    assert lines[-1] == f'{right:.0%} right; guessing would be 6%'


def test_needle_asks_from_the_cursor_what_the_whole_text_would_answer():
    task = Memorize()
    wrapper = needle_in_a_million_tokens.trained(task, 'infini', steps=2)
    cursor, question, values = needle_in_a_million_tokens.read(wrapper, task, 640, 3)
    tokens, labels = task.batch(20, 3, torch.Generator().manual_seed(1))
    assert (question == tokens[:, -1:]).all()
    assert (values == labels[:, -1]).all()
    close(next(wrapper.stream(question, state=cursor, temperature=0)), wrapper.logits(tokens)[0][:, -1].argmax(-1))


def test_book_is_read_once_and_every_question_is_asked(capsys):
    right = many_questions_one_book.main(steps=2, tokens=320)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('the book has 320 words: ')
    asked = [line for line in lines if line.startswith('Where is ')]
    assert len(asked) == 8
    assert sum('no:' not in line for line in asked) == 8 * right
    assert lines[-1].startswith(f'{8 * right:.0f} of 8 right')


@pytest.mark.parametrize('people', [None, 8])
def test_book_holds_each_fact_once_and_its_labels_are_the_places(people):
    task = many_questions_one_book.WhereIsEverybody(people)
    (book, nothing), (asked, labels) = task.pieces(20, 5, torch.Generator().manual_seed(0))
    assert nothing is None
    assert book.shape == (5, 40)
    assert asked.shape == labels.shape
    assert people is None or asked.shape == (5, 16)
    for row in range(5):
        for question in range(0, asked.shape[1], 2):
            at = (book[row] == asked[row, question]).nonzero()
            assert len(at) == 1
            assert book[row, at + 1] == labels[row, question] == asked[row, question + 1]


@pytest.mark.parametrize('model', ['rmt', 'infini'])
def test_train_on_your_text_shows_what_it_writes_with_memory_and_without(model, tmp_path, capsys):
    text = tmp_path / 'text.txt'
    text.write_bytes(b'the cat sat on the mat. ' * 400)
    found = train_on_your_text.main(str(text), model, 2, 'the ', dim=16, segment_length=16, valid_bytes=256, count=20)
    out = capsys.readouterr().out
    assert '8,640 bytes to learn from' in out
    assert list(found) == ['with its memory', 'without']
    for name, bits in found.items():
        assert f'--- {name}: {bits:.3f} bits per byte of held-out text. It writes:\nthe ' in out
    assert found['with its memory'] != found['without']


def test_writing_without_memory_starts_each_segment_from_nothing():
    """In the first segment both write the same."""
    wrapper = train_on_your_text.made('rmt', 16, 16)
    prompt = torch.tensor([[100, 101]])
    assert len({train_on_your_text.written(wrapper, prompt, 12, memory) for memory in (True, False)}) == 1
    assert len(train_on_your_text.written(wrapper, prompt, 40, False).encode('utf-8', 'replace')) >= 42


def test_many_processes_in_one_process_says_what_it_reads(capsys):
    losses = many_processes.main(steps=3, segments=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'rank 0 of 1: reads rows 0 to 31 of the batch'
    assert f'loss {losses[0]:.6f}, after 3 steps {losses[2]:.6f}' in lines[1]
    assert lines[2] == f'rank 0 of 1: read about 96 of 96 tokens of one text, loss {losses[3]:.6f}'


@pytest.mark.parametrize(
    'example', [many_processes, many_questions_one_book, needle_in_a_million_tokens, train_on_your_text]
)
def test_examples_are_short(example):
    assert len(Path(example.__file__).read_text().splitlines()) < 100


@every_file
def test_main_finds_all_answers_right_if_they_are(example, monkeypatch):
    """The model's logits are replaced by those of a reader who knows the token after the mark."""

    def knows(model, tokens, segment_length):
        value = tokens[:, 1:][tokens[:, :-1] == Memorize().mark]
        return F.one_hot(value, Memorize().num_tokens)[:, None].expand(-1, tokens.shape[1], -1) + 0 * model.logits.bias

    monkeypatch.setattr(example, 'read', knows)
    assert set(example.main(steps=1, sequences=3).values()) == {1.0}


@every_file
def test_file_is_short_and_its_model_imports_torch_alone(example):
    source = Path(example.__file__).read_text()
    assert len(source.splitlines()) <= 150
    tree = ast.parse(source)
    assert set(imported(tree.body)) <= {'argparse', 'torch', 'torch.nn.functional'}
    library = set(imported(ast.walk(tree))) - set(imported(tree.body))
    assert library == {'segment_recurrence_pytorch.tasks'}  # inside main: the data


@pytest.mark.parametrize(('method', 'real'), [('rmt', False), ('infini', False), ('rmt', True)])
def test_memory_for_a_pretrained_model_compares_and_saves(method, real, tmp_path, capsys):
    transformers = pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')
    from examples.memory_for_a_pretrained_model import main

    model = None
    if real:  # a model and its tokenizer in a folder, as from_pretrained finds them
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        model = str(tmp_path / 'model')
        letters = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes)).save_pretrained(model)
        capsys.readouterr()
    found = main(model=model, method=method, segment_length=16, segments=3, batch_size=4, base_steps=8, steps=3,
                 save=str(tmp_path / 'weights'))  # fmt: skip
    assert list(found) == ['without memory', method]
    assert all(after < before < 8.5 for before, after in found.values())
    assert abs(found[method][0] - found['without memory'][0]) < 0.5
    assert (tmp_path / 'weights').exists()
    assert 'it writes on: ' in capsys.readouterr().out


def imported(nodes) -> list[str]:
    """The names of the modules that some nodes of a syntax tree import."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('train_a_task', '--lengths 0', 'are counts: give 1 or more'),
        ('train_a_task', '--model rmt --virtual_length 9', '--virtual_length has no meaning for rmt'),
        ('train_a_task', '--model rmt --gate_lr 9', '--gate_lr has no meaning for rmt'),
        ('train_a_task', '--model infini --memory_noise 1', '--memory_noise has no meaning for infini'),
        ('train_a_task', '--model infini --virtual_length 0.5', 'give 1 or more'),
        ('train_a_task', '--model infini --gate_lr 0', '--gate_lr more than 0'),
        ('memory_for_a_pretrained_model', '--steps 0', '--steps is 0: give a number above 0'),
        ('memory_for_a_pretrained_model', '--segment-length -1', '--segment-length is -1: give a number above 0'),
        ('needle_in_a_million_tokens', '--tokens 10', '--tokens of 32 or more'),
        ('many_questions_one_book', '--tokens 10', '--tokens of 16 or more'),
        ('many_questions_one_book', '--steps -2', '--steps of 1 or more'),
        ('train_on_your_text', 'absent', 'absent cannot be read'),
        ('train_on_your_text', 'short', '240 bytes are too few to validate with'),
        ('train_on_your_text', '--steps 0', '--steps of 1 or more'),
    ],
)
def test_bad_arguments_end_an_example_with_one_line(name, arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / 'short').write_bytes(bytes(4800))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', [name, *arguments.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(train_a_task.__file__).with_stem(name)), run_name='__main__')
    assert message in capsys.readouterr().err.splitlines()[-1]
