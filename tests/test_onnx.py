"""One segment in ONNX, run by onnxruntime. `make test-onnx` has what it needs."""

import warnings

import pytest
import torch

from segment_recurrence_pytorch.export import export_segment, state_tensors
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
    for rows, length in ((1, 1), (3, 2), (2, model.max_segment_length or 70)):
        state = None
        for tokens in ids(rows, 3 * length).split(length, dim=1):
            inputs = [tokens, *state_tensors(model, rows, state)]
            outputs = session.run(None, dict(zip(names, [each.numpy() for each in inputs], strict=True)))
            hidden, state = model.advance(tokens, state)
            for have, want in zip(
                map(torch.from_numpy, outputs),
                (model.to_logits(hidden), *state_tensors(model, rows, state)),
                strict=True,
            ):
                assert (have.shape, have.dtype) == (want.shape, want.dtype)
                # sums round by the size of what they sum up, which is that of the largest values
                assert not want.numel() or (have - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


def test_deltanet_has_no_onnx_form(tmp_path):
    """As the documentation says: when this fails, ONNX can solve triangular systems, and the sentence can go."""
    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        to_onnx(make_infini(memory_rule='deltanet').float(), tmp_path / 'segment.onnx')
