"""`SegmentLM`: scores a `SegmentWrapper` with `lm_eval`, the evaluation harness of EleutherAI (extra `eval`).

    results = lm_eval.simple_evaluate(SegmentLM(wrapper, tokenizer), tasks=['lambada_openai'])

Texts of any length are read whole: the state goes from segment to segment, and nothing is cut.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from segment_recurrence_pytorch.checks import check_whole, needs_extra
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.wrapper import SegmentWrapper

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise needs_extra('SegmentLM', 'eval', error) from error


# the names that tasks give to the number of new tokens, the most important one first
LIMITS = 'max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens'
SAMPLING = 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'
GENERATION = {*LIMITS, *SAMPLING, 'until', 'do_sample', 'num_beams'}


class SegmentLM(TemplateLM):
    """The interface of `lm_eval` to a wrapper of any causal model.

    Args:
        wrapper: the wrapper. Its `process_group` and `ignore_index` play no part.
        tokenizer: the tokenizer of transformers that belongs to the model. Special tokens are not added.
        batch_size: number of rows that are scored together. Default: 8.
        max_gen_toks: number of new tokens of an answer, if the task does not tell it. Default: 256.

    Raises:
        ValueError: if a number is not positive, if the tokenizer has no token that ends a text, or if the wrapper has
            align='right', with which a text has other segments than its beginning.
    """

    def __init__(self, wrapper: SegmentWrapper, tokenizer: Any, *, batch_size: int = 8, max_gen_toks: int = 256):
        super().__init__()
        check_whole(batch_size=batch_size, max_gen_toks=max_gen_toks)
        if not isinstance(wrapper, SegmentWrapper):
            raise ValueError(f'SegmentLM takes a SegmentWrapper, not a {type(wrapper).__name__}: wrap the model first')
        if getattr(tokenizer, 'eos_token_id', None) is None:
            raise ValueError('the tokenizer has no eos_token: set tokenizer.eos_token to the token that ends a text')
        if wrapper.align == 'right':
            raise ValueError(
                "align='right' gives a text other segments than its beginning has: score with align='left'"
            )
        # a text is scored as generation reads it: no id is padding, and each process has texts of its own
        self.wrapper = copy.copy(wrapper)  # the same model
        self.wrapper.process_group, self.wrapper.ignore_index = None, IGNORE
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the token that stands before a text: that of its beginning if there is one, else of its end."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer."""
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text."""
        return self.tokenizer.encode(string, add_special_tokens=False)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns, for each request (texts, ids of a context, ids of its continuation), the log-likelihood of the
        continuation, and whether it is what greedy decoding gives."""
        device, found = self.wrapper.model.device, []
        with evaluating(self.wrapper.model):
            for start in tqdm(range(0, len(requests), self.batch_size), disable=disable_tqdm):
                pairs = [(context, ids) for _, context, ids in requests[start : start + self.batch_size]]
                # the context is read without logits, but for its last segment
                cursor = self.wrapper.read([torch.tensor(context, device=device) for context, _ in pairs])
                lengths = cursor.lengths.tolist()
                rows = [
                    torch.cat((tokens[:length], torch.tensor(ids[:-1], dtype=torch.long, device=device)))
                    for tokens, length, (_, ids) in zip(cursor.tokens, lengths, pairs, strict=True)
                ]
                mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
                hidden, _ = self.wrapper.hidden(pad_sequence(rows, batch_first=True), cursor.state, mask=mask)
                for row, length, (_, ids) in zip(hidden, lengths, pairs, strict=True):
                    asked = row[length - 1 : length - 1 + len(ids)]
                    scores = self.wrapper.model.to_logits(asked).float().log_softmax(-1)
                    want = torch.tensor(ids, device=device)
                    likelihood = scores.gather(1, want[:, None]).sum().item()
                    found.append((likelihood, bool((scores.argmax(-1) == want).all())))
        return found

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text."""
        found = []
        with evaluating(self.wrapper.model):
            for request in tqdm(requests, disable=disable_tqdm):
                ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
                x = torch.tensor([ids], device=self.wrapper.model.device)
                found.append(-self.wrapper.loss(x, reduction='sum').loss.item())
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each request: what is generated up to the first of its stop texts.

        Raises:
            ValueError: if a task asks for an option of generation that is not known here, or for a search by beams.
        """
        found, device = [], self.wrapper.model.device
        for request in tqdm(requests, disable=disable_tqdm):
            context, options = request.args
            stops = options.get('until') or []
            stops = [stops] if isinstance(stops, str) else stops
            stops = [stop for stop in stops if stop]
            if unknown := set(options) - GENERATION:
                raise ValueError(f'a task asks for the option {min(unknown)!r} of generation, which is not known here')
            if options.get('num_beams', 1) != 1:
                raise ValueError(f'a task asks for num_beams={options["num_beams"]}: there is no beam search here')
            most = next((options[name] for name in LIMITS if options.get(name) is not None), self.max_gen_toks)
            sampling: dict[str, Any] = {'temperature': 0.0}
            if options.get('do_sample', (options.get('temperature') or 0) > 0):
                sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
            prompt = torch.tensor([self.tok_encode(context) or [self.prefix_token_id]], device=device)
            ids: list[int] = []
            text = ''
            for token in self.wrapper.stream(
                prompt,
                max_new_tokens=most,
                eos_token_id=self.eot_token_id,
                **sampling,
            ):
                if int(token) == self.eot_token_id:
                    break
                ids.append(int(token))
                text = self.tokenizer.decode(ids)
                if any(stop in text for stop in stops):
                    break
            for stop in stops:
                text = text.split(stop)[0]
            found.append(text)
        return found
