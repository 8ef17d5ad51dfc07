"""A pretrained causal language model of Hugging Face `transformers` as a `SegmentModel`: what both retrofits share.

No line of a model's code is copied or replaced. The decoder is called with embeddings, positions, a mask and sometimes
a cache. A trial at construction compares what comes out with the model's own logits, and refuses what differs.

Letters: b rows of the batch, n tokens, i queries, j keys.
"""

from __future__ import annotations

import inspect
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.cache import SegmentCache, Slots
from segment_recurrence_pytorch.checks import check_count, check_has_weights, needs_extra
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import leaves, map_state

try:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise needs_extra('a pretrained language model', 'hf', error) from error

BACKENDS = ('sdpa', 'eager')  # the attention implementations that take a mask of their own for each row
# entries of a config that do not change what the model computes: where it came from, and what made it
NOT_RECORDED = ('_name_or_path', 'transformers_version', 'dtype', 'torch_dtype', 'architectures', 'use_cache')
# the same of the settings of adapters
NOT_OF_ADAPTERS = ('base_model_name_or_path', 'revision', 'inference_mode', 'task_type', 'peft_version', 'auto_mapping')
# entries of older configs, which transformers 5 reads into `rope_parameters`
OLD_NAMES = ('rope_theta', 'rope_scaling', 'rope_local_base_freq', 'partial_rotary_factor', 'rotary_pct',
             'rotary_emb_base')  # fmt: skip

# each living `RecurrentMemoryLM`, by the identity of its decoder, whose attention must not get a memory as well
WITH_MEMORY_TOKENS: weakref.WeakValueDictionary[int, PretrainedLM] = weakref.WeakValueDictionary()


class PretrainedLM(SegmentModel):
    """The base class of the retrofits: a causal language model, called by its decoder and its head.

    All parameters can be trained, or a part of them: freeze the others with `requires_grad_(False)`, or apply `peft` to
    the language model before it is given to this class. The fingerprint of a cursor looks at a sample of each weight,
    since reading billions of them takes minutes.

    Args:
        lm: what `AutoModelForCausalLM.from_pretrained` returned, or its PEFT model. Or a dict, as `arguments` holds it:
            a model with this config and random weights is then made.

    Attributes:
        lm: the language model.

    Raises:
        ValueError: if it is no decoder-only language model that can be called in this way.
    """

    causal = True
    can_export = False
    fingerprint_values = 4096

    def __init__(self, lm: Any):
        super().__init__()
        if isinstance(lm, dict):
            config = config_of(lm)
            # the attention that is the default of older transformers ignores the soft cap of Gemma 2
            capped = getattr(config, 'attn_logit_softcapping', None)
            lm = AutoModelForCausalLM.from_config(config, **({'attn_implementation': 'eager'} if capped else {}))
        check_lm(lm)
        self.lm = lm
        takes = inspect.signature(self.decoder.forward).parameters
        self._cache_name = 'cache' if 'cache' in takes else 'past_key_values'  # its name in older transformers
        self.dim = self.config.hidden_size

    @property
    def config(self) -> Any:
        """The config of the language model."""
        return self.lm.config.get_text_config()

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        """Size of the vocabulary. `lm.resize_token_embeddings` changes it."""
        return len(self.lm.get_output_embeddings().weight)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return decoder_of(self.lm)

    @property
    def device(self) -> torch.device:
        """See `SegmentModel.device`. It is that of the embeddings."""
        return self.lm.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """See `SegmentModel.dtype`. It is that of the embeddings, since other weights may be quantised."""
        return self.lm.get_input_embeddings().weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns embeddings (..., n, dim).

        Args:
            tokens: token ids (..., n), or embeddings (..., n, dim), which are only converted to the dtype of the model.
        """
        return tokens.to(self.dtype) if tokens.is_floating_point() else self.lm.get_input_embeddings()(tokens)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """See `SegmentModel.to_logits`. The soft cap of Gemma's logits stands outside its head."""
        logits = self.lm.get_output_embeddings()(hidden)
        cap = getattr(self.config, 'final_logit_softcapping', None)
        return logits if cap is None else (logits / cap).tanh() * cap

    @property
    def arguments(self) -> dict[str, Any]:
        """See `SegmentModel.arguments`. The language model is described as it is now, with the adapters of `peft`: its
        vocabulary may have been resized, and adapters added."""
        found = {**self._arguments, 'lm': self.recorded_argument('lm', self.lm)}
        if hasattr(self.lm, 'peft_config'):
            found['adapters'] = plain_adapters(self.lm)
        return found

    @arguments.setter
    def arguments(self, value: dict[str, Any]) -> None:
        """Sets what the constructors were given."""
        self._arguments = value

    def decode(
        self, x: Tensor, positions: Tensor, mask: Tensor | None = None, *, cache: Any = None, **options: Any
    ) -> Tensor:
        """Returns what the decoder makes of embeddings, after its final norm, (b, n, dim).

        Args:
            x: embeddings (b, n, dim).
            positions: the position of each of them, (1, n) or (b, n).
            mask: which keys each query may attend to, (1 or b, 1, i, j) bool. Default: None, causal.
            cache: a cache of transformers. Default: None.
            options: further arguments of the decoder.

        Raises:
            ValueError: if the model was changed so that training it would be silently wrong.
        """
        if torch.is_grad_enabled() and any(module.training for module in self.modules()):
            self.check_training()
        if mask is not None and self.attention.endswith('eager'):  # eager attention adds the mask, whatever its dtype
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
        positions = positions.expand(len(x), -1)
        if cache is not None:
            options[self._cache_name] = cache
        options['use_cache'] = cache is not None
        return self.decoder(inputs_embeds=x, attention_mask=mask, position_ids=positions, **options).last_hidden_state

    @property
    def attention(self) -> str:
        """The name of the attention implementation."""
        return self.config._attn_implementation

    def check_training(self) -> None:
        """Raises ValueError if the model was changed so that training it would be silently wrong."""
        self.check_adapters()
        for module in self.lm.modules():
            if getattr(module, 'gradient_checkpointing', False):
                function = getattr(module, '_gradient_checkpointing_func', None)
                if getattr(function, 'keywords', {}).get('use_reentrant', True):
                    raise ValueError(
                        'gradient checkpointing with use_reentrant=True loses the gradient through the state: turn it '
                        'off, and use SegmentWrapper(recompute=True) or loss(backward=True), or turn it on with '
                        'use_reentrant=False'
                    )

    def check_adapters(self) -> None:
        """Raises ValueError if `peft` was applied to this model instead of to the language model in it."""
        if hasattr(self, 'peft_config'):
            raise ValueError(
                'peft was applied to the model with the memory, and has frozen the memory: apply it to the language '
                'model, before the memory is added'
            )

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """See `SegmentModel.decays`. All matrices of the language model but embeddings do, whatever their class: GPT-2
        has linear layers of its own, and mixtures of experts have a tensor for all experts."""
        path, _, attribute = name.rpartition('.')
        if not name.startswith('lm.') or '.infini.' in name:  # the memory
            return attribute == 'weight' and isinstance(self.get_submodule(path), nn.Linear)
        is_matrix = parameter.ndim > 2 or (parameter.ndim == 2 and attribute == 'weight')
        return is_matrix and not isinstance(self.get_submodule(path), nn.Embedding)

    def save_pretrained(self, folder: str | Path, *, run: str | Path | None = None) -> None:
        """See `SegmentModel.save_pretrained`. The whole language model is written. Its config cannot tell of adapters.

        Raises:
            ValueError: if `peft` has put adapters into the language model, or if its head and its embeddings share a
                weight or not, and its config says otherwise.
        """
        self.check_adapters()
        if hasattr(self.lm, 'peft_config'):
            raise ValueError(
                'the language model has adapters of peft, which config.json cannot tell: write them and the memory '
                'with `checkpoint.save_weights(model, path, trained_only=True)`, or merge them (merge_and_unload) '
                'before the memory is added'
            )
        shared = self.lm.get_output_embeddings().weight is self.lm.get_input_embeddings().weight
        if shared != bool(self.config.tie_word_embeddings):
            raise ValueError(
                f'head and embeddings share {"one weight" if shared else "no weight"}, but the config of the language '
                f'model says tie_word_embeddings={self.config.tie_word_embeddings}, by which the folder is loaded: set '
                'the right one'
            )
        super().save_pretrained(folder, run=run)

    def recorded_argument(self, name: str, value: Any) -> Any:
        """See `SegmentModel.recorded_argument`. The language model is recorded by its config, without paths, versions
        and dtype."""
        if name != 'lm':
            return super().recorded_argument(name, value)
        # the id that embeddings treat as padding, whose row gets no gradient: the user may set another one for texts
        padding = getattr(self.lm.get_input_embeddings(), 'padding_idx', None)
        whole, told = self.lm.config, plain_config(self.lm.config)
        # a model of texts and images, such as Gemma 3, has a config for its language model in its own
        inner = next((name for name, part in vars(whole).items() if part is self.config), None)
        if inner is None:
            return {**told, 'pad_token_id': padding}
        return {**told, inner: {**told[inner], 'pad_token_id': padding}}

    def as_arguments(self, saved: dict[str, Any]) -> dict[str, Any]:
        """See `SegmentModel.as_arguments`. The config is read as this version of transformers reads it.

        Raises:
            ValueError: if a newer version of transformers made it.
        """
        if not isinstance(saved.get('lm'), dict):
            return saved
        read = plain_config(config_of(saved['lm']))
        keep_padding(saved['lm'], read)
        return {**saved, 'lm': read}

    def check_length(self, length: int) -> None:
        """Raises ValueError if a segment is longer than the model can read.

        Args:
            length: number of tokens of the segment.
        """
        if self.max_segment_length is not None and length > self.max_segment_length:
            raise ValueError(
                f'a segment of {length} tokens: this model reads at most max_segment_length={self.max_segment_length}'
            )

    def longest_segment(self, given: int | None, rows: int) -> int | None:
        """Returns the longest segment that the model can read: what its positions and its sliding window hold.

        Args:
            given: a smaller limit that the user gave, or None.
            rows: number of rows that stand in front of and behind the text.

        Raises:
            ValueError: if nothing is left for the text, or if `given` is larger than what is left.
        """
        check_count('max_segment_length', given)
        layers = getattr(self.config, 'layer_types', None)
        names = ['max_position_embeddings']
        if layers is None or 'sliding_attention' in layers:
            names.append('sliding_window')
        sizes = [(getattr(self.config, name, None), name) for name in names] + limits_of_rotation(self.config)
        if 'local' in getattr(self.config, 'attention_layers', ()):  # GPT-Neo counts its window from the last key
            sizes.append((self.config.window_size - 1, 'window_size - 1'))
        size, name = min(((size, name) for size, name in sizes if size), default=(None, ''))
        if size is None:
            return given
        lm = type(self.lm).__name__
        if size <= rows:
            raise ValueError(f'{rows} rows of memory leave no room for text: {lm} has {name}={size}, use fewer')
        if given is not None and given > size - rows:
            raise ValueError(
                f'max_segment_length is {given}: {lm} has {name}={size}, and {rows} rows are memory: give 1 to '
                f'{size - rows}'
            )
        return given or size - rows


def limits_of_rotation(config: Any) -> list[tuple[int | None, str]]:
    """Returns how many positions can be rotated by the same frequencies, and what says so, for each kind of rotation
    that takes other ones for longer texts.

    Args:
        config: the config of a language model.
    """
    told = getattr(config, 'rope_parameters', None) or getattr(config, 'rope_scaling', None) or {}
    kinds = [each for each in told.values() if isinstance(each, dict)]  # one for each kind of layer
    limits: list[tuple[int | None, str]] = []
    for kind in kinds or [told]:
        name = kind.get('rope_type', kind.get('type'))
        if name == 'longrope':
            key = 'original_max_position_embeddings'
            limits.append((kind.get(key) or getattr(config, key, None), key))
        elif name == 'dynamic':  # goes back to the first frequencies below this length only
            limits.append((config.max_position_embeddings - 1, 'max_position_embeddings - 1'))
    return limits


def next_rows(cache: SegmentCache, slots: Slots) -> tuple[Tensor, Tensor]:
    """Returns the positions of the next tokens of open segments, (1 or b, n), and which keys in the buffers of the
    cache they may attend to, (1 or b, 1, n, j) bool.

    Args:
        cache: the cache of the open segments.
        slots: where the tokens go.
    """
    if slots.columns is not None:
        mask = cache.mask(slots)
        assert mask is not None
        return cache.prefix + slots.columns.clamp_max(cache.length - 1), mask
    assert slots.start is not None
    device, first = cache.positions.device, cache.prefix + slots.start
    end = first + slots.tokens
    mask = torch.ones(1, 1, slots.tokens, end, dtype=torch.bool, device=device).tril(first)
    return torch.arange(first, end, device=device)[None], mask


def decoder_of(lm: Any) -> nn.Module:
    """Returns the language model without its head and without the wrapper of `peft`.

    Raises:
        ValueError: if there is none.
    """
    # not get_decoder(): GPT-2 returns itself in transformers 4.57. Not base_model: peft has one of its own
    inner = lm.get_base_model() if hasattr(lm, 'get_base_model') else lm
    for name in (getattr(inner, 'base_model_prefix', ''), 'model', 'transformer'):  # Gemma3's prefix is wrong in 4.57
        if name and isinstance(getattr(inner, name, None), nn.Module):
            return getattr(inner, name)
    raise ValueError(f'{type(inner).__name__} has no decoder under a head: give an AutoModelForCausalLM')


def check_lm(lm: Any) -> None:
    """Raises ValueError, with what it is, unless something is a causal language model that the retrofits can call."""
    name = type(lm).__name__
    if hasattr(lm, '_orig_mod'):
        raise ValueError(
            'lm was compiled by torch.compile(lm), whose weights have other names: give the model as it was. '
            '`lm.model.compile()` compiles its decoder in place'
        )
    if not all(hasattr(lm, each) for each in ('parameters', 'config', 'get_output_embeddings')):
        raise ValueError(f'lm is a {name}: give what AutoModelForCausalLM.from_pretrained returned')
    check_has_weights(lm)
    if getattr(lm.config, 'is_encoder_decoder', False):
        raise ValueError(f'{name} is an encoder-decoder: give a decoder-only language model')
    head = lm.get_output_embeddings()
    if head is None or not hasattr(head, 'weight'):
        raise ValueError(f'{name} has no head that makes logits: give an AutoModelForCausalLM')
    takes = inspect.signature(decoder_of(lm).forward).parameters
    missing = [each for each in ('inputs_embeds', 'attention_mask', 'position_ids') if each not in takes]
    if missing:
        raise ValueError(
            f'{name} does not take {", ".join(missing)}: a state-space or recurrent model, or one whose attention '
            'counts distances by itself, is not supported'
        )
    kinds = set(getattr(lm.config.get_text_config(), 'layer_types', None) or ())
    if other := sorted(kinds - {'full_attention', 'sliding_attention'}):
        raise ValueError(f'{name} has layers of the kind {other[0]}: only full and sliding attention are supported')
    if lm.config.get_text_config()._attn_implementation.startswith('infini'):
        raise ValueError(f'{name} has a memory in its attention already: give the model as it was loaded')
    check_backend(lm)


def check_backend(lm: Any) -> None:
    """Raises ValueError unless the attention of a language model takes masks of rows."""
    backend = lm.config.get_text_config()._attn_implementation
    if backend not in BACKENDS:
        raise ValueError(
            f'{type(lm).__name__} has the attention {backend!r}, which takes no masks of rows: call '
            f"set_attn_implementation('sdpa') first, or 'eager'"
        )


@torch.no_grad()
def check_same_logits(model: PretrainedLM, hidden: Any) -> None:
    """Raises ValueError unless the retrofit computes the model's own logits, and a causal model's.

    Args:
        model: the retrofit.
        hidden: a function from token ids (b, n) to what the head is given, (b, n, dim).
    """
    name = type(model.lm).__name__
    ids = torch.arange(min(32, model.max_segment_length or 32), device=model.device).view(1, -1) % model.num_tokens
    changed = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % model.num_tokens), dim=1)
    with evaluating(model):
        try:
            want = model.lm(input_ids=ids).logits
            have, other = (model.to_logits(hidden(each)) for each in (ids, changed))
        except Exception as error:  # the family's own code may fail in any way
            raise ValueError(f'{name} is not supported: it cannot read embeddings: {error!r}') from error
    if want.shape != have.shape:
        raise ValueError(
            f'{name} is not supported: it makes logits of shape {tuple(want.shape)} for ids of shape {tuple(ids.shape)}'
        )
    if not want.isfinite().all():
        raise ValueError(f'{name} makes logits that are not finite: look at its weights')
    eps = torch.finfo(want.dtype if want.dtype == have.dtype else torch.float16).eps
    limit = eps**0.5 * want.abs().max()
    if ids.shape[1] > 1 and not (have[:, :-1] - other[:, :-1]).abs().max() <= limit:
        raise ValueError(f'{name} is no causal language model: a position sees later ones')
    difference = (want.double() - have.double()).norm() / want.double().norm()
    # the same operations are called in the same order, so that there is hardly any rounding to allow for
    if not difference <= max(4 * eps, 1e-4):
        raise ValueError(
            f'{name} is not supported: its logits differ by {difference:.2g} of their size from those of its decoder '
            'and head'
        )


@torch.no_grad()
def check_same_when_cached(model: PretrainedLM) -> None:
    """Raises ValueError unless a segment that is read in two parts, with a cache, gives what it gives when it is read
    at once: hidden states, and the state after it. It is tried with one row, and with two whose parts differ in length.

    Args:
        model: the retrofit.
    """
    name = type(model.lm).__name__
    length = min(4, model.max_segment_length or 4)
    ids = torch.arange(length, device=model.device).view(1, -1) % model.num_tokens
    with evaluating(model):
        state = model.initial_state(1)
        try:
            want = model.advance(ids, state)
            cache = model.open_segment(state, length)
            hidden = torch.cat([cache.extend(model, part) for part in ids.split(max(1, length - 1), dim=1)], dim=1)
            cache.close(model)
            both = model.open_segment(model.initial_state(2), length)
            first = both.extend(model, ids.expand(2, -1), torch.tensor([length, length - 1], device=model.device))
            last = both.extend(model, ids[:, -1:].expand(2, -1), torch.tensor([0, 1], device=model.device))
            ragged = torch.stack((first[0], torch.cat((first[1, :-1], last[1]))))
            both.close(model)
        except Exception as error:  # as above
            raise ValueError(f'{name} is not supported: it cannot read with a cache and a mask: {error!r}') from error
    twice = map_state(lambda tensor: tensor.expand(2, *tensor.shape[1:]), want)
    pairs = zip(leaves(want), leaves((hidden, cache.state)), strict=True)
    for one, other in [*pairs, *zip(leaves(twice), leaves((ragged, both.state)), strict=True)]:
        if not one.numel():
            continue
        # not below that of float32: some families compute the softmax in it, whatever the dtype of the model
        limit = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32)) ** 0.5 * one.abs().max()
        difference = (one - other.to(one.dtype)).abs().max()
        if not difference <= limit:
            raise ValueError(
                f'{name} is not supported: read with a cache, a segment gives numbers that differ by {difference:.2g}'
            )


def config_of(told: dict[str, Any]) -> Any:
    """Returns the config that `plain_config` described.

    Raises:
        ValueError: if this version of transformers does not know its kind, or one of its entries.
    """
    version = f'transformers {transformers.__version__}'
    try:
        config = AutoConfig.for_model(**told)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f'the config of the language model cannot be read by {version}: {error}') from error
    known = config.__class__().to_dict()
    for name, value in told.items():
        if value is not None and name not in known and name not in OLD_NAMES:
            raise ValueError(f'the config of the language model has {name}={value!r}, which {version} lacks')
    return config


def plain_config(config: Any) -> dict[str, Any]:
    """Returns what makes a config, as JSON can store it: no paths, no versions, no dtype, no entries of the user."""
    known = config.__class__().to_dict()
    told = json.loads(config.to_json_string())
    return {name: value for name, value in told.items() if name in known and name not in NOT_RECORDED}


def keep_padding(told: dict[str, Any], read: dict[str, Any]) -> None:
    """Puts the padding ids that were recorded into what was read of them: `recorded_argument` always tells the id, and
    transformers 4.57 leaves one out that is the default of its config.

    Args:
        told: the recorded config, with the configs inside it.
        read: the same as `plain_config` gives it, which is changed.
    """
    if 'pad_token_id' in told:
        read['pad_token_id'] = told['pad_token_id']
    for name, part in read.items():
        if isinstance(part, dict) and isinstance(told.get(name), dict):
            keep_padding(told[name], part)


def plain_adapters(lm: Any) -> dict[str, Any]:
    """Returns the adapters of `peft` in a language model, as JSON can store them: their settings, which of them are
    active, and nothing of where they came from."""
    settings = {}
    for name, config in lm.peft_config.items():
        told = config.to_dict()
        settings[name] = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in told.items()
            if key not in NOT_OF_ADAPTERS
        }
    found = {**settings, 'active': list(lm.active_adapters)}
    return json.loads(json.dumps(found, default=str, sort_keys=True))
