"""One segment of a model as a graph, for `torch.export` and ONNX.

Tokens and the tensors of a state go in. The logits and the tensors of the next state come out.

The program that runs the graph carries the state from segment to segment, as the wrapper does in PyTorch:

    segment = export_segment(model)
    state = state_tensors(model, batch_size)
    for tokens in text.split(length, dim=1):
        logits, *state = segment.module()(tokens, *state)

    torch.export.save(segment, 'segment.pt2')                     # can be loaded without this library
    torch.onnx.export(segment, f='segment.onnx', dynamo=True)     # needs the packages onnx and onnxscript

An `InfiniTransformer` with memory_rule='deltanet' has no form in ONNX, which cannot solve triangular systems.

Letters: b rows of the batch, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.checks import check_has_weights, check_whole
from segment_recurrence_pytorch.evaluating import evaluating
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.state import State, from_list, leaves, to_list


class OneSegment(nn.Module):
    """Reads one segment and computes its logits. It takes and returns the tensors of a state, not their tree.

    Args:
        model: the model.
    """

    def __init__(self, model: SegmentModel):
        super().__init__()
        self.model = model
        self.like = _fixed(model, 1, None)

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits (b, n, num_tokens), and the tensors of the state at the border after the segment.

        Args:
            tokens: token ids (b, n).
            state: the tensors of the state at the border before the segment, see `state_tensors`.
        """
        tensors = iter(state)
        parts = [None if part is None else next(tensors) for part in to_list(self.like)]
        hidden, after = self.model.advance(tokens, from_list(parts, self.like))
        return self.model.to_logits(hidden), *leaves(after)


def state_tensors(model: SegmentModel, batch_size: int, state: State = None) -> list[Tensor]:
    """Returns the tensors of a state, with shapes that no segment changes, as a graph needs it.

    The shapes differ from those in a state of the model if the state holds a history that grows, such as XL memories:
    the history then has its full length from the start, and its counts tell how much of it is valid.

    Args:
        model: the model.
        batch_size: number of rows b.
        state: a state that the model or its wrapper returned. Default: None, the initial state.

    Raises:
        ValueError: if batch_size is no whole number from 1 on, if the model is on the meta device, or if the state does
            not fit.
    """
    check_whole(batch_size=batch_size)
    check_has_weights(model)
    return leaves(_fixed(model, batch_size, state))


def export_segment(model: SegmentModel) -> torch.export.ExportedProgram:
    """Returns one segment of a model as a graph, in evaluation mode, for any number of rows and tokens.

    The graph takes token ids (b, n) and the tensors of a state (`state_tensors`), and returns what `OneSegment`
    returns. There is no padding: all tokens are valid. The model itself is not changed.

    Args:
        model: the model. A model of your own must not compute with `len(tensor)`, which would fix the batch size: use
            `tensor.shape[0]`.

    Raises:
        ValueError: if the model is no `SegmentModel`, is one of transformers with a memory, is sharded, or is on the
            meta device.
    """
    if not isinstance(model, SegmentModel):
        raise ValueError(f'export_segment takes a SegmentModel, not a {type(model).__name__}: a wrapper has .model')
    if not model.can_export:
        raise ValueError(
            f'{type(model).__name__} cannot be a graph: the code of transformers fixes the number of rows. Models of '
            'this library can'
        )
    if model.mesh is not None:
        raise ValueError(
            'the parameters of the model are sharded: save its weights, and export a model that loads them'
        )
    state = state_tensors(model, 2)
    length = model.max_segment_length
    tokens = torch.zeros(2, 2 if length is None else min(2, length), dtype=torch.long, device=model.device)
    rows = torch.export.Dim('rows', min=1)
    columns = None if length == 1 else torch.export.Dim('tokens', min=1, max=length)
    shapes = {0: rows, 1: columns}, tuple({0: rows} for _ in state)
    with evaluating(model), torch.no_grad():
        return torch.export.export(OneSegment(model), (tokens, *state), dynamic_shapes=shapes, strict=False)


def _fixed(model: SegmentModel, batch_size: int, state: State) -> State:
    """Returns a state whose histories have their full length."""
    if state is not None:
        state = model.as_state(state, batch_size)
        model.check_state(state, batch_size)
    with torch.no_grad():
        state = model.initial_state(batch_size) if state is None else state
        nowhere = torch.zeros(batch_size, dtype=torch.bool, device=model.device)
        return model.where(nowhere, model.largest_state(batch_size), state)
