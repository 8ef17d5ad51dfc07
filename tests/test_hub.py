"""Models as folders and on the hub, in the format of `PyTorchModelHubMixin`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentModel
from segment_recurrence_pytorch.checkpoint import load_weights
from tests import script
from tests.conftest import DROPOUT, ids, make_infini, make_rmt

FILES = {'README.md', 'config.json', 'model.safetensors'}
MODELS = {
    'rmt': lambda: make_rmt(**DROPOUT, tie_embeddings=True, use_xl_memories=True),
    'infini': lambda: make_infini(memory_rule='delta', kv_heads=1, tie_embeddings=True),
}


def logits(model, tokens):
    return model.to_logits(model.advance(tokens)[0])


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', MODELS)
def test_a_folder_gives_the_model_back(name, dtype, tmp_path):
    model = MODELS[name]().to(dtype)
    model.save_pretrained(tmp_path / 'a' / 'b')
    assert set(content(tmp_path / 'a' / 'b')) == FILES
    assert json.loads((tmp_path / 'a' / 'b' / 'config.json').read_text()) == model.arguments
    again = type(model).from_pretrained(tmp_path / 'a' / 'b')
    assert (again.dtype, again.arguments) == (dtype, model.arguments)
    assert not any(module.training for module in again.modules())
    assert again.logits.weight is again.token_emb.weight
    tokens = ids(2, 5)
    assert torch.equal(logits(again, tokens), logits(model.eval(), tokens))
    again.save_pretrained(str(tmp_path / 'c'))
    before, after = content(tmp_path / 'a' / 'b'), content(tmp_path / 'c')
    assert all(before[each] == after[each] for each in ('config.json', 'README.md'))


@pytest.mark.parametrize('name', MODELS)
def test_the_format_is_that_of_the_mixin(name, tmp_path):
    model = MODELS[name]().float()
    cls = type(model)
    mixed_cls = type(cls.__name__, (PyTorchModelHubMixin, cls), {})
    mixed = mixed_cls(**model.arguments)
    mixed.load_state_dict(model.state_dict())
    mixed.save_pretrained(tmp_path / 'theirs')
    model.save_pretrained(tmp_path / 'ours')
    ours, theirs = content(tmp_path / 'ours'), content(tmp_path / 'theirs')
    assert set(ours) == set(theirs) == FILES
    assert ours['config.json'] == theirs['config.json']
    weights = [load_file(tmp_path / which / 'model.safetensors') for which in ('ours', 'theirs')]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.equal(weights[0][each], weights[1][each]) for each in weights[0])
    tokens = ids(2, 5)
    for again in (cls.from_pretrained(tmp_path / 'theirs'), mixed_cls.from_pretrained(tmp_path / 'ours')):
        assert torch.equal(logits(again.eval(), tokens), logits(model.eval(), tokens))
    cards = [ModelCard.load(tmp_path / which / 'README.md').data for which in ('ours', 'theirs')]
    assert sorted(cards[0].tags) == sorted(cards[1].tags)


@pytest.mark.parametrize('name', script.MODELS)
def test_the_folder_of_a_run_is_such_a_folder(at_work, name):
    cls = script.MODELS[name]
    model = cls.from_pretrained(f'runs/{name}')
    newest = load_file(f'runs/{name}/checkpoints/step-4/model.safetensors')
    assert all(torch.equal(tensor, newest[each]) for each, tensor in model.state_dict().items())
    before = content(f'runs/{name}/checkpoints/step-4')
    model.save_pretrained(f'runs/{name}')
    model.save_pretrained('elsewhere', run=f'runs/{name}')
    card = Path('elsewhere/README.md').read_text()
    assert card == Path(f'runs/{name}/README.md').read_text()
    assert before == content(f'runs/{name}/checkpoints/step-4')
    about = json.loads(Path(f'runs/{name}/run.json').read_text())
    last = json.loads(Path(f'runs/{name}/metrics.jsonl').read_text().splitlines()[-1])
    for row in (
        '| data | text |', '| seed | 0 |', '| batch_size | 4 |', f'| sha256 | {about["sha256"]} |', '| steps | 4 |',
        f'| dim | {model.dim} |',
        f'| bits per byte of the validation, state carried | {last["valid"]["carried"]:.4g} |',
        f'| bits per byte of the validation, state reset | {last["valid"]["reset"]:.4g} |',
    ):  # fmt: skip
        assert row in card
    # the code in it loads the model
    code = card.split('```python\n')[1].split('```')[0].replace("'NAME'", "'elsewhere'")
    names: dict = {}
    exec(code, names)
    assert torch.equal(logits(names['model'], ids(1, 3) * 0), logits(model, ids(1, 3) * 0))


def test_a_damaged_validation_is_left_out_of_the_card(at_work):
    with open('runs/rmt/metrics.jsonl', 'a') as metrics:
        metrics.write('{"step": 5, "valid": [1.0]}\n')
    RecurrentMemoryTransformer.from_pretrained('runs/rmt').save_pretrained('new', run='runs/rmt')
    assert '| steps | 5 |' in Path('new/README.md').read_text()


def test_a_card_tells_nothing_about_the_machine(at_work):
    about = json.loads(Path('runs/rmt/run.json').read_text())
    about['run']['data'] = about['corpus'] = '/home/somebody/secret/enwik8.gz'
    Path('runs/rmt/run.json').write_text(json.dumps(about))
    RecurrentMemoryTransformer.from_pretrained('runs/rmt').save_pretrained('new', run='runs/rmt')
    card = Path('new/README.md').read_text()
    assert '| data | enwik8.gz |' in card
    assert 'somebody' not in card


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / 'README.md').write_text('mine')
    make_rmt().save_pretrained(tmp_path)
    assert (tmp_path / 'README.md').read_text() == 'mine'


def test_arguments_can_be_replaced(tmp_path):
    model = make_rmt()
    model.save_pretrained(tmp_path)
    again = RecurrentMemoryTransformer.from_pretrained(tmp_path, attn_dropout=0.5, memory_noise=0.1)
    assert (again.arguments['attn_dropout'], again.memory_noise) == (0.5, 0.1)
    with pytest.raises(ValueError, match=r'config\.json does not make a RecurrentMemoryTransformer: attn_dropout is 2'):
        RecurrentMemoryTransformer.from_pretrained(tmp_path, attn_dropout=2.0)
    with pytest.raises(ValueError, match=r'model\.safetensors does not hold the weights of this Recurrent'):
        RecurrentMemoryTransformer.from_pretrained(tmp_path, depth=3)


class Sized(RecurrentMemoryTransformer):
    """Gives all arguments to the base class itself."""

    def __init__(self, width: int = 2):
        super().__init__(16 * width, num_tokens=20, depth=1, seq_len=4, heads=1, num_memory_tokens=2)


class Passing(RecurrentMemoryTransformer):
    """Has an argument more, and passes the others on."""

    def __init__(self, extra: int = 1, **others):
        super().__init__(**others)
        self.extra = extra


@pytest.mark.parametrize('make', [lambda: Sized(3), lambda: Passing(5, **make_rmt().arguments)])
def test_a_class_of_the_user(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.arguments == model.arguments
    assert torch.equal(logits(again, ids(2, 4) * 0), logits(model, ids(2, 4) * 0))


class FakeApi:
    """The two calls that an upload needs. It keeps what was uploaded."""

    def __init__(self, token=None):
        FakeApi.calls = [('token', token)]

    def create_repo(self, **options):
        FakeApi.calls.append(('create_repo', options))
        return SimpleNamespace(repo_id=f'me/{options["repo_id"]}')

    def upload_folder(self, *, folder_path, **options):
        FakeApi.calls.append(('upload_folder', options))
        FakeApi.files = content(folder_path)
        return 'https://huggingface.co/me/it/commit/1'


def test_pushing_uploads_what_saving_writes(at_work, monkeypatch):
    monkeypatch.setattr(huggingface_hub, 'HfApi', FakeApi)
    model = RecurrentMemoryTransformer.from_pretrained('runs/rmt')
    address = model.push_to_hub('it', run='runs/rmt', private=True, token='secret', branch='b', commit_message='one')
    assert address == 'https://huggingface.co/me/it/commit/1'
    options = {'repo_id': 'me/it', 'repo_type': 'model', 'commit_message': 'one', 'revision': 'b', 'create_pr': None}
    assert FakeApi.calls == [
        ('token', 'secret'),
        ('create_repo', {'repo_id': 'it', 'private': True, 'exist_ok': True}),
        ('upload_folder', options),
    ]
    model.save_pretrained('saved', run='runs/rmt')
    assert FakeApi.files == content('saved')
    # what cannot be saved makes nothing on the hub
    with pytest.raises(ValueError, match=r'nowhere/run\.json does not tell'):
        model.push_to_hub('it', run='nowhere')
    assert FakeApi.calls == [('token', None)]


def test_a_name_is_loaded_from_the_hub(tmp_path, monkeypatch):
    model, asked = make_rmt(), []
    model.save_pretrained(tmp_path / 'cache')

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(tmp_path / 'cache' / filename)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    again = RecurrentMemoryTransformer.from_pretrained('me/it', revision='v1', local_files_only=True)
    assert torch.equal(logits(again, ids(2, 4) * 0), logits(model, ids(2, 4) * 0))
    options = dict(revision='v1', token=None, cache_dir=None, force_download=False, local_files_only=True)
    assert asked == [('me/it', 'config.json', options), ('me/it', 'model.safetensors', options)]

    def fail(error):
        def raising(**_):
            raise error

        monkeypatch.setattr(huggingface_hub, 'hf_hub_download', raising)
        with pytest.raises(ValueError, match=r'me/it is no folder here, and its config\.json cannot be loaded.*why'):
            RecurrentMemoryTransformer.from_pretrained('me/it')

    fail(OSError('why'))
    fail(HFValidationError('why'))
    fail(HfHubHTTPError('why', response=SimpleNamespace(headers={}, request=None)))


def test_folders_need_no_further_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    model = make_rmt()
    model.save_pretrained(tmp_path / 'it')
    RecurrentMemoryTransformer.from_pretrained(tmp_path / 'it')
    install = r"needs the package huggingface_hub: pip install 'segment-recurrence-pytorch\[hub\]'$"
    with pytest.raises(ImportError, match=f'^push_to_hub {install}'):
        model.push_to_hub('it')
    with pytest.raises(ImportError, match=f'^me/it is no folder here, and loading from the hub {install}'):
        RecurrentMemoryTransformer.from_pretrained('me/it')


class ByPosition(RecurrentMemoryTransformer):
    def __init__(self, size, /):
        super().__init__(num_tokens=size, dim=16, depth=1, num_memory_tokens=2, seq_len=6)


class HasModule(SegmentModel):
    num_tokens, dim = 20, 4

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def initial_state(self, batch_size):
        return torch.zeros(batch_size, 1)

    def advance(self, tokens, state=None, **_):
        return self.inner(tokens), state

    def to_logits(self, hidden):
        return hidden


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'argument inner of HasModule is a Embedding, which config\.json cannot hold'):
        HasModule(nn.Embedding(20, 4)).save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match=r'argument inner of HasModule is a dict, which .*keys of dicts become texts'):
        HasModule({'rates': [{1: 0.5}]}).save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match='the constructor of ByPosition takes size by its position alone'):
        ByPosition(20).save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match='on the meta device'):
        make_rmt().to('meta').save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match=r'nowhere/run\.json does not tell how a run was made'):
        make_rmt().save_pretrained(tmp_path / 'a', run=tmp_path / 'nowhere')
    (tmp_path / 'run.json').write_text('{"run": 3}')
    with pytest.raises(ValueError, match=r'run\.json does not tell how a run was made'):
        make_rmt().save_pretrained(tmp_path / 'a', run=tmp_path)
    assert not (tmp_path / 'a').exists()
    (tmp_path / 'a').write_text('a file')
    with pytest.raises(ValueError, match='a is a file: give the name of a folder'):
        make_rmt().save_pretrained(tmp_path / 'a')
    assert (tmp_path / 'a').read_text() == 'a file'


def test_what_cannot_be_loaded_is_refused(tmp_path):
    folder = tmp_path / 'it'
    make_rmt().save_pretrained(folder)
    with pytest.raises(ValueError, match=r'model\.safetensors was made by a RecurrentMemoryTransformer, not Infini'):
        InfiniTransformer.from_pretrained(folder)
    good = content(folder)

    def refused(message, cls=RecurrentMemoryTransformer, **changed):
        for name, inside in good.items():
            (folder / name).write_bytes(changed.get(name.partition('.')[0], inside))
        for name, inside in changed.items():
            if inside is None:
                next(folder.glob(f'{name}.*')).unlink()
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(folder)

    arguments = json.loads(good['config.json'])
    refused(r'config\.json is damaged', config=good['config.json'][:-9])
    refused(r'config\.json is damaged: it holds a list', config=b'[1]')
    refused(r'model\.safetensors is damaged, or holds no weights', model=good['model.safetensors'][:-9])
    refused(r'model\.safetensors is damaged, or holds no weights', model=b'')
    refused(
        r'model\.safetensors was made with dim=16, this model has 32',
        config=json.dumps(arguments | {'dim': 32}).encode(),
    )
    # a folder of the mixin does not say which model made its weights
    save_file(make_rmt().state_dict(), tmp_path / 'bare')
    bare = (tmp_path / 'bare').read_bytes()
    newer = json.dumps(arguments | {'telepathy': True}).encode()
    refused(r"config\.json has the argument 'telepathy', which .* does not take: .*newer", config=newer, model=bare)
    refused(r"config\.json has the argument 'abs_pos_emb', which Infini", InfiniTransformer, model=bare)
    refused(r'config\.json does not make a RecurrentMemoryTransformer: ', config=b'{"dim": 16}', model=bare)
    wrong = json.dumps(arguments | {'dim': 'many'}).encode()
    refused(r'config\.json does not make a RecurrentMemoryTransformer: ', config=wrong, model=bare)
    deeper = json.dumps(arguments | {'depth': 3}).encode()
    refused(r'model\.safetensors does not hold the weights of this Recurrent', config=deeper, model=bare)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged, or holds no weights: No such file'):
        RecurrentMemoryTransformer.from_pretrained(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(ValueError, match=r'it/config\.json cannot be read: No such file'):
        RecurrentMemoryTransformer.from_pretrained(folder)


def test_a_model_that_was_changed_after_it_was_made(tmp_path):
    """Its folder cannot be loaded by arguments alone, and the message says what loads it."""

    def changed():
        model = make_infini()
        model.layers[0].ff = nn.Sequential(model.layers[0].ff, nn.Linear(16, 16).double())
        return model

    model, x = changed(), ids(1, 5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'changed after it was made.*load_weights'):
        InfiniTransformer.from_pretrained(tmp_path)
    again = changed()
    load_weights(again, tmp_path / 'model.safetensors')
    assert torch.equal(logits(again.eval(), x), logits(model.eval(), x))


def test_a_folder_with_longer_segments(tmp_path):
    """As docs/research.md says: without a table of positions."""
    model, x = make_rmt(abs_pos_emb=False, rotary_pos_emb=True), ids(1, 5)
    model.save_pretrained(tmp_path)
    longer = RecurrentMemoryTransformer.from_pretrained(tmp_path, seq_len=64)
    assert longer.max_segment_length == 64
    assert torch.equal(logits(longer, x), logits(model.eval(), x))
    make_rmt().save_pretrained(tmp_path / 'table')
    with pytest.raises(ValueError, match='pos_emb'):
        RecurrentMemoryTransformer.from_pretrained(tmp_path / 'table', seq_len=64)
