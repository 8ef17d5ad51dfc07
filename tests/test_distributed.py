"""Two and four processes give the numbers of one. The cases are in `distributed_cases`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import context_parallel
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.distributed import sync_gradients
from tests import distributed_cases, ranks
from tests.conftest import make_rmt, same_gradients


@pytest.fixture(scope='session')
def results(tmp_path_factory, request):
    """A function from a number of processes to what went wrong in each case. The processes are started once."""
    return ranks.once(distributed_cases, tmp_path_factory, request.config)


NAMED = [(count, name) for count in (2, 4) for name in ranks.cases(distributed_cases, count)]


@pytest.mark.parametrize(('count', 'name'), NAMED, ids=[f'{count} ranks, {name}' for count, name in NAMED])
def test_ranks_are_one_process(results, count, name):
    wrong = results(count)[name]
    assert not wrong, wrong


def test_one_process_needs_no_group():
    """`forward` is `loss`, and there is nothing to average: the same script runs in one process."""
    x, found = torch.arange(80).view(4, 20).remainder(20), []
    for calls in (1, 4):
        torch.manual_seed(0)
        wrapper, targets = SegmentWrapper(make_rmt(), process_group=torch.distributed.group.WORLD), 0
        for rows in x.chunk(calls):
            targets += wrapper(rows, reduction='sum', backward=True).num_targets
        sync_gradients(wrapper, targets)
        found.append({name: parameter.grad for name, parameter in wrapper.named_parameters()})
    wrapper.zero_grad()
    wrapper(x).loss.backward()
    sync_gradients(wrapper)
    for have in found:
        same_gradients(have, {name: parameter.grad for name, parameter in wrapper.named_parameters()})


def test_tables_of_the_page_are_what_the_functions_say():
    root = Path(__file__).resolve().parent.parent
    page = (root / 'docs' / 'distributed.md').read_text()
    measured = json.loads((root / 'benchmarks' / 'results' / 'context_parallel.json').read_text())
    assert context_parallel.table() in page
    assert context_parallel.equality(measured['rows']) in page
    assert max(row[what] for row in measured['rows'] for what in ('loss', 'gradients')) < 1e-12
    assert f'{measured["tokens"]} tokens in segments of {measured["segment"]}' in page.replace('\n', ' ')


def test_bytes_that_ring_attention_sends():
    """One token of 3 ranks and 1 head with 1 feature: 2 numbers go to 2 ranks, and again in backward, and their
    gradients to all 3."""
    assert context_parallel.ring_bytes_a_token(ranks=3, kv_heads=1, dim_head=1) == (2 + 2 + 3) * 2 * 2
    assert context_parallel.bytes_a_token(ranks=3, tokens=4, kv_heads=1, dim_head=1) == 2 * (2 + 2) * 4 / 4
