"""The benchmark of what a memory buys on text: every byte is scored once, at its place in its document."""

import json

import pytest
import torch

from benchmarks import text
from benchmarks.evidence import results as evidence
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.training import bits_per_byte, valid_streams
from tests.conftest import make_rmt

SIZES = {'num_tokens': 256, 'seq_len': 16}


def documents():
    """Of lengths that end within a segment, a window and a range of positions."""
    return [torch.randint(256, (length,), dtype=torch.uint8) for length in (700, 300, 61, 2)]


@pytest.mark.parametrize('memory', [True, False])
def test_the_scores_by_position_are_the_score(memory):
    wrapper, given = SegmentWrapper(make_rmt(**SIZES), segment_length=16), documents()
    losses, counts = text.by_position(wrapper, given, memory, overlap=False)
    assert sum(counts) == sum(len(each) - 1 for each in given)
    # positions 1 to 63 of four documents, 64 to 127 of two, and so on
    assert counts[:4] == [63 + 63 + 60 + 1, 128, 256, 256 + 44]
    want = bits_per_byte(wrapper, valid_streams(given, text.LENGTH), memory)
    assert sum(losses) / sum(counts) == pytest.approx(want, abs=1e-6)


def test_windows_that_overlap_score_every_byte_once():
    wrapper, given = SegmentWrapper(make_rmt(**SIZES), segment_length=16), documents()
    places = torch.cat([at[counted] for _, at, counted in text.windows(wrapper, given[:1], False)])
    assert places.sort().values.tolist() == list(range(1, 700))
    losses, counts = text.by_position(wrapper, given, False, overlap=True)
    assert sum(counts) == sum(len(each) - 1 for each in given)
    # the byte at 20 is predicted from the window that begins at 8, which holds eight to fifteen bytes before it
    window = given[0][8:25].long()[None]
    want = wrapper.loss(window, reduction='none').loss[0, 11]
    for nll, at, counted in text.windows(wrapper, given[:1], False):
        assert nll[counted & (at == 20)].item() == pytest.approx(want.item(), abs=1e-9)
        break
    assert losses[0] > 0


def test_every_run_has_a_model_of_its_own_size():
    sizes = {arm: sum(p.numel() for p in text.build(arm, 64).parameters()) for arm in text.LABELS}
    assert max(sizes.values()) < 1.02 * min(sizes.values()), 'equal parameters'
    assert len(text.RUNS) == len(set(text.RUNS)) == 33


def test_a_run_with_other_initial_weights_counts_as_missing(tmp_path):
    result = text.train('rmt', 128, 0, 'cpu', 2, 4096)
    evidence.write(tmp_path / 'rmt-128-0.json', result)
    assert text.stored(tmp_path, 'rmt', 128, 0) == json.loads(json.dumps(result))
    assert text.stored(tmp_path, 'rmt', 128, 1) is None
    for start in ('0123456789abcdef', None):
        evidence.write(tmp_path / 'rmt-128-0.json', {**result, 'start': start})
        assert text.stored(tmp_path, 'rmt', 128, 0) is None
