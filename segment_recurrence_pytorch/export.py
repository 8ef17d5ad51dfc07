"""One segment of a model as a graph, for `torch.export` and ONNX. Tokens and a state go in, logits and a state come
out.

The program that runs the graph carries the state from segment to segment, as the wrapper does in PyTorch:

    exported = export_segment(model)
    state = fixed_state(model, batch_size)
    for segment in tokens.split(length, dim=1):
        logits, state = exported.module()(segment, state)

    torch.onnx.export(exported, f='segment.onnx', dynamo=True)     # needs the packages onnx and onnxscript

In ONNX, trees are flat: the inputs are the tokens and then `state.leaves` of a state, and the outputs are the logits
and then the leaves of the next state. An `InfiniTransformer` with memory_rule='deltanet' has no ONNX form, since ONNX
cannot solve triangular systems.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.checks import check_has_weights, check_whole
from segment_recurrence_pytorch.generation import evaluating
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, map_state


class OneSegment(nn.Module):
    """Reads one segment and computes its logits.

    Args:
        model: the model.
    """

    def __init__(self, model: SegmentModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the logits (b, n, num_tokens), and the state at the border after the segment.

        Args:
            tokens: token ids (b, n).
            state: the state at the border before the segment.
        """
        hidden, state = self.model.advance(tokens, state)
        return self.model.to_logits(hidden), state


def fixed_state(model: SegmentModel, batch_size: int) -> State:
    """Returns the initial state with shapes that no segment changes, as a graph needs it.

    It differs from `SegmentModel.initial_state` if the state holds a history that grows, such as XL memories: the
    history then has its full length from the start, and its counts say that nothing in it is valid yet.

    Args:
        model: the model.
        batch_size: number of rows b.

    Raises:
        ValueError: if batch_size is no whole number from 1 on, or if the model is on the meta device.
    """
    check_whole(batch_size=batch_size)
    check_has_weights(model)
    with torch.no_grad():
        nowhere = torch.zeros(batch_size, dtype=torch.bool, device=model.device)
        return model.where(nowhere, model.largest_state(batch_size), model.initial_state(batch_size))


def export_segment(model: SegmentModel) -> torch.export.ExportedProgram:
    """Returns one segment of a model as a graph, in evaluation mode, for any number of rows and tokens.

    The graph takes token ids (b, n) and a state, such as `fixed_state` returns, and returns what `OneSegment` returns.
    There is no padding: all tokens are valid. The model itself is not changed.

    Args:
        model: the model. A model of your own must not compute with `len(tensor)`, which would fix the batch size: use
            `tensor.shape[0]`.

    Raises:
        ValueError: if the model is no `SegmentModel`, is sharded, or is on the meta device.
    """
    if not isinstance(model, SegmentModel):
        raise ValueError(
            f'export_segment takes a SegmentModel, not a {type(model).__name__}: a wrapper has it as .model'
        )
    if model.mesh is not None:
        raise ValueError(
            'the parameters of the model are sharded: save its weights, and export a model that loads them'
        )
    state = fixed_state(model, 2)
    length = model.max_segment_length
    tokens = torch.zeros(2, 2 if length is None else min(2, length), dtype=torch.long, device=model.device)
    rows = torch.export.Dim('rows', min=1)
    columns = None if length == 1 else torch.export.Dim('tokens', min=1, max=length)
    shapes = {0: rows, 1: columns}, map_state(lambda tensor: {0: rows}, state)
    with evaluating(model), torch.no_grad():
        return torch.export.export(OneSegment(model), (tokens, state), dynamic_shapes=shapes, strict=False)
