"""What both retrofits of a pretrained model share: what is trained, files, limits, and what is refused."""

import copy
import gc
import json
import math
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')

from infini_transformer_pytorch.huggingface import InfiniLM, add_infini_attention
from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.checkpoint import load_cursor, load_weights, save_cursor, save_weights
from segment_recurrence_pytorch.huggingface import decoder
from segment_recurrence_pytorch.huggingface.decoder import config_of, plain_config
from segment_recurrence_pytorch.state import leaves
from tests.conftest import close, long_unless, same_gradients
from tests.pretrained import FAMILIES, FEW, LENGTH, TOKENS, decoded, gradients_of, tiny_lm, tokens, transformers
from tests.pretrained import config_of as tiny_config

MAKERS = {
    'rmt': lambda lm, **options: RecurrentMemoryLM(lm, **{'num_memory_tokens': 3, **options}),
    'infini': lambda lm, **options: add_infini_attention(lm, **{'memory_rule': 'delta', **options}),
}
both = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())


def wrapped(model, **options):
    return SegmentWrapper(model, segment_length=LENGTH, **options)


def own(name):
    """Whether a parameter belongs to the memory and not to the base."""
    return not name.startswith('lm.') or '.infini.' in name


# what is trained


@both
def test_a_frozen_base_trains_the_memory_alone(make):
    lm = tiny_lm().requires_grad_(False)
    before = copy.deepcopy(lm.state_dict())
    model = make(lm)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if own(name)}
    grouped = [parameter for group in model.param_groups(0.1, 0.1) for parameter in group['params']]
    assert len(grouped) == len(trained)
    optimizer, losses = torch.optim.AdamW(model.param_groups(0.02, 0.0)), []
    for _ in range(6):
        losses.append(wrapped(model).loss(tokens(3, 21), backward=True).loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, model.lm.state_dict()[name]) for name, tensor in before.items())


@both
def test_full_training_gives_every_parameter_a_gradient(make):
    model = make(tiny_lm())
    wrapped(model).loss(tokens(3, 21), backward=True)
    assert all(parameter.grad.any() for parameter in model.parameters())
    groups = model.param_groups(1.0, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in groups[0]['params']}
    assert {'lm.model.layers.0.mlp.up_proj.weight', 'lm.lm_head.weight'} <= decayed
    assert not any('norm' in name or 'embed' in name or own(name) for name in decayed)
    if isinstance(model, InfiniLM):
        assert [names[id(p)].split('.')[-1] for p in groups[2]['params']] == ['head_gates'] * 2
        assert groups[2]['lr'] == 3


def test_linear_layers_of_gpt2_decay():
    model = MAKERS['rmt'](tiny_lm('gpt2'))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)].rpartition('.h.')[2] for parameter in model.param_groups(1.0, 0.1)[0]['params']}
    assert {'0.attn.c_attn.weight', '1.mlp.c_proj.weight'} <= decayed
    assert not any('wte' in name or 'wpe' in name or 'ln' in name or 'memory' in name for name in decayed)


def with_lora(lm, seed=0, **options):
    peft = pytest.importorskip('peft', reason='needs peft')
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], init_lora_weights=False, **options)
    with warnings.catch_warnings():  # of transformers, about a name that peft uses
        warnings.simplefilter('ignore')
        return peft.get_peft_model(lm, config).double()


@both
def test_lora_first_trains_adapters_and_memory_which_one_file_holds(make, tmp_path):
    model, x = make(with_lora(tiny_lm())), tokens(3, 21)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if own(name) or 'lora_' in name}
    wrapped(model).loss(x).loss.backward()
    want = gradients_of(model)
    assert all(want[name].any() for name in trained)
    wrapped(model).loss(x, backward=True)
    same_gradients(gradients_of(model), want)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_weights(model, tmp_path / 'weights', trained_only=True)
    other = make(with_lora(tiny_lm(), seed=1))
    load_weights(other, tmp_path / 'weights')
    with torch.no_grad():
        close(wrapped(other).logits(x), wrapped(model).logits(x))
    with pytest.raises(ValueError, match='made beside other frozen weights'):
        load_weights(make(with_lora(tiny_lm(seed=1))), tmp_path / 'weights')


@both
def test_adapters_with_other_settings_are_refused_by_weights_and_cursors(make, tmp_path):
    """The same weights with another factor are another model."""
    model, x = make(with_lora(tiny_lm())), tokens(1, 21)
    save_weights(model, tmp_path / 'weights', trained_only=True)
    save_cursor(wrapped(model).read(x), tmp_path / 'cursor', model)
    other = make(with_lora(tiny_lm(), lora_alpha=99))
    other.load_state_dict(model.state_dict())
    for load in (load_weights, lambda model, path: load_cursor(path, model)):
        path = tmp_path / ('weights' if load is load_weights else 'cursor')
        load(model, path)
        with pytest.raises(ValueError, match=r'made with adapters\.default\.lora_alpha=.*, this model has 99'):
            load(other, path)
    model.lm.add_adapter('second', model.lm.peft_config['default'])
    model.lm.set_adapter('second')
    with pytest.raises(ValueError, match='made with adapters'):
        load_cursor(tmp_path / 'cursor', model)


@both
def test_adapters_around_the_memory_are_refused(make, tmp_path):
    model, x = make(tiny_lm()), tokens(2, 13)
    inner = with_lora(model).base_model.model
    with pytest.raises(ValueError, match='peft was applied to the model with the memory, and has frozen the memory'):
        wrapped(inner).loss(x, backward=True)
    with pytest.raises(ValueError, match='apply it to the language model, before the memory is added'):
        inner.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_after_infini_is_refused_until_the_memory_is_unfrozen():
    lm = tiny_lm()
    model = add_infini_attention(lm)
    with_lora(lm)
    with pytest.raises(ValueError, match='peft was applied after add_infini_attention, which froze the memory'):
        wrapped(model).loss(tokens(2, 13), backward=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        wrapped(model).logits(tokens(2, 13))  # reading is right all the same
    for memory in model.memory_layers:
        memory.requires_grad_(True)
    wrapped(model).loss(tokens(2, 13), backward=True)
    assert all(memory.fastweight_mem.head_gates.grad.any() for memory in model.memory_layers)


def test_lora_after_rmt_leaves_the_memory_tokens_trained():
    lm = tiny_lm()
    model = MAKERS['rmt'](lm)
    with_lora(lm)
    wrapped(model).loss(tokens(2, 13), backward=True)
    assert model.initial_memory.grad.any()


def checkpoint(lm, use_reentrant):
    new = getattr(lm, 'activation_checkpointing_enable', None)  # its name since transformers 5
    (new or lm.gradient_checkpointing_enable)({'use_reentrant': use_reentrant})


@both
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_gradient_checkpointing_of_transformers_is_exact_or_refused(make):
    model, x = make(tiny_lm()), tokens(3, 21)
    model.train()
    wrapped(model).loss(x).loss.backward()
    want = gradients_of(model)
    checkpoint(model.lm, use_reentrant=False)
    wrapped(model).loss(x).loss.backward()
    same_gradients(gradients_of(model), want)
    checkpoint(model.lm, use_reentrant=True)
    with pytest.raises(ValueError, match='use_reentrant=True loses the gradient through the state'):
        wrapped(model.train()).loss(tokens(2, 13))
    model.eval().lm.train()  # it is the mode of each layer that counts
    with pytest.raises(ValueError, match='use_reentrant=True loses the gradient through the state'):
        wrapped(model).loss(x, backward=True)
    model.eval()
    wrapped(model).logits(x)


@both
def test_replay_draws_the_dropout_of_one_graph(make):
    lm = tiny_lm('neox', hidden_dropout=0.3, attention_dropout=0.2)
    wrapper, found = wrapped(make(lm), segments_per_pass=2).train(), []
    for backward in (False, True, False):
        torch.manual_seed(3)
        loss = wrapper.loss(tokens(3, 21), backward=backward).loss
        if not backward:
            loss.backward()
        found.append((loss.detach(), gradients_of(wrapper.model)))
        wrapper.recompute = backward  # the third time
    for loss, gradients in found[1:]:
        close(loss, found[0][0])
        same_gradients(gradients, found[0][1])
    assert (wrapper.eval().loss(tokens(3, 21)).loss - found[0][0]).abs() > 1e-3


# half types


@both
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_half_base_has_memories_in_float32(make, dtype):
    model = make(tiny_lm(dtype=dtype))
    assert model.dtype == dtype
    assert {p.dtype for name, p in model.named_parameters() if own(name)} == {torch.float32}
    wrapper, exact = wrapped(model), wrapped(make(tiny_lm()))
    exact.model.load_state_dict(model.state_dict())
    x = tokens(3, 21)
    loss, _, state = wrapper.loss(x, backward=True)
    close(loss.double(), exact.loss(x).loss, 1e-5 if dtype == torch.float32 else 3e-2)
    assert all(part.dtype == torch.float32 for part in torch.utils._pytree.tree_leaves(state))
    assert wrapper.generate_tokens([x[0, :7], x[1, :9]], 8, temperature=0.0)[0].shape == (8,)
    with torch.autocast('cpu', torch.bfloat16):
        assert wrapper.loss(x, backward=True).loss.isfinite()
        assert wrapper.generate_tokens(x[:, :7], 8, temperature=0.0).shape == (3, 8)


# generation and cursors


@both
def test_rows_are_generated_as_alone_and_go_on_from_a_file(make, tmp_path):
    wrapper = wrapped(make(tiny_lm()))
    prompts = [tokens(9), tokens(4, seed=1), tokens(13, seed=2)]
    new, cursor = wrapper.generate_tokens(prompts, 17, temperature=0.0, return_cursor=True)
    for prompt, row in zip(prompts, new, strict=True):
        logits, _ = wrapper.logits(torch.cat((prompt, row))[None])
        assert torch.equal(logits[0, len(prompt) - 1 : -1].argmax(-1), row)
    save_cursor(cursor, tmp_path / 'cursor', wrapper.model)
    again = load_cursor(tmp_path / 'cursor', wrapper.model)
    more = [wrapper.generate_tokens(None, 9, state=each, temperature=0.0) for each in (cursor, again)]
    assert all(map(torch.equal, *more))
    with torch.no_grad():
        wrapper.model.lm.get_input_embeddings().weight.add_(0.1)
    with pytest.raises(ValueError, match='made with other weights'):
        load_cursor(tmp_path / 'cursor', wrapper.model)


@both
def test_the_fingerprint_looks_at_a_sample(make, monkeypatch):
    model = make(tiny_lm())
    found = model.fingerprint()
    assert found['values'] == 4096
    json.dumps(found)


@both
@torch.no_grad()
def test_decoding_with_fixed_shapes_is_the_parallel_pass(make):
    """As compiled steps need it: tensors keep their shapes and their addresses."""
    model, x = make(tiny_lm()), tokens(3, 15)
    want = wrapped(model).logits(x)[0]
    cache = model.open_segment(model.initial_state(3), LENGTH)
    hidden = cache.extend(model, x[:, :4])
    cache.make_static()
    addresses = [tensor.data_ptr() for tensor in leaves(vars(cache))]
    found = [model.to_logits(hidden)]
    for i in range(4, 15):
        if i % LENGTH == 0:
            cache.close(model, torch.ones(3, dtype=torch.bool))
        found.append(model.to_logits(cache.extend(model, x[:, i : i + 1])))
    close(torch.cat(found, dim=1), want)
    assert [tensor.data_ptr() for tensor in leaves(vars(cache))] == addresses


# configs, files


@pytest.mark.parametrize('name', long_unless(FEW, FAMILIES))
def test_a_model_is_made_again_from_its_arguments_and_its_file(name, tmp_path):
    makers = [RecurrentMemoryLM] if name == 'gpt2' else [RecurrentMemoryLM, InfiniLM]
    for cls in makers:
        options = {'num_memory_tokens': 2} if cls is RecurrentMemoryLM else {'layers': {0}, 'memory_decay': True}
        lm = tiny_lm(name)
        lm.config._name_or_path, lm.config.secret = '/home/somebody/base', 'of the user'
        model = cls(lm, **options)
        told = json.dumps(model.arguments)
        assert not any(word in told for word in ('somebody', 'secret', transformers.__version__, 'dtype'))
        save_weights(model, tmp_path / 'weights')
        arguments = json.loads(told)
        again = cls(**arguments).double().eval()
        assert again.arguments == model.arguments
        load_weights(again, tmp_path / 'weights')
        with torch.no_grad():
            close(wrapped(again).logits(tokens(2, 13)), wrapped(model.eval()).logits(tokens(2, 13)))


def test_all_experts_of_a_mixture_decay():
    sizes = dict(vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=2, num_local_experts=4, sliding_window=None)  # fmt: skip
    lm = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**sizes))
    for model in (RecurrentMemoryLM(lm, num_memory_tokens=2), add_infini_attention(copy.deepcopy(lm))):
        decayed = {id(parameter) for parameter in model.param_groups(1.0, 0.1)[0]['params']}
        for name, parameter in model.named_parameters():
            if 'experts' in name or '.gate.' in name:
                assert id(parameter) in decayed, name
            if any(part in name for part in ('norm', 'embed', 'head_gates', 'memory')):
                assert id(parameter) not in decayed, name


@both
def test_weights_of_another_base_or_of_other_options_are_refused(make, tmp_path):
    save_weights(make(tiny_lm()), tmp_path / 'weights')
    other = make(tiny_lm(intermediate_size=40))
    with pytest.raises(ValueError, match=r'was made with lm\.intermediate_size=48, this model has 40'):
        load_weights(other, tmp_path / 'weights')
    with pytest.raises(ValueError, match=r"was made with lm\.model_type='llama', this model has 'mistral'|lm\."):
        load_weights(make(tiny_lm('mistral')), tmp_path / 'weights')


def test_the_config_of_an_older_version_means_the_same():
    """As transformers 4.57 writes it: the rotation has names of its own."""
    old = dict(model_type='gpt_neox', vocab_size=TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
               num_attention_heads=4, max_position_embeddings=128, rotary_emb_base=500.0, rotary_pct=0.5)  # fmt: skip
    config = config_of(old)
    assert plain_config(config_of(plain_config(config))) == plain_config(config)
    assert '500' in json.dumps(plain_config(config))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model_type': 'llama9'}, 'cannot be read by transformers'),
        ({'model_type': None}, 'cannot be read by transformers'),
        ({'rope_of_tomorrow': 3}, 'has rope_of_tomorrow=3, which transformers .* lacks'),
    ],
)
def test_the_config_of_a_newer_version_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RecurrentMemoryLM({**plain_config(tiny_config('llama')), **change}, num_memory_tokens=2)


# limits and what is refused


def test_the_longest_segment_is_what_positions_and_window_leave():
    assert RecurrentMemoryLM(tiny_lm(), num_memory_tokens=3).max_segment_length == 122
    assert RecurrentMemoryLM(tiny_lm('gpt2'), num_memory_tokens=0).max_segment_length == 128
    assert RecurrentMemoryLM(tiny_lm('mistral'), num_memory_tokens=3).max_segment_length == 58
    assert RecurrentMemoryLM(tiny_lm('gemma3'), num_memory_tokens=3, max_segment_length=20).max_segment_length == 20
    assert add_infini_attention(tiny_lm('qwen2')).max_segment_length == 128
    assert add_infini_attention(tiny_lm('gemma2')).max_segment_length == 64
    with pytest.raises(ValueError, match='segment_length is 65: give 1 to 64'):
        SegmentWrapper(add_infini_attention(tiny_lm('mistral')), segment_length=65)


def rotated(kind, **rope):
    """A tiny Llama whose frequencies depend on the length of a text."""
    new = int(transformers.__version__.split('.')[0]) >= 5
    rope = dict(rope_type=kind, factor=2.0, **({'rope_theta': 10000.0} if new else {}), **rope)
    return tiny_lm(max_position_embeddings=32, **{'rope_parameters' if new else 'rope_scaling': rope})


@both
@pytest.mark.parametrize('kind', ['longrope', 'dynamic'])
def test_a_segment_ends_where_other_frequencies_would_begin(make, kind):
    """Else decoding, which does not know how long the segment becomes, would differ from the parallel pass, and what
    the language model has read before would change the numbers."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[3.0, 4.0, 5.0, 6.0], original_max_position_embeddings=16)
    model = make(rotated(kind, **(factors if kind == 'longrope' else {}))).eval()
    rows = 6 if isinstance(model, RecurrentMemoryLM) else 0
    assert model.max_segment_length == (16 if kind == 'longrope' else 31) - rows
    wrapper, x = SegmentWrapper(model), tokens(2, 40)
    with torch.no_grad():
        want = wrapper.logits(x)[0]
        model.lm(input_ids=tokens(1, 60))
        close(wrapper.logits(x)[0], want)
        close(wrapper.logits(x[:, :5])[0], want[:, :5])
        close(decoded(model, x, wrapper.segment_length, ragged=False), want)


def gpt_neo(window):
    sizes = dict(vocab_size=TOKENS, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128)
    kinds = dict(attention_types=[[['global', 'local'], 1]], window_size=window)
    off = dict(resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoConfig(**sizes, **kinds, **off)).double()


def test_the_window_of_gpt_neo_holds_rows_of_different_lengths():
    """It is counted from the end of the buffer, where only the row ends that is longest."""
    model = RecurrentMemoryLM(gpt_neo(16), num_memory_tokens=2).eval()
    assert model.max_segment_length == 16 - 1 - 4
    x = tokens(3, 25)
    with torch.no_grad():
        want = SegmentWrapper(model).logits(x)[0]
        close(decoded(model, x, 11, ragged=True), want)


def test_a_family_that_cannot_decode_rows_of_different_lengths_is_refused(monkeypatch):
    """Though one row alone works: for example XGLM of transformers 5, and this one."""
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer

    def forward(self, *arguments, plain=layer.forward, **options):
        mask = options.get('attention_mask')
        if mask is not None and len(mask) > 1:
            options['attention_mask'] = mask[:1].expand_as(mask)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(layer, 'forward', forward)
    with pytest.raises(ValueError, match='is not supported: read with a cache, a segment gives numbers that differ'):
        RecurrentMemoryLM(tiny_lm(), num_memory_tokens=2)


@both
def test_a_vocabulary_that_is_resized_is_that_of_the_model(make, tmp_path):
    model = make(tiny_lm())
    model.lm.resize_token_embeddings(TOKENS + 4)
    assert model.num_tokens == TOKENS + 4
    x = tokens(2, 13)
    x[0, 0] = TOKENS + 2
    assert wrapped(model).loss(x).loss.isfinite()
    assert wrapped(model).generate_tokens(x, 3, repetition_penalty=1.2).shape == (2, 3)
    save_weights(model, tmp_path / 'weights')
    save_cursor(wrapped(model).read(x), tmp_path / 'cursor', model)
    other = tiny_lm()
    other.resize_token_embeddings(TOKENS + 4)
    load_weights(make(other), tmp_path / 'weights')
    model.save_pretrained(tmp_path / 'folder')
    load_cursor(tmp_path / 'cursor', model)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / 'folder')
        close(wrapped(again).logits(x)[0], wrapped(model.eval()).logits(x)[0])


@both
@pytest.mark.parametrize('shared', [True, False])
def test_a_folder_that_could_not_be_loaded_is_not_written(make, shared, tmp_path):
    model = make(tiny_lm(tie_word_embeddings=not shared))
    weight = model.lm.get_input_embeddings().weight
    model.lm.get_output_embeddings().weight = weight if shared else torch.nn.Parameter(weight.detach().clone())
    with pytest.raises(ValueError, match=f'says tie_word_embeddings={not shared}, by which the folder is loaded'):
        model.save_pretrained(tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    model.lm.config.tie_word_embeddings = shared
    model.save_pretrained(tmp_path / 'new')
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path / 'new')
        close(wrapped(again).logits(tokens(2, 13))[0], wrapped(model.eval()).logits(tokens(2, 13))[0])


@both
@pytest.mark.parametrize('padding', [None, 3])
def test_the_padding_of_the_embeddings_is_kept_and_not_that_of_texts(make, padding, tmp_path):
    """The row of the former gets no gradient. Scripts set the latter later, to another id."""
    save_weights(make(tiny_lm(pad_token_id=padding)), tmp_path / 'weights')
    lm = tiny_lm(pad_token_id=padding)
    lm.config.pad_token_id = 2
    model = make(lm)
    load_weights(model, tmp_path / 'weights')
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for each in (model, again):
        wrapped(each).loss(torch.tensor([[2, 3, 5, 2, 3, 6, 2, 3]]), backward=True)
    for name in (2, 3):
        old, new = (each.lm.get_input_embeddings().weight.grad[name] for each in (model, again))
        close(new, old)
    assert again.lm.get_input_embeddings().padding_idx == padding


def prompt_tuned():
    peft = pytest.importorskip('peft', reason='needs peft')
    config = peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3)
    with warnings.catch_warnings():  # of transformers, about a name that peft uses
        warnings.simplefilter('ignore')
        return peft.get_peft_model(tiny_lm(dtype=torch.float32), config)


BAD_RMT = [
    (lambda: tiny_lm(), {'num_memory_tokens': 64}, 'leave no room for text: LlamaForCausalLM has max_position_emb'),
    (lambda: tiny_lm('mistral'), {'num_memory_tokens': 32}, 'MistralForCausalLM has sliding_window=64, use fewer'),
    (lambda: tiny_lm('mistral'), {'max_segment_length': 59}, 'max_segment_length is 59: .*sliding_window=64.*1 to 58'),
    (lambda: tiny_lm(), {'max_segment_length': 0}, 'max_segment_length is 0'),
    (lambda: prompt_tuned(), {}, 'makes logits of shape|is not supported: it cannot read embeddings'),
    (lambda: tiny_lm(), {'num_memory_tokens': -1}, 'num_memory_tokens is -1'),
]


@pytest.mark.parametrize(('make_lm', 'options', 'message'), BAD_RMT)
def test_a_memory_that_does_not_fit_is_refused(make_lm, options, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        RecurrentMemoryLM(make_lm(), **{'num_memory_tokens': 3, **options})


BERT = dict(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
OTHERS = {
    'encoder': (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        'BertForMaskedLM (is no causal language model|is not supported|has no attention with rotary positions)',
    ),
    'no head': (lambda: tiny_lm().model, 'LlamaModel has no head that makes logits|has no decoder under a head'),
    'encoder-decoder': (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=TOKENS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        'T5ForConditionalGeneration is an encoder-decoder',
    ),
    'state-space': (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
        'MambaForCausalLM does not take position_ids.*state-space',
    ),
    'no model': (lambda: 3, 'lm is a int: give what AutoModelForCausalLM'),
    'meta': (lambda: tiny_lm().to('meta'), 'the model is on the meta device'),
}


@both
@pytest.mark.parametrize(('make_lm', 'message'), OTHERS.values(), ids=OTHERS.keys())
def test_models_of_other_kinds_are_refused_by_name(make, make_lm, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        make(make_lm())


@both
def test_attention_that_takes_no_masks_is_refused(make):
    lm = tiny_lm()
    lm.config._attn_implementation = 'flex_attention'
    with pytest.raises(ValueError, match=r"has the attention 'flex_attention'.*set_attn_implementation\('sdpa'\)"):
        make(lm)


BAD_INFINI = [
    (tiny_lm, {'layers': []}, r'layers are \[\]: give one or more numbers from 0 to 1'),
    (tiny_lm, {'layers': [2]}, r'layers are \[2\]: give one or more numbers from 0 to 1'),
    (tiny_lm, {'memory_rule': 'hebb'}, "memory_rule is 'hebb'"),
    (tiny_lm, {'head_gate_init_value': float('nan')}, 'head_gate_init_value is nan'),
    (lambda: tiny_lm('gpt2'), {}, 'GPT2LMHeadModel has no attention with rotary positions'),
]


@pytest.mark.parametrize(('make_lm', 'options', 'message'), BAD_INFINI)
def test_a_memory_that_infini_attention_cannot_add_leaves_the_model_unchanged(make_lm, options, message):
    lm = make_lm()
    check_unchanged(lm, options, message)


def check_unchanged(lm, options, message):
    x, before = tokens(2, 9), {name: id(parameter) for name, parameter in lm.named_parameters()}
    logits, attention = lm(x).logits, lm.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        add_infini_attention(lm, **options)
    assert {name: id(parameter) for name, parameter in lm.named_parameters()} == before
    assert lm.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks for module in lm.modules())
    assert torch.equal(lm(x).logits, logits)


def test_a_family_whose_attention_does_not_fit_is_given_back_unchanged(monkeypatch):
    """A family that cannot be given a rotation by nothing, made of Llama."""
    family = sys.modules['transformers.models.llama.modeling_llama']
    rotate = family.apply_rotary_pos_emb

    def only_true_rotations(q, k, cos, sin, **options):
        if (cos == 1).all():
            raise RuntimeError('no rotation')
        return rotate(q, k, cos, sin, **options)

    monkeypatch.setattr(family, 'apply_rotary_pos_emb', only_true_rotations)
    lm = tiny_lm()
    check_unchanged(lm, {}, 'LlamaForCausalLM is not supported.*no rotation')
    RecurrentMemoryLM(lm, num_memory_tokens=2)  # whose memory does not look inside


def test_distances_that_attention_counts_by_itself_are_found_before_generation():
    """Falcon with alibi reads a segment at once with embeddings and positions, but not with a mask of its own."""
    config = transformers.FalconConfig(vocab_size=TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                       alibi=True)  # fmt: skip
    lm = transformers.FalconForCausalLM(config).double().eval()
    with pytest.raises(ValueError, match='FalconForCausalLM is not supported'):
        RecurrentMemoryLM(lm, num_memory_tokens=2)


@both
def test_a_segment_longer_than_the_model_can_read_is_refused(make):
    model = make(tiny_lm('mistral', sliding_window=16))
    limit = model.max_segment_length
    model.advance(tokens(1, limit))
    with pytest.raises(ValueError, match=f'a segment of {limit + 1} tokens: .* max_segment_length={limit}'):
        model.advance(tokens(1, limit + 1))


def test_the_language_model_of_another_retrofit_is_refused():
    lm = tiny_lm()
    model = RecurrentMemoryLM(lm, num_memory_tokens=2)
    check_unchanged(lm, {}, 'LlamaForCausalLM is inside a RecurrentMemoryLM')
    del model
    gc.collect()
    add_infini_attention(lm)


@both
@pytest.mark.filterwarnings('ignore')
def test_a_compiled_model_is_refused(make):
    with pytest.raises(ValueError, match=r'compiled by torch\.compile\(lm\), whose weights have other names'):
        make(torch.compile(tiny_lm()))


@both
def test_a_model_with_nan_is_refused_as_such(make):
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match='LlamaForCausalLM makes logits that are not finite: look at its weights'):
        make(lm)


@both
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_small_difference_of_the_logits_is_found_in_half_precision_too(make, dtype, monkeypatch):
    """A twentieth of their size, as where a layer that should not rotate rotates."""
    to_logits = decoder.PretrainedLM.to_logits
    monkeypatch.setattr(decoder.PretrainedLM, 'to_logits', lambda self, hidden: 1.05 * to_logits(self, hidden))
    with pytest.raises(ValueError, match=r'its logits differ by 0\.05 of their size'):
        make(tiny_lm().to(dtype))


def test_a_model_of_texts_and_images_goes_into_files_and_comes_back(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=TOKENS, head_dim=8, num_key_value_heads=2, sliding_window=16, **sizes)
    images = dict(image_size=28, patch_size=14, **sizes)
    config = transformers.Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    lm, x = transformers.AutoModelForCausalLM.from_config(config), tokens(2, 13)
    model = RecurrentMemoryLM(lm, num_memory_tokens=2)
    save_weights(model, tmp_path / 'weights')
    load_weights(model, tmp_path / 'weights')
    save_cursor(wrapped(model).read(x), tmp_path / 'cursor', model)
    load_cursor(tmp_path / 'cursor', model)
    model.save_pretrained(tmp_path / 'folder')
    again = RecurrentMemoryLM.from_pretrained(tmp_path / 'folder')
    with torch.no_grad():
        close(wrapped(again).logits(x)[0], wrapped(model.eval()).logits(x)[0])


def test_a_second_memory_is_refused():
    lm = tiny_lm()
    add_infini_attention(lm)
    for make in MAKERS.values():
        with pytest.raises(ValueError, match='LlamaForCausalLM has a memory in its attention already'):
            make(lm)


def test_attention_that_was_changed_later_is_refused():
    lm, x = tiny_lm(), tokens(2, 9)
    wrapper = wrapped(add_infini_attention(lm))
    want = wrapper.logits(x)[0]
    lm.set_attn_implementation('eager')
    with pytest.raises(ValueError, match=r"changed to 'eager', .*set_attn_implementation\('infini_sdpa'\)"):
        wrapper.logits(x)
    lm.set_attn_implementation('infini_sdpa')
    assert torch.equal(wrapper.logits(x)[0], want)
    lm = tiny_lm()
    wrapper = wrapped(RecurrentMemoryLM(lm, num_memory_tokens=2))
    lm.config._attn_implementation = 'flex_attention'
    with pytest.raises(ValueError, match="has the attention 'flex_attention', which takes no masks of rows"):
        wrapper.logits(x)


def test_a_head_with_more_than_a_weight_is_refused(monkeypatch):
    monkeypatch.setattr(decoder.PretrainedLM, 'to_logits', lambda self, hidden: 2 * self.lm.lm_head(hidden))
    with pytest.raises(ValueError, match='LlamaForCausalLM is not supported: its logits differ by'):
        RecurrentMemoryLM(tiny_lm(), num_memory_tokens=2)


# folders, graphs and environments


@both
def test_a_folder_keeps_the_dtype_of_each_weight(make, tmp_path):
    """A base in bfloat16 has a memory in float32. Both come back as they were."""
    model = make(tiny_lm().to(torch.bfloat16))
    model.save_pretrained(tmp_path / 'folder')
    again = type(model).from_pretrained(tmp_path / 'folder')
    want, have = model.state_dict(), again.state_dict()
    assert {tensor.dtype for tensor in want.values()} == {torch.bfloat16, torch.float32}
    assert all(have[name].dtype == tensor.dtype and torch.equal(have[name], tensor) for name, tensor in want.items())
    code = (tmp_path / 'folder' / 'README.md').read_text().split('```python\n')[1].split('```')[0]
    names = {}
    exec(code.replace("'NAME'", repr(str(tmp_path / 'folder'))), names)
    assert torch.equal(next(names['model'].parameters()), next(model.parameters()))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@both
def test_adapters_are_not_written_to_a_folder_that_cannot_be_loaded(make, tmp_path):
    peft = pytest.importorskip('peft')
    lm = peft.get_peft_model(tiny_lm(), peft.LoraConfig(target_modules=['q_proj'], r=2))
    with pytest.raises(ValueError, match=r'has adapters of peft.*trained_only=True'):
        make(lm).save_pretrained(tmp_path / 'folder')
    assert not (tmp_path / 'folder').exists()


def test_two_models_of_one_config(tmp_path):
    """The attention is named in the config: a memory in one model changes no other model of the same config."""
    first = tiny_lm()
    twin, second = type(first)(first.config).double(), type(first)(first.config).double()
    with_memory = add_infini_attention(first)
    assert twin.config._attn_implementation == 'sdpa'
    twin.set_attn_implementation('eager')
    add_infini_attention(second)
    RecurrentMemoryLM(twin, num_memory_tokens=2)
    x = tokens(2, 13)
    assert wrapped(with_memory).loss(x).loss.isfinite()


@both
def test_no_graph_of_a_retrofit(make):
    from segment_recurrence_pytorch.export import export_segment

    model = make(tiny_lm())
    with pytest.raises(ValueError, match=rf'{type(model).__name__} cannot be a graph: the code of transformers'):
        export_segment(model)


@both
def test_an_unknown_argument_of_the_call_is_not_blamed_on_the_file(make, tmp_path):
    model = make(tiny_lm())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"from_pretrained was given 'torch_dtype', which"):
        type(model).from_pretrained(tmp_path, torch_dtype='auto')


def test_a_missing_extra_says_what_to_install():
    wanted = [
        ('recurrent_memory_transformer_pytorch.huggingface', 'transformers', 'hf'),
        ('infini_transformer_pytorch.huggingface', 'transformers', 'hf'),
        ('segment_recurrence_pytorch.huggingface.trainer', 'transformers', 'hf'),
        ('segment_recurrence_pytorch.huggingface.evaluation', 'lm_eval', 'eval'),
    ]
    code = [
        'import importlib, sys',
        f'for module, missing, _ in {wanted}:',
        '    sys.modules[missing] = None',
        '    try:',
        '        importlib.import_module(module)',
        '    except ImportError as error:',
        '        print(error)',
        '    del sys.modules[missing]',
    ]
    done = subprocess.run([sys.executable, '-c', '\n'.join(code)], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == len(wanted)
    for line, (_, missing, extra) in zip(said, wanted, strict=True):
        assert f"needs the package {missing}: pip install 'segment-recurrence-pytorch[{extra}]'" in line
