"""The parts that the transformers of this library share: attention, rotary positions, feed-forward, the residual block,
and the frame of a model around its blocks.

`attend` computes softmax attention on a named backend. It never changes to another backend silently:

    sdpa     torch's scaled_dot_product_attention, which can compute every call
    flash2   the `flash-attn` package (FlashAttention-2), for CUDA and half types, without a mask tensor
    naive    einsum and softmax, which the other backends are tested against
    auto     flash2 where it can compute the call, else sdpa

FlashAttention-3 and 4 work through sdpa. The user turns them on for the whole process with
`torch.nn.attention.activate_flash_attention_impl`.

Letters: b rows of the batch, h query heads, g key/value heads, i queries, j keys, n positions, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from segment_recurrence_pytorch.checks import check_positive, is_number
from segment_recurrence_pytorch.model import SegmentModel, own_class, with_own_rate

BACKENDS = ('auto', 'sdpa', 'flash2', 'naive')
HALF_TYPES = (torch.float16, torch.bfloat16)
# modules of PyTorch that draw no random numbers, but for the dropout that they say
PLAIN = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.ModuleList, nn.Sequential, nn.Identity, nn.Dropout,
         nn.SiLU, nn.GELU)  # fmt: skip


class AttentionCall(NamedTuple):
    """A record of one call of `attend`.

    Attributes:
        backend: name of the backend that ran.
        num_queries: number of queries i.
        num_keys: number of keys j.
        causal: the argument `causal` of the call.
        masked: whether the call had a mask tensor.
    """

    backend: str
    num_queries: int
    num_keys: int
    causal: bool
    masked: bool


_recorders: list[list[AttentionCall]] = []


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = 'auto',
) -> Tensor:
    """Computes softmax attention.

    Args:
        q: queries (b, h, i, d), where h is a multiple of g.
        k: keys (b, g, j, d).
        v: values (b, g, j, d).
        causal: whether attention is causal. The queries are then the last i of the j positions, and no query sees a
            later position. Default: False.
        mask: bool, broadcastable to (b, h, i, j), True = may attend. With a mask, causal must be False. Default: None,
            every query sees every key.
        dropout: probability that an attention weight is dropped. Default: 0.
        backend: a name in `BACKENDS`. Default: 'auto'.

    Returns:
        The outputs (b, h, i, d).

    Raises:
        ValueError: if the arguments contradict each other, or if the named backend cannot compute this call.
    """
    if causal and mask is not None:
        raise ValueError('attend takes causal=True or a mask, not both: put the causal rule into the mask')
    if causal and q.shape[-2] > k.shape[-2]:
        raise ValueError(f'causal attention of {q.shape[-2]} queries needs as many keys, got {k.shape[-2]}')
    masked = mask is not None
    name = choose_backend(backend, device=q.device, dtype=q.dtype, masked=masked, dim_head=q.shape[-1])
    if _recorders:
        for calls in _recorders:
            calls.append(AttentionCall(name, q.shape[-2], k.shape[-2], causal, masked))
    return _RUN[name](q, k, v, causal, mask, dropout)


def choose_backend(
    backend: str, *, device: torch.device, dtype: torch.dtype, masked: bool = False, dim_head: int = 64
) -> str:
    """Returns the name of the backend that `attend` runs for the given kind of input.

    Args:
        backend: a name in `BACKENDS`.
        device: device of queries, keys and values.
        dtype: dtype of queries, keys and values.
        masked: whether there is a mask tensor. Default: False.
        dim_head: features of a head. Default: 64.

    Raises:
        ValueError: if the named backend is unknown or cannot run here. The message says why.
    """
    if backend == 'auto':
        return 'sdpa' if _flash2_refusal(device, dtype, masked, dim_head) else 'flash2'
    if backend == 'flash2':
        reason = _flash2_refusal(device, dtype, masked, dim_head)
        if reason:
            raise ValueError(f"attention backend 'flash2' {reason}; use 'auto' or 'sdpa'")
    elif backend not in BACKENDS:
        raise ValueError(f'attention backend {backend!r} is unknown: choose one of {", ".join(BACKENDS)}')
    return backend


@contextmanager
def record_attention() -> Iterator[list[AttentionCall]]:
    """Returns a `with` block that gives a list, to which every call of `attend` inside the block is added as
    `AttentionCall`."""
    calls: list[AttentionCall] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders[:] = [kept for kept in _recorders if kept is not calls]


def _flash2_refusal(device: torch.device, dtype: torch.dtype, masked: bool, dim_head: int) -> str | None:
    if device.type != 'cuda':
        return f'needs a CUDA device, not {device.type}'
    if dtype not in HALF_TYPES:
        return f'takes float16 and bfloat16, not {dtype}'
    if masked:
        return 'takes no mask tensor'
    if dim_head > 256:
        return f'takes heads of at most 256 features, not {dim_head}'
    if not _has_flash_attn():
        return "needs the package flash-attn: pip install 'segment-recurrence-pytorch[flash]'"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less'
    return None


def _has_flash_attn() -> bool:
    return _flash_attn_func() is not None


# A compiler cannot follow an import that fails: it shall call this function and take its answer as a constant.
# `torch.compiler.assume_constant_result` sets this attribute, too, but loads the compiler, which takes seconds
_has_flash_attn._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _flash_attn_func() -> Callable | None:
    # importlib's find_spec('flash_attn') would also succeed for flash-attn-4, which does not have this function
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    # With fewer queries than keys, is_causal would align the first query with the first key: we need the last with the
    # last. On a CPU a mask says so at no cost. On a GPU the fast kernels take no mask: there, queries are added in
    # front, which makes queries and keys equally many, and their outputs are dropped
    shape, grouped = q.shape, q.shape[1] != k.shape[1]
    # a single query is the last position, which sees all keys. A tracer does not know the number, and must not fix it
    single = isinstance(q.shape[-2], int) and q.shape[-2] == 1
    causal = causal and not single
    if grouped and single and (mask is None or mask.ndim < 3 or mask.shape[-3] == 1):
        # the heads that share keys become queries of one head: kernels need not know of groups
        q, grouped = q.reshape(shape[0], k.shape[1], q.shape[1] // k.shape[1], shape[-1]), False
    prefix = k.shape[-2] - q.shape[-2] if causal else 0
    if prefix and q.device.type == 'cpu':
        mask, causal = q.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(prefix), False
        prefix = 0
    if prefix:
        q = F.pad(q, (0, 0, prefix, 0))
    if grouped and q.device.type != 'cpu' and (mask is not None or q.dtype not in HALF_TYPES):
        # only the flash kernel takes groups, and it takes neither a mask nor float32: torch would fall back on plain
        # products, which hold all weights of the attention
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )
    return out[:, :, prefix:] if prefix else out.reshape(shape)


def _flash2(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    flash_attn_func = _flash_attn_func()
    assert flash_attn_func is not None  # choose_backend has checked this
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attn_func(q, k, v, dropout_p=dropout, causal=causal).transpose(1, 2)


def _naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, dropout: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum('bhid,bhjd->bhij', q, k) * q.shape[-1] ** -0.5
    if causal:
        i, j = scores.shape[-2:]
        mask = torch.ones(i, j, dtype=torch.bool, device=q.device).tril(j - i)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum('bhij,bhjd->bhid', weights, v)


_RUN: dict[str, Callable] = {'sdpa': _sdpa, 'flash2': _flash2, 'naive': _naive}


NORM_EPS = 1e-6
# Factor of the learning rate of embeddings. A memory is learned sooner if they start large; at the rate of all else,
# large ones were learned so slowly that text cost .03 bits per byte after 3,000 steps: section 5 of
# benchmarks/results/search/found.md
EMBEDDING_LR = 5.0
# initial standard deviations, see `SegmentTransformer.init_weights`; the second line is in units of fan_in ** -0.5
POSITION_STD = 0.02
SOFT, OUTPUT = 3**-0.5, 0.1


def causal_mask(valid: Tensor) -> Tensor:
    """Returns which positions see which, (b, 1, n, n) bool: themselves, and the valid ones before them.

    Args:
        valid: (b, n) bool, True = valid.
    """
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return (valid[:, None, None] & torch.ones_like(itself).tril()) | itself


def no_autocast(device_type: str) -> AbstractContextManager:
    """Returns a `with` block in which autocast is off. It costs nothing if autocast is off already.

    Args:
        device_type: type of the device, for example 'cuda'.
    """
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


class Constants:
    """Tensors that depend on nothing but numbers, kept so that each is computed and sent to a device only once.

    Args:
        size: number of tensors that are kept. The oldest one goes first.
    """

    def __init__(self, size: int):
        self.size = size
        self.kept: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Returns the tensor of a key. It must not be changed.

        Nothing is kept where a tensor is not an ordinary one: while `torch.compile` or `torch.export` traces, and while
        a CUDA graph is recorded, whose memory belongs to the graph.

        Args:
            key: what the tensor depends on, the device and the dtype included.
            device: the device of the tensor.
            make: a function that computes it.
        """
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return make()
        found = self.kept.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = make()
            if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
                return found
            for oldest in list(self.kept)[: max(0, len(self.kept) + 1 - self.size)]:
                self.kept.pop(oldest, None)
            self.kept[key] = found
        return found


constants = Constants(64)


def rotations_between(start: int, stop: int, dim_head: int, *, theta: float, like: Tensor) -> Tensor:
    """Returns the rotations of the rotary positions (arXiv 2104.09864) start to stop - 1, as cosine and sine, (stop -
    start, dim_head / 2, 2). They must not be changed.

    They are computed in float32 at least, since at position 10,000 half types give neighbours the same angle. No
    frequencies are stored on a module, so `.half()` cannot round them.

    Args:
        start: the first position.
        stop: the position after the last one.
        dim_head: features of a head, an even number.
        theta: base of the frequencies. The i-th pair of features turns by theta ** (-2 i / dim_head) radians per
            position.
        like: a tensor with the device and dtype of what will be rotated.
    """
    dtype, device = torch.promote_types(like.dtype, torch.float32), like.device

    def made() -> Tensor:
        exponents = torch.arange(0, dim_head, 2, device=device, dtype=dtype) / dim_head
        angles = torch.arange(start, stop, device=device).to(dtype)[:, None] * theta**-exponents
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    return constants.get(('rotations', start, stop, dim_head, theta, dtype, device), device, made)


def rotate(t: Tensor, rotations: Tensor) -> Tensor:
    """Rotates the feature pairs (2i, 2i + 1) of queries or keys. It computes in the dtype of the rotations, in
    float32 at least.

    Args:
        t: queries or keys (..., n, d).
        rotations: cosines and sines (..., n, d / 2, 2), from `rotations_between`.

    Returns:
        The rotated tensor, with the shape and dtype of t.
    """
    with no_autocast(t.device.type):
        rotations = rotations.to(
            torch.promote_types(rotations.dtype, torch.float32)
        )  # complex numbers have no bfloat16
        pairs = t.to(rotations.dtype).unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # compilers fuse real operations, and cannot compile complex ones
            x, y = pairs.unbind(-1)
            cos, sin = rotations.unbind(-1)
            turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1)
        else:  # without a compiler, one complex product is four times faster
            turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(rotations))
        return turned.flatten(-2).to(t.dtype)


class HeadNorm(nn.RMSNorm):
    """RMS norm of queries or keys (..., d) with a learned gain, computed in the dtype of the gain.

    The result has the dtype of the input. Under autocast, queries and keys thus keep the same dtype as the values.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class FeedForward(nn.Module):
    """A GEGLU feed-forward layer (arXiv 2002.05202), from (..., dim) to (..., dim).

    Args:
        dim: number of input and output features.
        mult: sets the number of inner features, int(dim * mult * 2 / 3). Default: 4.
        dropout: probability that an inner feature is dropped during training. Default: 0.

    Raises:
        ValueError: if there would be no inner feature.
    """

    def __init__(self, dim: int, *, mult: float = 4, dropout: float = 0.0):
        super().__init__()
        inner = int(dim * mult * 2 / 3)
        if inner < 1:
            raise ValueError(
                f'ff_mult is {mult}: with dim={dim} no inner feature is left, give {1.5 / dim:.3g} or more'
            )
        self.proj_in = nn.Linear(dim, inner * 2)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gates = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(self.dropout(F.gelu(gates) * x))


class ResidualBlock(nn.Module):
    """One layer of a transformer: attention, then a GEGLU feed-forward. Each has an RMS norm before it and a residual
    around it.

    The same block is used when whole segments are read and in generation. Only what its input may attend to differs:
    the rest of the segment, or a cache of it. An object called the surroundings knows this. The block passes it to the
    attention, which computes queries, keys and values of the input and gives them to `surroundings.attend`.

    Args:
        dim: features of a position.
        attn: the attention. It is called with the normed input and the surroundings.
        ff_mult: see `FeedForward`. Default: 4.
        ff_dropout: see `FeedForward`. Default: 0.
        norm_eps: epsilon of both norms. Default: `NORM_EPS`.
    """

    def __init__(
        self, dim: int, attn: nn.Module, *, ff_mult: float = 4, ff_dropout: float = 0.0, norm_eps: float = NORM_EPS
    ):
        super().__init__()
        self.attn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attn: Any = attn
        self.ff_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ff = FeedForward(dim, mult=ff_mult, dropout=ff_dropout)

    def forward(self, x: Tensor, surroundings: Any) -> Tensor:
        """Returns the outputs of the positions that the attention returned.

        Args:
            x: (..., positions, dim). The attention may return outputs for only the last of these positions.
            surroundings: what the positions attend to. Each model has a class `Surroundings`.
        """
        out = self.attn(self.attn_norm(x), surroundings)
        if out.shape[-2] < x.shape[-2]:
            x = x[..., x.shape[-2] - out.shape[-2] :, :]
        x = x + out
        return x + self.ff(self.ff_norm(x))


def init_linear(name: str, weight: Tensor, *, value_features: int) -> None:
    """Gives the weight of a linear layer its initial values, by its name. See `SegmentTransformer.init_weights`.

    Args:
        name: the name of the weight.
        weight: (out, in).
        value_features: number of the last outputs that are values, if the layer makes keys and values.
    """
    std = weight.shape[1] ** -0.5
    nn.init.normal_(weight, std=std * (OUTPUT if name.endswith(('to_out.weight', 'proj_out.weight')) else SOFT))
    if name.endswith(('to_kv.weight', 'to_qkv.weight')):
        nn.init.normal_(weight[-value_features:], std=std)


if TYPE_CHECKING:

    class Blocks(nn.ModuleList):
        """A ModuleList of blocks."""

        def __iter__(self) -> Iterator[ResidualBlock]: ...

else:
    Blocks = nn.ModuleList


# methods that a user may replace in a module, without a subclass. They are few, since compiled code asks for each
SEAMS = ('forward', 'next_memory', 'read_rows', 'write_rows', 'memory_to_read', 'project', 'attend', 'heads_of',
         'split', 'gates', 'strength_and_decay', 'write', 'recall')  # fmt: skip


def may_draw_random(model: nn.Module, own: type) -> bool:
    """Returns whether a model may draw random numbers in the mode in which its modules are, training or evaluation.

    The modules of this library and those of `PLAIN` draw none, but for their dropout. Any other module may draw some,
    and so may a subclass, a module with a hook, and one of whose methods in `SEAMS` one was replaced, whoever did that,
    and when.

    Args:
        model: the model.
        own: the class of the library of which it is a model.
    """
    packages = {each.__module__.partition('.')[0] for each in (own, SegmentModel)}
    class_of = type if own_class(model) is type(model) else own_class  # FSDP2 makes a subclass for a sharded module
    modules = [model]
    while modules:
        module = modules.pop()
        has, cls = vars(module), class_of(module)
        modules += [part for part in has['_modules'].values() if part is not None]
        if not has['training']:
            continue
        if any(name in has and is_number(has[name]) and has[name] > 0 for name in ('p', 'dropout')):
            return True
        has_hooks = has['_forward_hooks'] or has['_forward_pre_hooks']
        if any(name in has for name in SEAMS) or (has_hooks and cls is type(module)):  # FSDP2 has hooks of its own
            return True
        is_known = cls is own if module is model else cls in PLAIN or cls.__module__.partition('.')[0] in packages
        if not is_known:
            return True
    return False


def outputs_from(linear: nn.Linear, x: Tensor, first: int) -> Tensor:
    """Returns the outputs of a linear layer from one on, (..., out - first).

    Only these are computed, unless the layer does more than a product with its weight: adapters, quantisation and hooks
    are not passed by.

    Args:
        linear: the layer.
        x: its input, (..., in).
        first: number of the first output that is needed.
    """
    changed = 'forward' in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks
    if first and type(linear) is nn.Linear and not changed:
        return F.linear(x, linear.weight[first:], None if linear.bias is None else linear.bias[first:])
    outputs = linear(x)
    return outputs[..., first:] if first else outputs


class SegmentTransformer(SegmentModel):
    """The frame of a transformer of this library: token embedding, blocks, final norm, logits and attention backend.

    Attributes:
        token_emb: the embedding of token ids.
        layers: the blocks.
        norm: the norm after the last block.
        logits: the linear layer from hidden states to logits. With tie_embeddings=True it shares the weight of
            `token_emb`.
        dim_head: features of a head.
        kv_heads: number of key/value heads.
        backend: name of the attention backend that was asked for. Default: 'auto'.
    """

    token_emb: nn.Embedding
    layers: Blocks
    norm: nn.RMSNorm
    logits: nn.Linear
    dim_head: int
    kv_heads: int
    backend: str = 'auto'

    def param_groups(self, lr: float, weight_decay: float, *, emb_lr: float | None = None) -> list[dict[str, Any]]:
        """Returns groups of parameters for an optimizer: those of `SegmentModel.param_groups`, and last the embeddings
        of tokens and positions, which have no weight decay.

        Args:
            lr: the learning rate.
            weight_decay: weight decay of the matrices of the blocks.
            emb_lr: the learning rate of the embeddings, as a factor of lr. Default: None, 5. With tie_embeddings=True,
                when logits use the token embeddings too, None leaves all embeddings in the first two groups.

        Raises:
            ValueError: if emb_lr is not a positive number.
        """
        groups = super().param_groups(lr, weight_decay)
        if emb_lr is None:
            if self.logits.weight is self.token_emb.weight:
                return groups
            emb_lr = EMBEDDING_LR
        check_positive(emb_lr=emb_lr)
        tables = [table for name, table in self.named_parameters() if name in ('token_emb.weight', 'pos_emb.weight')]
        return with_own_rate(groups, tables, lr * emb_lr)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Gives the parameters their initial values. The constructor of a model calls it.

        Matrices are normal. Token embeddings have std dim ** -0.5, position embeddings 0.02. Linear layers have
        fan_in ** -0.5 times a factor: 1 for values, 0.1 for the layers that write to the residual stream, and
        3 ** -0.5, as PyTorch's own start, for all others: queries, keys, the first layer of a feed-forward, logits, and
        what a subclass adds to a block. Biases are 0. Gains and gates keep the values that their constructors gave
        them, and so does what stands outside embeddings, blocks and logits.

        Each block thus acts from the first step on, but little, attention is soft, and tokens are large beside their
        positions. With blocks that start as the identity and embeddings of 0.02, as this library had them before,
        neither model learned to remember within 1,000 steps (benchmarks/results/search/found.md).
        """
        for name, parameter in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(parameter)
            elif name == 'pos_emb.weight':
                nn.init.normal_(parameter, std=POSITION_STD)
            elif name == 'token_emb.weight':
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.startswith(('layers.', 'logits.')) and name.endswith('weight') and parameter.ndim == 2:
                init_linear(name, parameter, value_features=self.kv_heads * self.dim_head)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the input of the first block, without positions: the embeddings of the tokens (..., n, dim).

        Args:
            tokens: token ids (..., n), or embeddings (..., n, dim), which are only converted to the dtype of the model.
        """
        return tokens.to(self.dtype) if tokens.is_floating_point() else self.token_emb(tokens)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """See `SegmentModel.to_logits`."""
        return self.logits(hidden)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """See `SegmentModel.decays`. Weight decay applies to the matrices of the blocks."""
        return parameter.ndim == 2 and name.startswith('layers.')

    @property
    def attention_backend(self) -> str:
        """The name of the attention backend that runs here when there is no padding mask.

        Set it to a name in `BACKENDS` to choose a backend. If that backend cannot run here, ValueError is raised and
        the backend stays as it was.
        """
        return self._backend_for(self.backend)

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        self._backend_for(name)
        self.backend = name

    def _backend_for(self, name: str) -> str:
        return choose_backend(name, device=self.device, dtype=self.compute_dtype, dim_head=self.dim_head)
