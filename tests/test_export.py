"""One segment as a graph: for any number of rows and tokens, the logits and the state of the model itself."""

import pytest
import torch
from torch import nn

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.export import export_segment, fixed_state
from segment_recurrence_pytorch.state import leaves
from tests.conftest import DROPOUT, INFINI_OPTIONS, RMT_OPTIONS, close, ids, make_infini, make_rmt

RMT = 'plain', 'learned', 'gqa', 'encoder', 'no memory', 'xl mixed', 'xl long', 'axial, xl'
INFINI = 'linear, decay', 'delta, gqa', 'deltanet, decay, gqa', 'talking heads', 'kv proj', 'above'
MODELS = {f'rmt {name}': (make_rmt, RMT_OPTIONS[name]) for name in RMT}
MODELS |= {f'infini {name}': (make_infini, INFINI_OPTIONS[name]) for name in INFINI}


def segments_of(model, rows: int, tokens: int, segments: int = 3):
    """Segments of random tokens, and what the model makes of each: (logits, leaves of the state, whose histories may
    still be shorter than in a graph)."""
    state, found = None, []
    for segment in ids(rows, segments * tokens).split(tokens, dim=1):
        hidden, state = model.advance(segment, state)
        found.append((segment, model.to_logits(hidden), state))
    return found


@pytest.mark.parametrize('name', MODELS)
def test_a_graph_of_one_segment_is_the_model(name):
    make, options = MODELS[name]
    model = make(**options).eval()
    graph = export_segment(model).module()
    longest = model.max_segment_length or 70  # more than a chunk of deltanet
    for rows, tokens in ((1, 1), (3, 2), (2, longest)):
        state = fixed_state(model, rows)
        shapes = [leaf.shape for leaf in leaves(state)]
        for segment, logits, after in segments_of(model, rows, tokens):
            have, state = graph(segment, state)
            close(have, logits)
            assert [leaf.shape for leaf in leaves(state)] == shapes
            # the same values, in a state with the full length of each history
            nowhere = torch.zeros(rows, dtype=torch.bool)
            close(leaves(state), leaves(model.where(nowhere, model.largest_state(rows), after)))


def test_a_graph_has_no_operator_of_this_library():
    """The operator of the scan exists here only; everywhere else a graph needs operators of PyTorch."""
    graph = export_segment(make_infini(use_mem_delta_rule=True)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == 'call_function']
    assert any('aten.matmul' in target for target in targets)
    assert not [target for target in targets if 'infini_transformer_pytorch' in target]


def test_exporting_is_in_evaluation_mode_and_changes_nothing():
    model = make_rmt(**DROPOUT).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = export_segment(model).module()
    assert all(module.training for module in model.modules())
    close(model.state_dict(), before)
    tokens = ids(2, 4)
    have = [graph(tokens, fixed_state(model, 2))[0] for _ in range(2)]
    close(have[0], have[1])
    wrapper = SegmentWrapper(model.eval())
    close(have[0], wrapper.logits(tokens)[0])


def test_a_fixed_state_reads_like_no_state():
    model = make_rmt(use_xl_memories=True, axial_mem_len=3)
    tokens = ids(2, 6)
    state = fixed_state(model, 2)
    assert state.xl.length == model.xl_mem_len
    assert not any(leaf.requires_grad for leaf in leaves(state))
    close(model.advance(tokens, state)[0], model.advance(tokens)[0])


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ValueError, match=r'takes a SegmentModel, not a SegmentWrapper: a wrapper has it as \.model'):
        export_segment(SegmentWrapper(make_rmt()))
    with pytest.raises(ValueError, match='not a Linear'):
        export_segment(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='batch_size is 0: give a whole number from 1 on'):
        fixed_state(make_rmt(), 0)
    with pytest.raises(ValueError, match='on the meta device'):
        export_segment(make_rmt().to('meta'))
    model = make_rmt()
    model.mesh = 'two ranks'
    with pytest.raises(ValueError, match='parameters of the model are sharded'):
        export_segment(model)
