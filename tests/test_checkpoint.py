"""Weights, cursors and training states on disk: what comes back, and what is refused with everything as it was."""

import errno
import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import Cursor, SegmentWrapper
from segment_recurrence_pytorch.checkpoint import (
    load_cursor,
    load_training_state,
    load_weights,
    save_cursor,
    save_training_state,
    save_weights,
)
from segment_recurrence_pytorch.state import leaves, to_list
from tests.conftest import ids, make_infini, make_rmt, random_weights
from tests.generating import wrapped
from tests.script import full_disk

MAKERS = pytest.mark.parametrize('make', [make_rmt, make_infini])


def weights_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_weights(module, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    'make',
    [
        make_rmt,
        make_infini,
        lambda: make_rmt(tie_embeddings=True),
        lambda: SegmentWrapper(make_rmt()),
        lambda: InfiniTransformerWrapper(make_infini(tie_embeddings=True)),
        lambda: nn.Linear(3, 4),
        nn.ReLU,
    ],
    ids=['rmt', 'infini', 'tied', 'wrapper', 'infini wrapper', 'other module', 'no weights'],
)
def test_weights_go_back_into_a_module_of_the_same_kind(make, tmp_path):
    module, other = make(), make()
    save_weights(module, tmp_path / 'weights')
    load_weights(other, tmp_path / 'weights')
    assert same_weights(other, weights_of(module))


@MAKERS
def test_a_file_that_does_not_say_which_model_made_it_is_taken_by_its_shapes(make, tmp_path):
    module = make()
    for metadata in (None, {'format': 'pt'}):
        save_file(weights_of(module), tmp_path / 'weights', metadata=metadata)
        other = make()
        load_weights(other, tmp_path / 'weights')
        assert same_weights(other, weights_of(module))


def partly_frozen(make, seed=0):
    """A model of which only the norms, the memory tokens and the gates are trained."""
    torch.manual_seed(seed)
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('norm' in name or 'memory' in name or 'gates' in name)
    return model


@MAKERS
@pytest.mark.parametrize('options', [{}, {'tie_embeddings': True}], ids=['', 'tied'])
def test_trained_weights_alone_go_back_beside_the_same_frozen_ones(make, options, tmp_path):
    made, other = (partly_frozen(lambda: make(**options)) for _ in range(2))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    save_weights(SegmentWrapper(made, segment_length=6), tmp_path / 'wrapped', trained_only=True)
    save_weights(made, tmp_path / 'weights', trained_only=True)
    assert set(load_file(tmp_path / 'weights')) == {n for n, p in made.named_parameters() if p.requires_grad}
    load_weights(other, tmp_path / 'weights')
    assert same_weights(other, weights_of(made))

    further = partly_frozen(lambda: make(**options), seed=1)
    before = weights_of(further)
    with pytest.raises(ValueError, match=r'made beside other frozen weights than this .*Transformer has'):
        load_weights(further, tmp_path / 'weights')
    assert same_weights(further, before)


@MAKERS
def test_trained_weights_alone_need_a_trained_weight_and_fit_by_shape(make, tmp_path):
    model = make()
    with pytest.raises(ValueError, match='every parameter is frozen: unfreeze one, or leave it out'):
        save_weights(model.requires_grad_(False), tmp_path / 'weights', trained_only=True)
    assert not list(tmp_path.iterdir())
    save_file({'norm.weight': torch.zeros(9)}, tmp_path / 'shape', metadata={'others': ''})
    before = weights_of(model)
    with pytest.raises(ValueError, match=r'norm\.weight has shape \(9,\), not \(16,\)'):
        load_weights(model, tmp_path / 'shape')
    assert same_weights(model, before)


@MAKERS
def test_a_fingerprint_of_some_values_of_each_weight_says_how_many(make):
    model = make()
    whole = model.fingerprint()
    model.fingerprint_values = 5
    some = model.fingerprint()
    assert some == {**whole, 'sha256': some['sha256'], 'values': 5}
    assert some['sha256'] != whole['sha256']
    with torch.no_grad():
        model.norm.weight[1] += 1  # not one of the five evenly spaced values of 16: 0, 4, 8, 12
        assert model.fingerprint() == some
        model.norm.weight.add_(1)
    assert model.fingerprint() != some


@MAKERS
def test_parameter_groups_hold_what_is_trained(make):
    model = partly_frozen(make)
    grouped = [parameter for group in model.param_groups(1e-3, 0.1) for parameter in group['params']]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())


OTHER_OPTIONS = [
    (make_rmt, {}, {'memory_mask': 'causal'}, "was made with memory_mask=None, this model has 'causal'"),
    (make_rmt, {'memory_mask': 'mixed'}, {'memory_mask': 'block'}, "memory_mask='mixed', this model has 'block'"),
    (make_rmt, {'rotary_pos_emb': True}, {}, 'rotary_pos_emb=True, this model has False'),
    (make_rmt, {}, {'ignore_index': 3}, 'ignore_index=-1, this model has 3'),
    (
        make_infini,
        {'use_mem_delta_rule': False},
        {'use_mem_delta_rule': True},
        "memory_rule='linear', this model has 'delta'",
    ),
    (make_infini, {'mem_read_from': 'above'}, {}, "mem_read_from='above', this model has 'same'"),
    (make_infini, {'head_gate_init_value': 1.0}, {}, r'head_gate_init_value=1\.0, this model has 3\.0'),
]


@pytest.mark.parametrize('wrap', [False, True], ids=['model', 'wrapper'])
@pytest.mark.parametrize(('make', 'theirs', 'ours', 'message'), OTHER_OPTIONS)
def test_weights_of_the_same_shapes_and_other_options_are_refused(make, theirs, ours, message, wrap, tmp_path):
    made, module = make(**theirs), make(**ours)
    if wrap:
        made, module = (SegmentWrapper(model, segment_length=6) for model in (made, module))
    save_weights(made, tmp_path / 'weights')
    before = weights_of(module)
    with pytest.raises(ValueError, match=message):
        load_weights(module, tmp_path / 'weights')
    assert same_weights(module, before)


@MAKERS
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(make, tmp_path):
    module = make()
    before = weights_of(module)
    save_weights(make(depth=3), tmp_path / 'deep')
    save_weights(make_infini() if make is make_rmt else make_rmt(), tmp_path / 'class')
    save_file({**before, 'norm.weight': torch.zeros(9)}, tmp_path / 'shape')
    save_file({'logits.bias': before['logits.bias'] + 1}, tmp_path / 'part')
    (tmp_path / 'cut').write_bytes((tmp_path / 'shape').read_bytes()[:-200])
    (tmp_path / 'text').write_text('no weights')
    for content in ('[1]', '3', '{}', '{"class": "InfiniTransformer", "arguments": []}'):
        save_file(before, tmp_path / f'said {content}'.replace('"', ''), metadata={'model': content})
    save_file(before, tmp_path / 'no json', metadata={'model': '{'})
    messages = {
        'deep': 'was made with depth=3, this model has 2',
        'class': rf'was made by a .*Transformer, not {type(module).__name__}',
        'shape': rf'does not hold the weights of this {type(module).__name__}.*norm\.weight',
        'part': 'does not hold the weights of this',
        'cut': 'does not hold the weights of this',
        'text': 'does not hold the weights of this',
        'missing': 'does not hold the weights of this',
        'no json': 'does not hold the weights of this',
        'said [1]': r'does not say which model made it: its fingerprint is \[1\]',
        'said 3': 'does not say which model made it: its fingerprint is 3',
        'said {}': r'does not say which model made it: its fingerprint is \{\}',
        'said {class: InfiniTransformer, arguments: []}': 'does not say which model made it',
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=f'(?s){message}'):
            load_weights(module, tmp_path / name)
        assert same_weights(module, before), name


class Scaled(RecurrentMemoryTransformer):
    """A model with options of its own: a positional one, a keyword, and what it hands on."""

    def __init__(self, scale, name='none', **options):
        super().__init__(16, num_tokens=20, depth=2, num_memory_tokens=3, seq_len=6, heads=2, dim_head=8, **options)
        self.scale, self.name = scale, name

    def to_logits(self, hidden):
        return self.logits(hidden) * self.scale


class ScaledMore(Scaled):
    """A subclass of a subclass that hands on all that it is given, and takes one keyword out."""

    def __init__(self, *args, shift=0.0, **options):
        super().__init__(*args, **options)
        self.shift = shift


class Shifted(InfiniTransformer):
    """The same for the other model."""

    def __init__(self, shift, /, **options):
        super().__init__(num_tokens=20, dim=16, depth=2, heads=2, dim_head=4, **options)
        self.shift = shift


def test_arguments_hold_the_options_of_every_class():
    model = Scaled(2.0, memory_mask='causal')
    assert {'scale': 2.0, 'name': 'none', 'memory_mask': 'causal', 'dim': 16, 'write_init': 'scaled'}.items() <= (
        model.arguments.items()
    )
    model = ScaledMore(2.0, 'more', shift=1.0, qk_norm=True)
    assert {'scale': 2.0, 'name': 'more', 'shift': 1.0, 'qk_norm': True, 'depth': 2}.items() <= model.arguments.items()
    model = Shifted(0.5, memory_decay=True)
    assert {'shift': 0.5, 'memory_decay': True, 'dim_head': 4, 'mem_read_from': 'same'}.items() <= (
        model.arguments.items()
    )
    assert 'options' not in model.arguments
    assert make_rmt(heads=4).arguments['heads'] == 4
    # of what a file cannot hold, it holds the type
    assert Scaled(2.0, nn.ReLU()).fingerprint()['arguments']['name'] == 'a ReLU'


SUBCLASSES = [
    (lambda: Scaled(2.0), lambda: Scaled(3.0), r'was made with scale=2\.0, this model has 3\.0'),
    (lambda: Scaled(2.0, 'one'), lambda: Scaled(2.0, name='two'), "was made with name='one', this model has 'two'"),
    (lambda: Scaled(2.0), lambda: Scaled(2.0, memory_mask='causal'), "memory_mask=None, this model has 'causal'"),
    (lambda: ScaledMore(2.0), lambda: ScaledMore(2.0, shift=1.0), r'was made with shift=0\.0, this model has 1\.0'),
    (lambda: ScaledMore(2.0), lambda: ScaledMore(3.0), r'was made with (args|scale)=.*2\.0.*, this model has .*3\.0'),
    (lambda: Shifted(1), lambda: Shifted(2), 'was made with shift=1, this model has 2'),
]


@pytest.mark.parametrize(('theirs', 'ours', 'message'), SUBCLASSES)
def test_files_of_a_subclass_with_another_option_of_its_own_are_refused(theirs, ours, message, tmp_path):
    made, model, again = (random_weights(make()) for make in (theirs, ours, theirs))
    for each in (model, again):
        each.load_state_dict(made.state_dict())
    cursor = SegmentWrapper(made, segment_length=6).read(ids(2, 9))
    save_cursor(cursor, tmp_path / 'cursor', made)
    save_weights(made, tmp_path / 'weights')
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        load_cursor(tmp_path / 'cursor', model)
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / 'weights')
    assert same_weights(model, before)
    load_weights(again, tmp_path / 'weights')
    assert torch.equal(load_cursor(tmp_path / 'cursor', again).tokens, cursor.tokens)


def test_a_state_whose_tensors_share_memory_is_saved(tmp_path):
    wrapper = wrapped('infini, delta, gqa')
    cursor = wrapper.read(ids(2, 9))
    cursor = cursor._replace(state=(cursor.state[0],) * len(cursor.state))
    save_cursor(cursor, tmp_path / 'book', wrapper.model)
    again = load_cursor(tmp_path / 'book', wrapper.model)
    assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(cursor), strict=True))


def test_a_cursor_file_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    wrapper = wrapped('rmt, xl')
    cursor, path = wrapper.read(ids(2, 9)), tmp_path / 'book.safetensors'
    save_cursor(cursor, path, wrapper.model)
    with pytest.raises(ValueError, match='made with memory_mask'):
        load_cursor(path, make_rmt(use_xl_memories=True, memory_mask='causal'))
    with pytest.raises(ValueError, match='other weights'):
        load_cursor(path, make_rmt(use_xl_memories=True))
    with pytest.raises(ValueError, match='RecurrentMemoryTransformer, not InfiniTransformer'):
        load_cursor(path, make_infini())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match='is damaged: its tensors do not have the sha256 that it says'):
        load_cursor(path, wrapper.model)
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match='no cursor'):
        load_cursor(path, wrapper.model)
    with pytest.raises(ValueError, match='no cursor'):
        load_cursor(tmp_path / 'missing.safetensors', wrapper.model)


BAD_FINGERPRINTS = [
    (lambda said: None, 'holds no cursor'),
    (lambda said: {'other': 'x'}, "holds no cursor: 'fingerprint'"),
    (lambda said: {'fingerprint': '{'}, 'holds no cursor'),
    (lambda said: {'fingerprint': '[]'}, r'does not say which model made it: its fingerprint is \[\]'),
    (lambda said: {'fingerprint': '["class", "arguments"]'}, 'does not say which model made it'),
    (lambda said: {'fingerprint': 'null'}, 'does not say which model made it: its fingerprint is None'),
    (lambda said: {'fingerprint': '3'}, 'does not say which model made it: its fingerprint is 3'),
    (lambda said: {'fingerprint': '{}'}, r'does not say which model made it: its fingerprint is \{\}'),
    (lambda said: {'fingerprint': json.dumps({**said, 'arguments': [1]})}, 'does not say which model made it'),
    (lambda said: {'fingerprint': json.dumps({**said, 'class': None})}, 'was made by a None, not'),
    (lambda said: {'fingerprint': json.dumps({**said, 'sha256': None})}, 'made with other weights'),
    (lambda said: {'fingerprint': json.dumps({n: said[n] for n in ('class', 'arguments')})}, 'made with other weights'),
]


@pytest.mark.parametrize(('metadata', 'message'), BAD_FINGERPRINTS)
def test_a_cursor_file_that_does_not_say_which_model_made_it_is_refused(metadata, message, tmp_path):
    wrapper, path = wrapped('infini, delta'), tmp_path / 'cursor'
    save_cursor(wrapper.read(ids(2, 9)), path, wrapper.model)
    save_file(load_file(path), path, metadata=metadata(wrapper.model.fingerprint()))
    with pytest.raises(ValueError, match=message):
        load_cursor(path, wrapper.model)


BAD_CURSORS = [
    (dict(tokens=lambda t: t.float()), r'the tokens of the cursor are torch\.float32 of shape \(2, 9\)'),
    (
        dict(tokens=lambda t: t[0].clone()),
        r'the tokens of the cursor are torch\.int64 of shape \(9,\): .* 2 dimensions',
    ),
    (dict(tokens=lambda t: t + 15), r'a token of the cursor is outside \[0, 20\)'),
    (dict(tokens=lambda t: t - 20), r'a token of the cursor is outside \[0, 20\)'),
    (dict(lengths=lambda t: t + 1), r'a length of the cursor is outside \[0, 9\]'),
    (dict(lengths=lambda t: -t), r'a length of the cursor is outside \[0, 9\]'),
    (dict(lengths=lambda t: t[:1].clone()), 'the cursor has 1 lengths for 2 rows of tokens'),
    (dict(lengths=lambda t: t.double()), r'the lengths of the cursor are torch\.float64 of shape \(2,\)'),
    (dict(memory=lambda t: t * torch.nan), r'state\.memory holds NaN or infinite values'),
    (dict(memory=lambda t: t[:, :2].clone()), r'state\.memory: shape \(2, 2, 16\)'),
    (dict(memory=lambda t: t.float()), r'state\.memory: torch\.float32'),
]


@pytest.mark.parametrize(('parts', 'message'), BAD_CURSORS)
def test_a_cursor_that_cannot_be_is_neither_saved_nor_loaded(parts, message, tmp_path):
    wrapper, path = wrapped('rmt, plain'), tmp_path / 'cursor'
    _, state = wrapper.logits(ids(2, 6))
    cursor = Cursor(state, ids(2, 9), torch.tensor([9, 4]))
    save_cursor(cursor, path, wrapper.model)
    change = {part: parts.get(part, torch.clone) for part in ('memory', 'tokens', 'lengths')}
    changed = Cursor(
        state._replace(memory=change['memory'](state.memory)),
        change['tokens'](cursor.tokens),
        change['lengths'](cursor.lengths),
    )
    with pytest.raises(ValueError, match=message):
        save_cursor(changed, tmp_path / 'new', wrapper.model)
    assert [file.name for file in tmp_path.iterdir()] == ['cursor']
    metadata = {'fingerprint': json.dumps(wrapper.model.fingerprint())}
    tensors = {str(i): part.detach() for i, part in enumerate(to_list(changed)) if part is not None}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=f'holds no cursor of this model: .*{message}'):
        load_cursor(path, wrapper.model)


def test_tokens_after_the_end_of_a_row_mean_nothing(tmp_path):
    """Only the first lengths[i] tokens of row i are the row's: what follows them may be anything."""
    wrapper, path, tokens = wrapped('rmt, plain'), tmp_path / 'cursor', ids(2, 9)
    tokens[1, 4:] = -100
    save_cursor(Cursor(None, tokens, torch.tensor([9, 4])), path, wrapper.model)
    loaded = load_cursor(path, wrapper.model)
    expected = wrapper.generate_tokens([tokens[0], tokens[1, :4]], 5, temperature=0)
    assert torch.equal(wrapper.generate_tokens(None, 5, state=loaded, temperature=0), expected)


@MAKERS
def test_a_cursor_goes_into_a_file_with_the_model_not_with_its_wrapper(make, tmp_path):
    model, path = make(), tmp_path / 'cursor'
    wrapper = SegmentWrapper(model, segment_length=6)
    cursor = wrapper.read(ids(2, 9))
    save_cursor(cursor, path, model)
    for call in (lambda: save_cursor(cursor, path, wrapper), lambda: load_cursor(path, wrapper)):
        with pytest.raises(ValueError, match='the model is a SegmentWrapper: give a SegmentModel'):
            call()
    for other in (None, cursor.state, tuple(cursor)):
        with pytest.raises(ValueError, match=f'the cursor is a {type(other).__name__}: give what'):
            save_cursor(other, path, model)
    for have, want in zip(leaves(load_cursor(path, model)), leaves(cursor), strict=True):
        assert torch.equal(have, want)


@MAKERS
def test_a_model_on_meta_has_nothing_to_save_and_takes_nothing(make, tmp_path):
    model, meta = make(), make().to('meta')
    cursor = SegmentWrapper(model, segment_length=6).read(ids(2, 9))
    save_cursor(cursor, tmp_path / 'cursor', model)
    save_weights(model, tmp_path / 'weights')
    for call in (
        lambda: save_weights(meta, tmp_path / 'new'),
        lambda: load_weights(meta, tmp_path / 'weights'),
        lambda: meta.fingerprint(),
        lambda: save_cursor(cursor, tmp_path / 'new', meta),
        lambda: load_cursor(tmp_path / 'cursor', meta),
    ):
        with pytest.raises(ValueError, match='the model is on the meta device, wh'):
            call()
    assert {file.name for file in tmp_path.iterdir()} == {'cursor', 'weights'}


SAVES = {
    'weights': lambda wrapper, path: save_weights(wrapper.model, path),
    'cursor': lambda wrapper, path: save_cursor(wrapper.read(ids(2, 9)), path, wrapper.model),
    'training state': lambda wrapper, path: save_training_state({'step': 3}, path),
}


@pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)
def test_nothing_is_written_where_there_is_no_folder(save, tmp_path):
    wrapper = RecurrentMemoryTransformerWrapper(make_rmt())
    with pytest.raises(ValueError, match=r'run/step/file cannot be written: the folder .*run/step is not there'):
        save(wrapper, tmp_path / 'run' / 'step' / 'file')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)
def test_nothing_is_written_in_place_of_a_folder(save, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    with pytest.raises(ValueError, match='run cannot be written: it is a folder, give the name of a file in it'):
        save(RecurrentMemoryTransformerWrapper(make_rmt()), folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert folder.is_dir()


def test_a_training_state_comes_back_and_what_is_none_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / 'state'
    random_state = torch.get_rng_state()
    save_training_state({'step': 3, 'rng': random_state}, path)
    written = path.read_bytes()
    with pytest.raises(ValueError, match='the training state cannot be written, give tensors and plain values'):
        save_training_state({'step': lambda: 3}, path)
    wrapper, x = wrapped('rmt, xl mixed'), ids(2, 9)
    for refused in (wrapper.loss(x).state, wrapper.read(x), Path('folder')):
        with pytest.raises(
            ValueError, match=r'holds an object that loading refuses, .* by `state\.to_list` \(it holds a '
        ):
            save_training_state({'state': refused}, path)
    assert path.read_bytes() == written
    save_training_state({'state': to_list(wrapper.loss(x).state)}, tmp_path / 'list')
    assert len(load_training_state(tmp_path / 'list')['state']) == len(to_list(wrapper.loss(x).state))
    loaded = load_training_state(path)
    assert loaded['step'] == 3
    assert torch.equal(loaded['rng'], random_state)


@pytest.mark.parametrize('content', [b'hello', b'', b'\x80\x04', b'PK\x03\x04 cut', b'cposix\nsystem\n.'])
def test_a_file_of_another_kind_is_no_training_state(content, tmp_path):
    (tmp_path / 'other').write_bytes(content)
    for path in (tmp_path / 'other', tmp_path, tmp_path / 'missing'):
        with pytest.raises(ValueError, match=rf'{path.name} is no training state that can be resumed') as error:
            load_training_state(path)
        assert 'weights_only' not in str(error.value)  # PyTorch's advice to run what a file holds


@pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)
def test_a_full_disk_leaves_the_file_as_it_was(save, tmp_path):
    wrapper = RecurrentMemoryTransformerWrapper(make_rmt())
    (tmp_path / 'file').write_text('before')
    with full_disk(300), pytest.raises(OSError, match='File too large') as error:
        save(wrapper, tmp_path / 'file')
    assert 'inline_container' not in str(error.value)  # torch's own words, which say nothing of the disk
    assert (tmp_path / 'file').read_text() == 'before'
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)
@pytest.mark.parametrize('umask', [0o022, 0o077])
def test_a_file_has_the_mode_that_the_umask_gives(save, umask, tmp_path):
    before = os.umask(umask)
    try:
        save(RecurrentMemoryTransformerWrapper(make_rmt()), tmp_path / 'file')
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'file').stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)
def test_a_file_that_is_written_again_stays_where_and_what_it_was(save, tmp_path):
    wrapper = RecurrentMemoryTransformerWrapper(make_rmt())
    (tmp_path / 'elsewhere').mkdir()
    target, link = tmp_path / 'elsewhere' / 'target', tmp_path / 'link'
    target.write_text('before')
    target.chmod(0o640)
    link.symlink_to(target)
    save(wrapper, link)
    assert link.is_symlink()
    assert target.stat().st_size > 100
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.unlink()
    save(wrapper, link)  # to a place where nothing is yet
    assert link.is_symlink()
    assert target.stat().st_size > 100
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match='pipe cannot be written: it is no ordinary file'):
        save(wrapper, tmp_path / 'pipe')
    assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='asks /proc which file is synced')
def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: [done.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd)])
    monkeypatch.setattr(os, 'replace', lambda part, path: [done.append('replace'), replace(part, path)])
    save_training_state({'step': 3}, tmp_path / 'file')
    assert re.fullmatch(rf'{re.escape(str(tmp_path))}/\.file\.[0-9a-f]+\.part', done[0])
    assert done[1:] == ['replace', str(tmp_path)]


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path, errors = tmp_path / 'state', []
    save_training_state({'rows': torch.zeros(1000)}, path)

    def write(value):
        try:
            for _ in range(20):
                save_training_state({'rows': torch.full((1000,), value)}, path)
                assert len(load_training_state(path)['rows'].unique()) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('save', SAVES.values(), ids=SAVES)
def test_a_name_that_cannot_be_read_again_is_refused(save, tmp_path):
    with pytest.raises(ValueError, match=r'q\\udcff cannot be written: its name is not UTF-8'):
        save(RecurrentMemoryTransformerWrapper(make_rmt()), tmp_path / 'q\udcff')
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_sync_folders_is_no_obstacle(tmp_path, monkeypatch):
    def cannot(_):
        raise OSError(errno.EINVAL, 'Invalid argument')

    monkeypatch.setattr(os, 'fsync', cannot)
    save_training_state({'step': 3}, tmp_path / 'file')
    assert load_training_state(tmp_path / 'file') == {'step': 3}


@pytest.mark.parametrize(
    ('make', 'changed'),
    [
        (make_rmt, dict(ff_dropout=0.1, attn_dropout=0.2, memory_noise=0.3, use_flash_attn=True)),
        (make_infini, dict(ff_dropout=0.1, attn_dropout=0.2)),
    ],
)
def test_arguments_that_change_no_result_may_differ(make, changed, tmp_path):
    """A model is trained on with dropout; a cursor is made on a GPU, and read on a CPU."""
    model, x = make(), ids(2, 9)
    wrapper = SegmentWrapper(model, segment_length=6)
    save_weights(model, tmp_path / 'weights.safetensors')
    save_cursor(wrapper.read(x), tmp_path / 'cursor.safetensors', model)
    other = type(model)(**{**model.arguments, **changed}).double()
    assert set(changed) == other.free_arguments
    load_weights(other, tmp_path / 'weights.safetensors')
    cursor = load_cursor(tmp_path / 'cursor.safetensors', other)
    wanted = wrapper.generate_tokens(x, 8, temperature=0)
    found = SegmentWrapper(other, segment_length=6).generate_tokens(None, 8, state=cursor, temperature=0)
    assert torch.equal(found, wanted)


class Configured(RecurrentMemoryTransformer):
    """Its constructor takes the sizes out of the dict that it gets."""

    def __init__(self, config, *, scales=(1,)):
        super().__init__(num_tokens=config.pop('num_tokens'), dim=16, depth=1, num_memory_tokens=2, seq_len=6)
        config['seen'] = True


def test_arguments_are_those_that_were_given_whatever_becomes_of_a_dict():
    config, scales = {'num_tokens': 20, 'inner': {'rate': [1]}}, [1]
    model = Configured(config, scales=scales)
    scales.append(2)
    config['inner']['rate'].append(2)
    assert model.arguments['config'] == {'num_tokens': 20, 'inner': {'rate': [1]}}
    assert model.arguments['scales'] == [1]
    with pytest.raises(TypeError, match='unexpected keyword'):
        Configured({}, wrong=1)


class Counted(nn.Module):
    """An adapter that counts, as BatchNorm does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(16, dtype=torch.float64)

    def forward(self, x):
        return self.inner(x) + self.norm(x.flatten(0, -2)).view_as(x)


def test_trained_weights_alone_come_with_what_their_modules_count(tmp_path):
    def make():
        torch.manual_seed(0)
        model = make_rmt().requires_grad_(False)
        model.layers[0].ff = Counted(model.layers[0].ff)
        return model

    model, other = make().train(), make()
    SegmentWrapper(model, segment_length=6).loss(ids(2, 13)).loss.backward()
    save_weights(model, tmp_path / 'trained', trained_only=True)
    assert len(load_file(tmp_path / 'trained')) == 5
    load_weights(other, tmp_path / 'trained')
    assert same_weights(other, weights_of(model))
    assert other.layers[0].ff.norm.num_batches_tracked > 0


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {'scale': self.scale}


def test_a_fingerprint_has_what_modules_keep_besides_tensors():
    models = [make_rmt(), make_rmt()]
    models[1].load_state_dict(models[0].state_dict())
    for model, scale in zip(models, (1, 2), strict=True):
        model.logits = ExtraState(16, 20, bias=False)
        model.logits.scale = scale
    models[1].logits.weight = models[0].logits.weight
    assert models[0].fingerprint() != models[1].fingerprint()
    models[1].logits.scale = 1
    assert models[0].fingerprint() == models[1].fingerprint()
