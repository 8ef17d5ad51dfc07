"""One segment as a graph: for any number of rows and tokens, the logits and the state of the model itself."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.export import export_segment, state_tensors
from tests.conftest import DROPOUT, INFINI_OPTIONS, RMT_OPTIONS, close, ids, long_unless, make_infini, make_rmt

RMT = 'plain', 'learned', 'gqa', 'encoder', 'no memory', 'xl mixed', 'xl long', 'axial, xl'
INFINI = 'linear, decay', 'delta, gqa', 'deltanet, decay, gqa', 'talking heads', 'kv proj', 'above'
FEW = 'rmt plain', 'rmt xl mixed', 'rmt axial, xl', 'infini deltanet, decay, gqa', 'infini above'
MODELS = {f'rmt {name}': (make_rmt, RMT_OPTIONS[name]) for name in RMT}
MODELS |= {f'infini {name}': (make_infini, INFINI_OPTIONS[name]) for name in INFINI}


@pytest.mark.parametrize('name', long_unless(FEW, MODELS))
def test_a_graph_of_one_segment_is_the_model(name):
    make, options = MODELS[name]
    model = make(**options).eval()
    graph = export_segment(model).module()
    longest = model.max_segment_length or 70  # more than a chunk of deltanet
    for rows, length in ((1, 1), (3, 2), (2, longest)):
        have, want = state_tensors(model, rows), None
        shapes = [tensor.shape for tensor in have]
        for tokens in ids(rows, 3 * length).split(length, dim=1):
            logits, *have = graph(tokens, *have)
            hidden, want = model.advance(tokens, want)
            close(logits, model.to_logits(hidden))
            close(have, state_tensors(model, rows, want))
            assert [tensor.shape for tensor in have] == shapes


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
    have = [graph(tokens, *state_tensors(model, 2))[0] for _ in range(2)]
    close(have[0], have[1])
    wrapper = SegmentWrapper(model.eval())
    close(have[0], wrapper.logits(tokens)[0])


def test_a_graph_in_a_file_needs_no_library(tmp_path):
    """Another process, which cannot import this library, goes on where the wrapper stopped."""
    model = make_rmt(use_xl_memories=True, axial_mem_len=3).eval()
    wrapper = SegmentWrapper(model)
    tokens = ids(2, 20)
    logits, _ = wrapper.logits(tokens)
    _, state = wrapper.logits(tokens[:, :12])
    torch.export.save(export_segment(model), tmp_path / 'segment.pt2')
    torch.save([tokens[:, 12:18], *state_tensors(model, 2, state)], tmp_path / 'inputs.pt')
    code = """
import sys, torch
sys.path = [path for path in sys.path if 'segment' not in path]
sys.modules['segment_recurrence_pytorch'] = sys.modules['recurrent_memory_transformer_pytorch'] = None
tokens, *state = torch.load('inputs.pt')
torch.save(torch.export.load('segment.pt2').module()(tokens, *state)[0].detach(), 'logits.pt')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / 'logits.pt'), logits[:, 12:18].detach())


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ValueError, match=r'takes a SegmentModel, not a SegmentWrapper: a wrapper has \.model'):
        export_segment(SegmentWrapper(make_rmt()))
    with pytest.raises(ValueError, match='not a Linear'):
        export_segment(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='batch_size is 0: give a whole number from 1 on'):
        state_tensors(make_rmt(), 0)
    with pytest.raises(ValueError, match='shape'):
        state_tensors(make_rmt(), 2, make_rmt().initial_state(3))
    with pytest.raises(ValueError, match='on the meta device'):
        export_segment(make_rmt().to('meta'))
    model = make_rmt()
    model.mesh = 'two ranks'
    with pytest.raises(ValueError, match='parameters of the model are sharded'):
        export_segment(model)
