"""`check_model` tries out whether a model keeps the contract of `SegmentModel`.

It is meant for the tests of a new model: one call instead of a test for each rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segment_recurrence_pytorch.checks import check_form
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, copied, leaves, map_state
from segment_recurrence_pytorch.wrapper import SegmentWrapper

ROWS = 3


def check_model(model: SegmentModel, *, segment_length: int | None = None, seed: int = 0) -> None:
    """Raises AssertionError, with what is wrong and what the contract asks for, if a model breaks the contract.

    It tries the model on random tokens, without and with padding, and looks at the returned shapes, the state,
    causality, the independence of the rows, back-propagation and generation: in evaluation mode, and of training mode
    the random numbers. Not tried: whether rows meet in training mode alone (batch norm), whether values of tensors are
    looked at, and autocast of a model that is not float32. Gradients of the model are cleared. Use a model in float64
    with random weights of ordinary size: in float32 the comparisons are rougher, and with weights of 0 they see little.

    Args:
        model: the model, on any device.
        segment_length: number of tokens of a segment, at least 2, and at most what the model can read. Default: None,
            4, or less if the model cannot read as many.
        seed: of the random tokens. Default: 0.
    """
    length = min(4, model.max_segment_length or 4) if segment_length is None else segment_length
    try:
        trial = _Trial(model, length, torch.Generator().manual_seed(seed))
    except ValueError as error:  # it has no parameters
        raise AssertionError(str(error)) from error
    with evaluating(model):
        with torch.no_grad():
            for rule in (
                trial.sizes_are_said_and_states_have_the_batch_first,
                trial.shapes_are_right,
                trial.initial_state_is_the_same_for_all_rows,
                trial.state_is_a_value,
                trial.no_state_is_the_initial_one,
                trial.hidden_states_need_not_be_computed,
                trial.rows_are_independent,
                trial.padding_has_no_effect,
                trial.no_position_sees_a_later_one,
                trial.segments_may_be_read_at_once,
                trial.random_numbers_do_not_depend_on_hidden_states,
                trial.autocast_changes_no_state,
            ):
                _try(rule)
        _try(trial.every_way_of_back_propagation_is_the_same)
        _try(trial.generation_is_one_pass)


def _try(rule: Callable[[], None]) -> None:
    """Tries out a rule. An error that the model itself raises is told together with the rule."""
    try:
        rule()
    except AssertionError:
        raise
    except Exception as error:  # the model's own code may fail in any way
        raise AssertionError(f'{rule.__doc__} Trying this, {type(error).__name__} was raised: {error}') from error


class _Trial:
    """The trials of `check_model`, one method for each rule. They run in order, and each relies on those before."""

    def __init__(self, model: SegmentModel, segment_length: int, generator: torch.Generator):
        self.model = model
        self.length = segment_length
        self.generator = generator
        self.tolerance = 1e-9 if model.dtype == torch.float64 else 1e-4 if model.dtype == torch.float32 else 5e-2

    def ids(self, *shape: int) -> Tensor:
        """Returns random token ids."""
        return torch.randint(0, self.model.num_tokens, shape, generator=self.generator).to(self.model.device)

    def advance(self, tokens: Tensor, state: State = None, **options: Any) -> tuple[Any, State]:
        """Returns what the model's `advance` returns, which has to be two values."""
        returned = self.model.advance(tokens, state, **options)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise AssertionError(f'advance returned a {type(returned).__name__}: it has to return (hidden, state)')
        return returned

    def read(self, rows: int = ROWS) -> State:
        """Returns the state after one segment."""
        return self.advance(self.ids(rows, self.length))[1]

    def same(self, have: Any, want: Any, rule: str) -> None:
        """Raises AssertionError, with the rule, unless two tensors or states agree up to rounding."""
        have, want = leaves(have), leaves(want)
        if len(have) != len(want):
            raise AssertionError(f'{rule}: {len(have)} tensors against {len(want)}')
        for a, b in zip(have, want, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype) or not torch.allclose(
                a, b, rtol=self.tolerance, atol=self.tolerance
            ):
                raise AssertionError(rule)

    def row(self, state: State, row: int) -> State:
        """Returns one row of a state."""
        return map_state(lambda t: t[row : row + 1], state)

    def same_meaning(self, have: State, want: State, rule: str) -> None:
        """Compares two states by what the model makes of the next tokens: one of them may hold padding."""
        rows = leaves(want)[0].shape[0]
        tokens = self.ids(rows, self.length)
        self.same(self.advance(tokens, have)[0], self.advance(tokens, want)[0], rule)

    def sizes_are_said_and_states_have_the_batch_first(self) -> None:
        """The model says num_tokens and dim, and the first dimension of every tensor of a state is the batch."""
        try:
            check_form(self.model)
        except ValueError as error:
            raise AssertionError(str(error)) from error

    def shapes_are_right(self) -> None:
        """Hidden states, logits and states have the shapes that the contract names, for ids and for embeddings."""
        embeddings = torch.randn(ROWS, self.length, self.model.dim, generator=self.generator)
        for tokens in (self.ids(ROWS, self.length), embeddings.to(self.model.device, self.model.dtype)):
            hidden, state = self.advance(tokens)
            want = ROWS, self.length, self.model.dim
            if not isinstance(hidden, Tensor) or tuple(hidden.shape) != want:
                found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise AssertionError(f'the hidden states of advance are {found}: they have to be (b, n, dim) = {want}')
            logits = self.model.to_logits(hidden)
            if tuple(logits.shape) != (ROWS, self.length, self.model.num_tokens):
                raise AssertionError(
                    f'to_logits made {tuple(logits.shape)} of {want}: the last dimension has to be num_tokens='
                    f'{self.model.num_tokens}'
                )
            try:
                self.model.check_state(state, ROWS)
            except ValueError as error:
                raise AssertionError(
                    f'advance returned a state that is not like initial_state: {error}. All states of a model have the '
                    'same tree, shapes, dtypes and device; a model whose state grows overrides largest_state'
                ) from error

    def initial_state_is_the_same_for_all_rows(self) -> None:
        """Every row of every initial state has the same values, and the model takes them."""
        state = self.model.initial_state(ROWS)
        rule = (
            'initial_state returned other values in another call, row or batch: each row has to begin in the same way'
        )
        self.same(self.model.initial_state(ROWS), state, rule)
        self.same(self.model.initial_state(1), self.row(state, 1), rule)
        for message, is_wrong in self.model.state_faults(state):
            if is_wrong:
                raise AssertionError(f'initial_state: {message}, which wrappers refuse: override state_faults')

    def state_is_a_value(self) -> None:
        """`advance` changes nothing that it is given, and returns tensors of its own."""
        tokens, state = self.ids(ROWS, self.length), self.read()
        before, ids = copied(state), tokens.clone()
        for mask in (None, torch.ones_like(tokens, dtype=torch.bool)):
            hidden, after = self.advance(tokens, state, mask=mask)
            if not torch.equal(tokens, ids) or not all(map(torch.equal, leaves(state), leaves(before))):
                raise AssertionError(
                    'advance changed its tokens or the given state in place: it has to return a new state'
                )
            self.same(
                self.advance(tokens, state, mask=mask), (hidden, after),
                'the same tokens and state gave another result the second time: advance keeps something on the module, '
                'or draws random numbers in evaluation mode',
            )  # fmt: skip
        owned = [*self.model.parameters(), *self.model.buffers(), tokens]
        shared = {t.untyped_storage().data_ptr() for t in owned if t.numel()}
        first, other = (self.model.initial_state(ROWS) for _ in range(2))
        for name, each, others in (('initial_state', first, [other]), ('advance', after, [state])):
            taken = shared | {t.untyped_storage().data_ptr() for t in leaves(others) if t.numel()}
            if any(t.untyped_storage().data_ptr() in taken for t in leaves(each) if t.numel()):
                raise AssertionError(
                    f'a state that {name} returned shares memory with a parameter or with another state: return a '
                    'copy, for example parameter.expand(b, -1).clone()'
                )

    def no_state_is_the_initial_one(self) -> None:
        """With state=None, `advance` begins with `initial_state`."""
        tokens = self.ids(ROWS, self.length)
        rule = 'advance with state=None is not the same as with initial_state(b)'
        self.same(self.advance(tokens), self.advance(tokens, self.model.initial_state(ROWS)), rule)

    def hidden_states_need_not_be_computed(self) -> None:
        """The state is the same with need_hidden=False."""
        tokens, state = self.ids(ROWS, self.length), self.read()
        self.same(
            self.advance(tokens, state, need_hidden=False)[1], self.advance(tokens, state)[1],
            'advance returned another state with need_hidden=False',
        )  # fmt: skip

    def rows_are_independent(self) -> None:
        """A row is the same alone as in a batch."""
        tokens, state = self.ids(ROWS, self.length), self.read()
        hidden, after = self.advance(tokens, state)
        alone = self.advance(tokens[1:2], self.row(state, 1))
        rule = 'a row of a batch is not the same as the row alone: the rows of a batch must not influence each other'
        self.same((hidden[1:2], self.row(after, 1)), alone, rule)

    def padding_has_no_effect(self) -> None:
        """A padded position changes nothing, and a row without a valid position keeps its state bit for bit."""
        tokens, state = self.ids(ROWS, self.length), self.read()
        mask = torch.ones_like(tokens, dtype=torch.bool)
        whole, after = self.advance(tokens, state)
        rule = 'a mask that is True everywhere is not the same as no mask'
        hidden, masked = self.advance(tokens, state, mask=mask)
        self.same(hidden, whole, rule)
        self.same_meaning(masked, after, rule)
        mask[0, 1:] = False
        mask[1, 0] = False
        mask[2] = False
        hidden, after = self.advance(tokens, state, mask=mask)
        other = self.advance(torch.where(mask, tokens, self.ids(ROWS, self.length)), state, mask=mask)
        rule = 'the token at a padded position (mask False) changed the state or hidden states of valid positions'
        self.same((other[0][mask], other[1]), (hidden[mask], after), rule)
        rule = 'a row whose mask is False everywhere has another state than before: it has to keep its own'
        old, new = self.row(state, 2), self.row(after, 2)
        pairs = list(zip(leaves(old), leaves(new), strict=False))
        if all(a.shape == b.shape for a, b in pairs) and not all(torch.equal(a, b) for a, b in pairs):
            raise AssertionError(rule)
        self.same_meaning(new, old, rule)  # the tensors of a state that grows have other shapes
        if self.model.causal:
            lone_hidden, lone = self.advance(tokens[:1, :1], self.row(state, 0))
            rule = 'a row with padding behind its tokens is not the same as the row without that padding'
            self.same(hidden[:1, :1], lone_hidden, rule)
            self.same_meaning(self.row(after, 0), lone, rule)

    def no_position_sees_a_later_one(self) -> None:
        """Hidden states depend on earlier positions only."""
        if not self.model.causal:
            return
        tokens, state = self.ids(ROWS, self.length), self.read()
        changed = tokens.clone()
        changed[:, -1] = (tokens[:, -1] + 1) % self.model.num_tokens
        have, want = self.advance(changed, state)[0], self.advance(tokens, state)[0]
        rule = 'a hidden state depends on a later token, but causal is True: set causal=False, or mend advance'
        self.same(have[:, :-1], want[:, :-1], rule)

    def segments_may_be_read_at_once(self) -> None:
        """With `parallel_segments`, several segments in one call are the same as one call for each."""
        if not self.model.parallel_segments:
            return
        tokens, start = self.ids(ROWS, 2 * self.length + 1), self.read()
        padded = torch.ones_like(tokens, dtype=torch.bool)
        padded[0, self.length + 1 :] = False
        padded[1] = False
        for mask, options in ((None, {}), (padded, {}), (padded, {'need_hidden': False})):
            hidden, after = self.advance(tokens, start, segment_length=self.length, mask=mask, **options)
            masks = [None] * 3 if mask is None else mask.split(self.length, dim=1)
            state, hiddens = start, []
            for piece, its_mask in zip(tokens.split(self.length, dim=1), masks, strict=True):
                one, state = self.advance(piece, state, segment_length=self.length, mask=its_mask)
                hiddens.append(one)
            rule = 'segments that are read at once differ from one by one'
            rule += '' if mask is None else ', with a mask' + ' and need_hidden=False' * bool(options)
            if not options:
                valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
                self.same(hidden[valid], torch.cat(hiddens, 1)[valid], rule)
            self.same_meaning(after, state, rule)

    def random_numbers_do_not_depend_on_hidden_states(self) -> None:
        """In training mode `advance` draws the same random numbers with need_hidden=False, and makes the same state."""
        tokens, state, found = self.ids(ROWS, self.length), self.read(), []
        self.model.train()
        devices = [self.model.device] if self.model.device.type == 'cuda' else []
        try:
            for need_hidden in (True, False):
                with torch.random.fork_rng(devices):
                    torch.manual_seed(0)
                    after = self.advance(tokens, state, need_hidden=need_hidden)[1]
                    found.append((after, torch.rand(4, device=self.model.device)))
        finally:
            self.model.eval()  # `evaluating` sets the modes back that were before
        rule = 'in training mode, advance draws other random numbers or makes another state with need_hidden=False'
        self.same(found[1], found[0], rule)

    def autocast_changes_no_state(self) -> None:
        """Under autocast, states have the dtypes of the initial state."""
        if self.model.dtype != torch.float32:
            return
        with torch.autocast(self.model.device.type, torch.bfloat16):
            state = self.read()
        try:
            self.model.check_state(state, ROWS)
        except ValueError as error:
            raise AssertionError(
                f'under autocast, advance returned a state that is not like initial_state: {error}'
            ) from error

    def every_way_of_back_propagation_is_the_same(self) -> None:
        """One graph, recomputing and replay give the same loss and gradients."""
        tokens, found = self.ids(ROWS, 3 * self.length), []
        for recompute, replay in ((False, False), (True, False), (False, True)):
            wrapper = SegmentWrapper(self.model, segment_length=self.length, recompute=recompute)
            wrapper.zero_grad()
            loss = wrapper.loss(tokens, labels=tokens, backward=replay).loss
            if not replay:
                loss.backward()
            found.append((loss.detach(), [p.grad for p in wrapper.parameters() if p.grad is not None]))
            wrapper.zero_grad()
        for each in found[1:]:
            self.same(
                each, found[0],
                'replay or recomputing gives other gradients than one graph: advance depends on more than its tokens, '
                'its state and the random state, or it needs a graph (see the rules of SegmentModel)',
            )  # fmt: skip

    def generation_is_one_pass(self) -> None:
        """Greedy tokens are those that one pass over the text would choose, in rows of different lengths too."""
        if not self.model.causal:
            return
        wrapper = SegmentWrapper(self.model, segment_length=self.length)
        prompts = [self.ids(self.length + 1), self.ids(2)]
        chosen_from: list[Tensor] = []

        def keep(logits: Tensor) -> Tensor:
            chosen_from.append(logits)
            return logits

        new = wrapper.generate_tokens(prompts, 2 * self.length, temperature=0, filter_fn=keep, progress=False)
        logits = torch.stack(chosen_from, dim=1)
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                want = wrapper.logits(torch.cat((prompt, new[row]))[None])[0][0, len(prompt) - 1 : -1]
            own = type(self.model).open_segment is not SegmentModel.open_segment
            why = 'the open segment (open_segment) is wrong' if own else 'advance reads a part of a segment otherwise'
            rule = f'generation has other logits than one pass over the text: {why}'
            self.same(logits[row], want.to(logits.dtype), rule)
