"""The benchmark of what a memory buys on text: every byte is scored once, at its place in its document."""

import json

import pytest
import torch

from benchmarks import text
from benchmarks.evidence import results as evidence
from benchmarks.evidence.report import text_runs
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.graphs import TrainingStep
from segment_recurrence_pytorch.training import bits_per_byte, first_bytes, valid_streams
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
        assert [runs.keys() for runs in text_runs(tmp_path)] == [set(), {(128, 'rmt')}]
    evidence.write(tmp_path / 'earlier' / 'rmt-128-0.json', {**result, 'start': None})
    evidence.write(tmp_path / 'rmt-128-0.json', result)
    present, earlier = (runs[128, 'rmt'][0]['start'] for runs in text_runs(tmp_path))
    assert (present, earlier) == (result['start'], None)


@pytest.mark.parametrize('length', [20, 10])
def test_without_memory_a_piece_has_whole_segments(length):
    wrapper = SegmentWrapper(make_rmt(**SIZES), segment_length=16)
    piece = next(iter(valid_streams(documents(), length)))
    said = f'a piece of {length} tokens .*give a multiple of 16'
    with pytest.raises(ValueError, match=said):
        bits_per_byte(wrapper, [piece], memory=False)
    step = TrainingStep(wrapper, wrapper.model.param_groups(1e-3, 0.0), betas=(0.9, 0.99), schedule=lambda step: 1.0)
    with pytest.raises(ValueError, match=said):
        step.read(piece, None, False)
    assert step.done == 0


def test_the_first_bytes_are_of_all_documents_or_end_at_the_limit():
    given = [torch.zeros(0, dtype=torch.uint8), *documents()]
    assert [len(each) for each in first_bytes(given, 0)] == [0, 700, 300, 61, 2]
    assert [len(each) for each in first_bytes(given, 800)] == [0, 700, 100]
