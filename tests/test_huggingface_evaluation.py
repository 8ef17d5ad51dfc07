"""`SegmentLM`: a wrapper scored by `lm_eval`, without a network."""

import json

import pytest
import torch

pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')
pytest.importorskip('lm_eval', reason='needs the extra eval: pip install .[eval]')

import lm_eval
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_transformer_pytorch.huggingface import add_infini_attention
from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.huggingface.evaluation import SegmentLM
from tests.conftest import close
from tests.pretrained import LENGTH, TOKENS, tiny_lm

pytestmark = pytest.mark.filterwarnings('ignore')
MAKERS = {
    'rmt': lambda lm: RecurrentMemoryLM(lm, num_memory_tokens=2),
    'infini': lambda lm: add_infini_attention(lm, memory_rule='delta'),
}
both = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())


def words():
    """A tokenizer of words w0 to w37, with tokens that begin and end a text."""
    vocabulary = {'<s>': 0, '</s>': 1, **{f'w{i}': i + 2 for i in range(TOKENS - 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='</s>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>')


def text(count, seed):
    ids = torch.randint(0, TOKENS - 2, (count,), generator=torch.Generator().manual_seed(seed))
    return ' '.join(f'w{i}' for i in ids.tolist())


def scored(make, **options):
    return SegmentLM(SegmentWrapper(make(tiny_lm()), segment_length=LENGTH), words(), **options)


def requests(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@both
@torch.no_grad()
def test_rolling_is_the_loss_of_the_wrapper(make):
    model, texts = scored(make), [text(29, 0), text(3, 1), text(12, 2)]
    for each, found in zip(
        texts, model.loglikelihood_rolling(requests('x', *((t,) for t in texts)), True), strict=True
    ):
        ids = torch.tensor([[0, *words().encode(each)]])
        close(torch.tensor(found, dtype=torch.float64), -model.wrapper.loss(ids, reduction='sum').loss)


@both
@torch.no_grad()
def test_the_likelihood_of_a_continuation_is_that_of_the_parallel_pass(make):
    """Contexts of every length beside the borders of segments, in batches of different lengths."""
    model = scored(make, batch_size=3)
    pairs = [(text(n, n), ' ' + text(count, 50 + n)) for n, count in ((1, 3), (5, 9), (6, 1), (7, 2), (12, 6), (20, 4))]
    found = model.loglikelihood(requests('loglikelihood', *pairs, ('', text(5, 9))), disable_tqdm=True)
    pairs.append(('<s>', text(5, 9)))
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        before, ids = words().encode(context), torch.tensor(words().encode(continuation))
        x = torch.cat((torch.tensor(before), ids))[None]
        scores = model.wrapper.logits(x)[0][0, len(before) - 1 : -1].log_softmax(-1)
        assert likelihood == pytest.approx(scores.gather(1, ids[:, None]).sum().item(), abs=1e-4)
        assert greedy == bool((scores.argmax(-1) == ids).all())


@both
def test_options_of_training_play_no_part(make):
    """The targets of other processes, and an id that is padding in training and begins a text here."""
    model, pairs = make(tiny_lm()), [('', text(5, 9)), (text(3, 1), ' ' + text(4, 2))]
    want = SegmentLM(SegmentWrapper(model, segment_length=LENGTH), words())
    training = SegmentWrapper(model, segment_length=LENGTH, ignore_index=0, process_group='a group')
    have = SegmentLM(training, words())
    assert have.prefix_token_id == 0
    for call, asked in (
        ('loglikelihood', requests('loglikelihood', *pairs)),
        ('loglikelihood_rolling', requests('loglikelihood_rolling', (text(9, 3),))),
    ):
        assert getattr(have, call)(asked, disable_tqdm=True) == getattr(want, call)(asked, disable_tqdm=True)
    asked = requests('generate_until', (text(9, 0), {'until': [], 'max_gen_toks': 2, 'temperature': None}))
    assert have.generate_until(asked, True) == want.generate_until(asked, True)


@both
def test_a_greedy_continuation_is_known_as_such_and_generated(make):
    model, context = scored(make), text(9, 0)
    (answer,) = model.generate_until(requests('generate_until', (context, {'until': [], 'max_gen_toks': 8})), True)
    ids = words().encode(answer)
    want = model.wrapper.generate_tokens(torch.tensor([words().encode(context)]), 8, temperature=0.0)[0].tolist()
    assert ids == want[: want.index(1) if 1 in want else None]
    ((_, greedy),) = model.loglikelihood(requests('loglikelihood', (context, ' ' + answer)), disable_tqdm=True)
    assert greedy
    for name in ('max_new_tokens', 'max_tokens'):
        asked = requests('generate_until', (context, {'until': [''], name: 3, 'num_beams': 1}))
        assert model.generate_until(asked, True) == [' '.join(answer.split()[:3])]
    for asked, message in (({'num_beams': 4}, 'num_beams=4: there is no beam'), ({'penalty': 1}, "option 'penalty'")):
        with pytest.raises(ValueError, match=message):
            model.generate_until(requests('generate_until', (context, asked)), True)
    stop = answer.split()[-1]
    (cut,) = model.generate_until(requests('generate_until', (context, {'until': stop, 'max_gen_toks': 8})), True)
    assert cut == answer.split(stop)[0]


def test_a_local_task_is_scored(tmp_path):
    rows = [{'context': text(15, i), 'answer': f'w{i}', 'choices': [f'w{i}', f'w{i + 1}']} for i in range(4)]
    (tmp_path / 'rows.json').write_text('\n'.join(map(json.dumps, rows)))
    files = {'data_files': {'test': str(tmp_path / 'rows.json')}, 'cache_dir': str(tmp_path)}
    common = {'dataset_path': 'json', 'dataset_kwargs': files, 'test_split': 'test', 'doc_to_text': '{{context}}'}
    choice = {**common, 'task': 'local_choice', 'output_type': 'multiple_choice', 'doc_to_choice': '{{choices}}',
              'doc_to_target': 0}  # fmt: skip
    rolling = {**common, 'task': 'local_rolling', 'output_type': 'loglikelihood_rolling',
               'doc_to_target': '{{context}}', 'metric_list': [{'metric': 'word_perplexity'}]}  # fmt: skip
    model = scored(MAKERS['rmt'])
    found = lm_eval.simple_evaluate(model, tasks=[choice, rolling], bootstrap_iters=0)['results']
    assert 0 <= found['local_choice']['acc,none'] <= 1
    with torch.no_grad():
        losses = [model.wrapper.loss(torch.tensor([[0, *words().encode(row['context'])]]), reduction='sum').loss
                  for row in rows]  # fmt: skip
    want = torch.exp(sum(losses) / 60).item()
    assert found['local_rolling']['word_perplexity,none'] == pytest.approx(want, rel=1e-6)


def test_what_cannot_be_scored_is_refused():
    wrapper, tokenizer = SegmentWrapper(MAKERS['rmt'](tiny_lm()), segment_length=LENGTH), words()
    with pytest.raises(ValueError, match='batch_size is 0'):
        SegmentLM(wrapper, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="score with align='left'"):
        SegmentLM(SegmentWrapper(wrapper.model, segment_length=LENGTH, align='right'), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match='the tokenizer has no eos_token'):
        SegmentLM(wrapper, tokenizer)
