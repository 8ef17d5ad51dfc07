"""What the library does on a GPU, on one that is not there (`pretend.py`). `tests/test_cuda_path.py` reports the cases.

A text of three segments in a model of two layers makes the host wait once at most, so nothing waits for a segment, a
layer or a token.
"""

from __future__ import annotations

import torch

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.layers import BACKENDS, record_attention
from tests.conftest import DROPOUT, INFINI_OPTIONS, LONG, RMT_OPTIONS, close, make_infini, make_rmt, same_gradients
from tests.pretend import ROOT, on_device, values, watched

SEGMENT = 6
MODELS = {f'rmt {name}': (make_rmt, options) for name, options in RMT_OPTIONS.items()}
MODELS |= {f'infini {name}': (make_infini, options) for name, options in INFINI_OPTIONS.items()}
WAYS = {
    'one graph': ({}, {}),
    'recompute': ({'recompute': True}, {}),
    'replay': ({}, {'backward': True}),
}


def wrapped(name, **more):
    """The same model of a name, on the CPU."""
    torch.manual_seed(1)
    make, options = MODELS[name]
    model_options = {key: more.pop(key) for key in list(more) if key in ('depth', *DROPOUT)}
    return SegmentWrapper(make(**{**options, **model_options}), segment_length=SEGMENT, **more)


def tokens(rows, segments):
    torch.manual_seed(2)
    return torch.randint(0, 20, (rows, segments * SEGMENT + 1))


def trained(wrapper, x, call):
    """The loss and the gradients of a call, on the CPU; and what the device saw. A causal model learns the next token,
    another one each token."""
    with watched() as seen:
        labels = None if wrapper.model.causal else x
        loss = wrapper.loss(x, labels=labels, **call).loss
        if loss.requires_grad:
            loss.backward()
    gradients = {name: values(parameter.grad) for name, parameter in wrapper.named_parameters()}
    return values(loss.detach()), gradients, seen


def training(name):
    """Backward in three ways: as on the CPU, and the host waits once a call, to check values, and sends nothing.

    Recomputing reads windows as replay does, so two models are enough for it."""
    for way, (options, call) in WAYS.items():
        if way == 'recompute' and name not in ('rmt xl mixed', 'infini default'):
            continue
        x = tokens(2, 3)
        want = wrapped(name, **options)
        loss = want.loss(x, labels=None if want.model.causal else x, **call).loss
        if loss.requires_grad:
            loss.backward()
        have, gradients, seen = trained(on_device(wrapped(name, **options)), on_device(x), call)
        close(have, loss.detach())
        same_gradients(gradients, {key: parameter.grad for key, parameter in want.named_parameters()})
        assert seen.waits.total() <= 1, f'{way}, waits: {seen.waits}'
        assert not seen.sent, f'{way}, sent: {seen.sent}'
        assert not seen.random, f'{way}: no random numbers are drawn, but the random state was {seen.random}'
    _, _, seen = trained(on_device(wrapped(name, check_values=False)), on_device(x), {'backward': True})
    assert not seen.waits, f'values unchecked: {seen.waits}'


def evaluation(name):
    """Logits, and a state that goes on: one wait a call."""
    x, wrapper = on_device(tokens(2, 3)), on_device(wrapped(name))
    with watched() as seen, torch.no_grad():
        _, state = wrapper.logits(x)
    assert seen.waits.total() <= 1, seen.waits
    assert not seen.sent, seen.sent
    with watched() as seen, torch.no_grad():
        wrapper.logits(x, state)
    assert seen.waits.total() <= 1, seen.waits
    assert not seen.sent, seen.sent


def random_states(name):
    """With dropout, a window reads the random state of the device once, however many parameters there are."""
    for way in ('recompute', 'replay'):
        options, call = WAYS[way]
        counts = []
        for segments in (2, 4):
            wrapper = on_device(wrapped(name, segments_per_pass=1, **options, **DROPOUT))
            _, _, seen = trained(wrapper, on_device(tokens(2, segments)), call)
            counts.append(seen.random['read'])
        # a window is computed twice, and what runs backward puts the state after the call back
        assert counts[1] - counts[0] <= 2 * 3, f'{way}: {counts} reads in 2 and 4 windows'


def decoding(name):
    """A stream: two waits to open it, then a look every 32 tokens, and nothing is sent for a token or a border."""
    x = tokens(2, 3)
    for prompt, eos in (((15, 15), None), ((15, 8), 0)):
        options = {'max_new_tokens': 34, 'temperature': 0, 'eos_token_id': eos}
        rows = [x[i, :count] for i, count in enumerate(prompt)]
        want = torch.stack(list(wrapped(name).stream(rows, **options)))
        with watched() as opening:
            stream = on_device(wrapped(name)).stream(on_device(rows), **options)
        with watched() as seen:
            have = values(torch.stack(list(stream)))
        assert torch.equal(have[: len(want)], want), 'other tokens than on the CPU'
        assert opening.waits.total() <= 2, f'opening, prompt {prompt}: {opening.waits}'
        assert seen.waits.total() <= 2, f'34 tokens, prompt {prompt}, eos {eos}: {seen.waits}'
        assert not seen.sent, f'34 tokens, prompt {prompt}, eos {eos}: {seen.sent}'


def autocast(name):
    """Queries, keys and values of each call of attention have one dtype, so every kernel takes them."""
    x, wrapper = on_device(tokens(2, 3)), on_device(wrapped(name).float())
    with watched() as seen, torch.autocast('cuda', torch.bfloat16):
        wrapper.loss(x, labels=None if wrapper.model.causal else x, backward=True)
    assert seen.attention
    assert {call.dtype for call in seen.attention} == {torch.bfloat16}
    if wrapper.model.causal:
        with watched() as seen, torch.autocast('cuda', torch.bfloat16):
            wrapper.generate_tokens(x[:, :8], 8)
        assert {call.dtype for call in seen.attention} == {torch.bfloat16}


def reported(name):
    """`attention_backend` is what runs, for each backend."""
    for dtype in (torch.float32, torch.bfloat16):
        for backend in BACKENDS:
            wrapper = on_device(wrapped(name).to(dtype))
            wrapper.model.backend = backend
            try:
                said = wrapper.model.attention_backend
            except ValueError:
                continue
            x = on_device(tokens(2, 2))
            with watched(), torch.no_grad(), record_attention() as calls:
                wrapper.logits(x[:, :SEGMENT])
            ran = {call.backend for call in calls if not call.masked}
            assert ran == {said}, f'{dtype}, {backend}: {said}'


def kernels(name):
    """Grouped heads go only to kernels that take them: not with a mask, not in float32."""
    x, wrapper = tokens(2, 3), on_device(wrapped(name).float())
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 9:] = False
    with watched() as seen:
        wrapper.loss(on_device(x), labels=on_device(x), mask=on_device(mask), backward=True)
        if wrapper.model.causal:
            wrapper.generate_tokens(on_device([x[0, :8], x[1, :11]]), 8)
    assert not [call for call in seen.attention if call.grouped and (call.masked or call.dtype == torch.float32)]


def reset(name):
    """New texts in some rows: no wait for rows that the host knows, and none at all if values are not checked."""
    x, rows = on_device(tokens(2, 2)), torch.tensor([True, False])
    wrapper = on_device(wrapped(name))
    with watched(), torch.no_grad():
        state = wrapper.logits(x)[1]
    for given, checks in ((rows, True), (on_device(rows), False)):
        wrapper.check_values = checks
        with watched() as seen, torch.no_grad():
            wrapper.reset(state, given)
        assert not seen.waits, seen.waits


def lengths_from_the_device(name):
    """Lengths of a prompt and of a cursor that are on the device are fetched together."""
    wrapper, x = on_device(wrapped(name)), on_device(tokens(2, 2))
    lengths = on_device(torch.tensor([3, 7]))
    with watched():
        cursor = wrapper.read(x)
    with watched() as seen:
        wrapper.stream(x, prompt_lengths=lengths, state=cursor)
    assert seen.waits.total() <= 2, seen.waits


def ends_together(name):
    """All rows have ended, which a look sees: the host asks once what to cut off, and once for the cursor."""
    wrapper, x = on_device(wrapped(name)), on_device(tokens(2, 2))
    with watched() as seen:
        new, cursor = wrapper.generate_tokens(
            x, 70, eos_token_id=1, filter_fn=lambda logits: torch.full_like(logits, -0.001).cumsum(-1),
            top_p=0.99, min_p=0.01, top_k=3, repetition_penalty=1.1, return_cursor=True,
        )  # fmt: skip
    assert new.shape[1] < 70, 'of the first three tokens, which top_k=3 leaves about equally likely, one ends a row'
    assert (values(new) == 1).any(dim=1).all()
    assert values(cursor.lengths).min() >= 1
    assert seen.waits.total() <= 1 + 70 // 32 + 2, seen.waits
    assert seen.sent.total() <= 1, seen.sent  # the lengths of the prompt


def launches(name):
    """The kernels of a layer, as docs/gpu.md tells them. They may fall, and then the page says so."""

    def count(depth, segments, work):
        wrapper, x = on_device(wrapped(name, depth=depth).float()), on_device(tokens(2, segments))
        stream = None
        if work == 'token':
            with watched():
                stream = wrapper.stream(x[:, :8], temperature=0)
                next(stream)
        with watched() as seen, torch.set_grad_enabled(work == 'training'):
            if stream is not None:
                next(stream)
            elif work == 'training':
                wrapper.loss(x).loss.backward()
            else:
                wrapper.logits(x[:, :-1])
        return seen.kernels.total()

    count(2, 4, 'reading')  # computes the rotations, which are kept
    found = []
    for work in ('reading', 'training', 'token'):
        layer = {segments: count(3, segments, work) - count(2, segments, work) for segments in (2, 4)}
        # a layer costs so much for each segment; or once, for all segments of a window
        found.append((layer[4] - layer[2]) // 2 if wrapped(name).model.parallel_segments is False and work != 'token'
                     else layer[4])  # fmt: skip
    line = f'| {name} | ' + ' | '.join(map(str, found)) + ' |'
    page = (ROOT / 'docs' / 'gpu.md').read_text()
    assert line in page, f'docs/gpu.md should say: {line}'


SOME = ['rmt plain', 'rmt gqa', 'rmt xl mixed', 'rmt axial', 'infini default', 'infini delta, gqa', 'infini above']
MORE = [*SOME, 'rmt encoder', 'rmt xl enhanced', 'infini linear', 'infini delta, strength, decay', 'infini kv proj']
HALF = SOME if LONG else SOME[::2]  # plain, xl, default and above
GROUPED = ['rmt gqa', 'infini delta, gqa', 'infini deltanet, decay, gqa']
KINDS = {
    'training': (training, MORE if LONG else SOME), 'evaluation': (evaluation, HALF),
    'random states': (random_states, SOME[::3]), 'decoding': (decoding, HALF), 'autocast': (autocast, SOME),
    'reported': (reported, SOME[::2]),
    'kernels': (kernels, GROUPED), 'reset': (reset, SOME), 'ends together': (ends_together, SOME[::4]),
    'lengths from the device': (lengths_from_the_device, SOME[::4]),
    'launches': (launches, ['rmt plain', 'rmt xl mixed', 'infini default', 'infini linear', 'infini delta']),
}  # fmt: skip
NAMES = [f'{kind}: {name}' for kind, (_, names) in KINDS.items() for name in names]


def run(case):
    """Runs a case of `NAMES`."""
    kind, _, name = case.partition(': ')
    KINDS[kind][0](name)
