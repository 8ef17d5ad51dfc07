"""`ForTrainer`: a wrapper in `transformers.Trainer`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')
pytest.importorskip('accelerate', reason='Trainer needs accelerate')

from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from infini_transformer_pytorch.huggingface import add_infini_attention
from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_weights
from segment_recurrence_pytorch.huggingface.trainer import ForTrainer
from tests.conftest import close, make_rmt, same_gradients
from tests.pretrained import LENGTH, TOKENS, gradients_of, tiny_lm, transformers

# transformers 4 counts the first label of each row, which is no target, as it does for its own models
COUNTS_RIGHT = int(transformers.__version__.split('.')[0]) >= 5
MAKERS = {
    'rmt': lambda lm: RecurrentMemoryLM(lm, num_memory_tokens=2),
    'infini': lambda lm: add_infini_attention(lm, memory_rule='delta'),
}
both = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning')


class Texts(Dataset):
    """Rows of different lengths, padded at their end, with labels as transformers has them."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, TOKENS, (17,), generator=torch.Generator().manual_seed(index))
        valid = torch.arange(17) < 9 + index % 8
        labels = torch.where(valid, ids, -100)
        if not COUNTS_RIGHT:
            labels[0] = -100
        return dict(input_ids=ids, attention_mask=valid.long(), labels=labels)


def adapted(make, dtype=torch.float64, name='llama', **options):
    wrapper = SegmentWrapper(make(tiny_lm(name, dtype=dtype, **options)), segment_length=LENGTH)
    return ForTrainer(wrapper)


def trainer(module, folder, **options):
    common = dict(
        use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy='no', learning_rate=1e-2
    )
    common |= dict(max_steps=2, per_device_train_batch_size=4)
    arguments = TrainingArguments(str(folder), **{**common, **options})
    return Trainer(module, arguments, train_dataset=Texts(), eval_dataset=Texts())


def batch(*indices):
    return default_collate([Texts()[index] for index in indices])


def test_without_a_memory_the_loss_is_that_of_transformers():
    lm = tiny_lm()
    module = ForTrainer(SegmentWrapper(RecurrentMemoryLM(lm, num_memory_tokens=0), segment_length=17))
    close(module(**batch(0, 1, 2)).loss, lm(**batch(0, 1, 2)).loss.double(), 1e-6)  # theirs is float32


@both
def test_labels_are_shifted_once(make):
    module, given = adapted(make), batch(0, 3, 7)
    want = module.wrapper.loss(given['input_ids'], mask=given['attention_mask'].bool())
    if COUNTS_RIGHT:
        close(module(**given).loss, want.loss)
        close(module(**given, num_items_in_batch=10).loss, want.loss * want.num_targets / 10)
    logits = module(given['input_ids'], given['attention_mask']).logits
    close(logits, module.wrapper.logits(given['input_ids'], mask=given['attention_mask'].bool())[0])


@both
def test_a_step_in_which_nothing_counts_has_a_loss_of_zero(make):
    module, given = adapted(make), batch(0)
    given['labels'] = torch.full_like(given['labels'], -100)
    for count in ({}, {'num_items_in_batch': 0}, {'num_items_in_batch': torch.tensor(0)}):
        loss = module(**given, **count).loss
        loss.backward()
        assert loss == 0
        assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@both
@pytest.mark.parametrize('rows', [16, 4, 1], ids='{} rows at once'.format)
def test_a_step_is_that_of_the_loss_of_all_rows_however_many_are_read_at_once(make, rows, tmp_path):
    """The rows differ in length: a mean of means would be another step."""
    module, wrapper = adapted(make), adapted(make).wrapper
    options = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=16 // rows, max_grad_norm=0.0)
    trainer(module, tmp_path, optim='sgd', max_steps=1, **options).train()
    given = batch(*range(16))
    wrapper.loss(given['input_ids'], mask=given['attention_mask'].bool(), backward=True)
    torch.optim.SGD(wrapper.parameters(), lr=1e-2).step()
    same_gradients(module.wrapper.state_dict(), wrapper.state_dict())
    start = adapted(make).wrapper.state_dict()
    assert any((start[name] - tensor).abs().max() > 1e-5 for name, tensor in wrapper.state_dict().items())


@both
@pytest.mark.parametrize('tied', [False, True], ids=['untied', 'tied'])
def test_a_run_is_saved_and_resumed(make, tied, tmp_path, caplog):
    ends = []
    for resumed in (False, True):
        module = adapted(make, torch.float32, tie_word_embeddings=tied)
        each = trainer(module, tmp_path, max_steps=4, save_strategy='steps', save_steps=2)
        each.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-2') if resumed else None)
        ends.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    assert not [record for record in caplog.records if 'missing' in record.message]
    same_gradients(ends[1], ends[0], 1e-6)
    saved = load_file(tmp_path / 'checkpoint-4' / 'model.safetensors')
    assert sum('lm_head' in name or 'embed_tokens' in name for name in saved) == (1 if tied else 2)
    assert each.evaluate()['eval_loss'] > 0
    other = adapted(make, torch.float32, tie_word_embeddings=tied)
    other.load_state_dict(saved)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in other.state_dict().items())


def test_the_librarys_own_models_train_too(tmp_path):
    model = make_rmt(num_tokens=TOKENS)
    before = copy.deepcopy(model.state_dict())
    trainer(ForTrainer(SegmentWrapper(model)), tmp_path).train()
    assert not torch.equal(model.state_dict()['token_emb.weight'], before['token_emb.weight'])


@both
def test_recomputing_gives_the_same_gradients(make):
    module = adapted(make)
    module(**batch(0, 3)).loss.backward()
    want = gradients_of(module)
    module.wrapper.recompute = True
    module(**batch(0, 3)).loss.backward()
    same_gradients(gradients_of(module), want)


def test_what_trainer_would_count_wrongly_is_refused():
    with pytest.raises(ValueError, match='has a process_group'):
        ForTrainer(SegmentWrapper(make_rmt(), process_group=object()))
    with pytest.raises(ValueError, match='causal=False'):
        ForTrainer(SegmentWrapper(make_rmt(causal=False)))


@pytest.mark.parametrize('padded', [slice(0, 2), slice(4, 6)], ids=['left', 'hole'])
def test_a_label_that_padding_would_have_to_predict_is_refused(padded):
    """Trainer counts it, and the model cannot predict it."""
    given = batch(0, 3)
    given['attention_mask'][1, padded] = 0
    given['labels'][1, padded] = -100
    with pytest.raises(ValueError, match=f'row 1 has a label at position {padded.stop} and padding before it'):
        adapted(MAKERS['rmt'])(**given)
    given['labels'][1, padded.stop] = -100
    assert adapted(MAKERS['rmt'])(**given).loss > 0


def test_weights_of_a_module_around_it_are_loaded_again():
    made = [nn.Sequential(adapted(MAKERS['rmt'], tie_word_embeddings=True)) for _ in range(2)]
    saved = made[0].state_dict()
    assert sum('lm_head' in name or 'embed_tokens' in name for name in saved) == 1
    made[1].load_state_dict(saved)
    for mine, yours in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_checkpointing_of_transformers_is_refused(tmp_path):
    module = adapted(MAKERS['rmt'])
    with pytest.raises(ValueError, match=r'give SegmentWrapper\(recompute=True\)'):
        trainer(module, tmp_path, gradient_checkpointing=True).train()


def test_a_model_instead_of_a_wrapper():
    with pytest.raises(ValueError, match=r'takes a SegmentWrapper, not a RecurrentMemoryLM: wrap the model first'):
        ForTrainer(MAKERS['rmt'](tiny_lm()))


def test_what_trainer_saved_is_loaded_again(tmp_path):
    module, other = adapted(MAKERS['infini']), adapted(MAKERS['infini'])
    trainer(module, tmp_path).save_model(str(tmp_path / 'final'))
    load_weights(other, tmp_path / 'final' / 'model.safetensors')
    assert all(torch.equal(mine, yours) for mine, yours in zip(module.parameters(), other.parameters(), strict=True))
