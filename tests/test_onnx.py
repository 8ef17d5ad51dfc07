"""One segment in ONNX, run by onnxruntime. `make test-onnx` has what it needs."""

import warnings

import pytest
import torch

from segment_recurrence_pytorch.export import export_segment, fixed_state
from segment_recurrence_pytorch.state import leaves
from tests.conftest import INFINI_OPTIONS, RMT_OPTIONS, ids, make_infini, make_rmt

NEEDS = 'needs onnx, onnxscript and onnxruntime: make test-onnx'
pytest.importorskip('onnxscript', reason=NEEDS)
onnxruntime = pytest.importorskip('onnxruntime', reason=NEEDS)

RMT = 'plain', 'gqa', 'xl mixed', 'axial'
INFINI = 'linear, decay', 'delta, gqa', 'talking heads', 'kv proj', 'above'
MODELS = {f'rmt {name}': (make_rmt, RMT_OPTIONS[name]) for name in RMT}
MODELS |= {f'infini {name}': (make_infini, INFINI_OPTIONS[name]) for name in INFINI}


def to_onnx(model, path):
    with warnings.catch_warnings():  # those of the exporter itself
        warnings.simplefilter('ignore')
        torch.onnx.export(export_segment(model), f=str(path), dynamo=True, verbose=False)
    return onnxruntime.InferenceSession(str(path))


@torch.no_grad()
@pytest.mark.parametrize('name', MODELS)
def test_onnxruntime_computes_what_the_model_computes(name, tmp_path):
    make, options = MODELS[name]
    model = make(**options).float().eval()
    session = to_onnx(model, tmp_path / 'segment.onnx')
    names = [each.name for each in session.get_inputs()]
    for rows, tokens in ((1, 1), (3, 2), (2, model.max_segment_length or 70)):
        state = fixed_state(model, rows)
        for segment in ids(rows, 3 * tokens).split(tokens, dim=1):
            hidden, after = model.advance(segment, state)
            feeds = dict(zip(names, [each.numpy() for each in (segment, *leaves(state))], strict=True))
            logits, *parts = map(torch.from_numpy, session.run(None, feeds))
            for have, want in zip((logits, *parts), (model.to_logits(hidden), *leaves(after)), strict=True):
                assert (have.shape, have.dtype) == (want.shape, want.dtype)
                # sums round by the size of what they sum up, which is that of the largest values
                assert not want.numel() or (have - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
            state = after


def test_deltanet_has_no_onnx_form(tmp_path):
    """As the documentation says: when this fails, ONNX can solve triangular systems, and the sentence can go."""
    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        to_onnx(make_infini(memory_rule='deltanet').float(), tmp_path / 'segment.onnx')
