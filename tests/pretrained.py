"""Tiny pretrained-like models with random weights of ordinary size, one of each family, and helpers for their tests."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')

TOKENS = 40
SIZES = dict(vocab_size=TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
GROUPED = {**SIZES, 'num_key_value_heads': 2, 'head_dim': 8}
GEMMA = {**GROUPED, 'sliding_window': 64, 'query_pre_attn_scalar': 8}
FAMILIES = {
    'gpt2': ('GPT2', dict(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0,
                          embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)),
    'neox': ('GPTNeoX', dict(**SIZES, hidden_dropout=0.0, attention_dropout=0.0)),
    'llama': ('Llama', GROUPED),
    'mistral': ('Mistral', {**GROUPED, 'sliding_window': 64}),
    'phi': ('Phi', dict(**SIZES, num_key_value_heads=2)),
    'qwen2': ('Qwen2', GROUPED),
    'qwen3': ('Qwen3', GROUPED),
    'gemma': ('Gemma', GROUPED),
    'gemma2': ('Gemma2', GEMMA),
    'gemma3': ('Gemma3Text', {**GEMMA, 'layer_types': ['sliding_attention', 'full_attention']}),
}  # fmt: skip
FEW = 'gpt2', 'llama', 'gemma3'  # the others are run by `make test-hf`
ROTARY = [name for name in FAMILIES if name != 'gpt2']
LENGTH = 6  # of a segment


def families(cases):
    """Parameters of a test: the name of a family, and of its attention or ''."""
    given = [
        pytest.param(
            *case, id=' '.join(case).strip(), marks=() if case in [(name, '') for name in FEW] else pytest.mark.long
        )
        for case in cases
    ]
    return pytest.mark.parametrize(('name', 'attention'), given)


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """The eager attention of `transformers` computes its softmax in float32, which each CPU rounds in its own way."""
    softmax = torch.nn.functional.softmax

    def exact(x, *args, dtype=None, **more):
        return softmax(x, *args, dtype=x.dtype if x.dtype == torch.float64 else dtype, **more)

    monkeypatch.setattr(torch.nn.functional, 'softmax', exact)


def config_of(name, **options):
    """The config of a tiny model."""
    kind, sizes = FAMILIES[name]
    return getattr(transformers, f'{kind}Config')(**{**sizes, **options})


def tiny_lm(name='llama', attention='', dtype=torch.float64, seed=0, **options):
    """A tiny model in evaluation mode, with weights that make each position matter. The soft cap of Gemma 2 needs eager
    attention."""
    torch.manual_seed(seed)
    attention = attention or ('eager' if name == 'gemma2' else 'sdpa')
    lm = transformers.AutoModelForCausalLM.from_config(config_of(name, **options), attn_implementation=attention)
    lm = lm.to(dtype)
    with torch.no_grad():
        for path, parameter in lm.named_parameters():
            if 'norm' in path or 'ln_' in path:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                is_table = any(part in path for part in ('embed', 'wte', 'wpe'))
                parameter.normal_(std=0.5 if is_table else parameter.shape[1] ** -0.5)
    return lm.eval()


def tokens(*shape, seed=0):
    """Random token ids."""
    return torch.randint(0, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


def gradients_of(model):
    """The gradients of all parameters by name; zeros for those without. They are cleared."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def decoded(model, x, length, ragged):
    """The logits of token by token decoding, (b, n, num_tokens). If ragged, rows append tokens at different steps."""
    rows, n = x.shape
    cache = model.open_segment(model.initial_state(rows), length)
    logits = x.new_zeros(rows, n, model.num_tokens, dtype=model.dtype)
    at = [0] * rows
    step = 0
    while min(at) < n:
        lengths = torch.tensor([int(at[r] < n and (not ragged or step % (r + 1) == 0)) for r in range(rows)])
        full = torch.tensor([bool(lengths[r]) and at[r] > 0 and at[r] % length == 0 for r in range(rows)])
        if full.any():
            cache.close(model, full if ragged else None)
        new = x[range(rows), [min(each, n - 1) for each in at]][:, None]
        hidden = cache.extend(model, new, lengths if ragged else None)
        for r in range(rows):
            if lengths[r]:
                logits[r, at[r]] = model.to_logits(hidden)[r, 0]
                at[r] += 1
        step += 1
    return logits
