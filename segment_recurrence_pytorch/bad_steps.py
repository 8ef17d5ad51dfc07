"""Finds out where NaN and infinite values come from, after a training step met some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from segment_recurrence_pytorch.data import Piece
from segment_recurrence_pytorch.state import State, leaves
from segment_recurrence_pytorch.wrapper import SegmentWrapper

NOTHING_BY_ITSELF = 'nothing in a segment by itself: the sum of the gradients of all segments'


def all_finite(*tensors: Tensor) -> bool:
    """Returns whether no value is NaN or infinite. It waits for the device once.

    Args:
        tensors: tensors of any shapes. Those that hold whole numbers are finite.
    """
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def bad_weight(module: nn.Module) -> str | None:
    """Returns the name of the first parameter or buffer that holds NaN or infinite values, or None."""
    tensors = module.state_dict()
    if all_finite(*tensors.values()):
        return None
    return next(name for name, tensor in tensors.items() if not all_finite(tensor))


def first_bad_tensor(wrapper: SegmentWrapper, piece: Piece, state: State, memory: bool) -> str:
    """Reads a piece again, segment by segment, and says which tensor is the first one with NaN or infinite values.

    The tensors are looked at in the order in which they are computed: the weights, the state that enters the piece, the
    outputs of the modules in each segment, its loss, the state after it, and then the gradients of these outputs and of
    the parameters, for the loss of each segment. With dropout, other random numbers are drawn than the first time. The
    gradients of the parameters are overwritten.

    Args:
        wrapper: the model in its wrapper.
        piece: the piece of the streams.
        state: the state that entered it, or None.
        memory: whether the state is carried from segment to segment. See `training.train_loss`.

    Returns:
        The place and the name of the tensor, as words for an error message.
    """
    model, length = wrapper.model, wrapper.segment_length
    if name := bad_weight(model):
        return f'the weight {name}'
    if not all_finite(*leaves(state)):
        return 'the state that enters the step'
    tokens = piece.tokens.to(model.device)
    segments = [tokens[:, start : start + length + 1] for start in range(0, tokens.shape[1] - 1, length)]
    state = wrapper.reset(state, piece.starts) if memory else None
    losses: list[Tensor] = []
    gradients: list[str] = []
    for i, segment in enumerate(segments):
        where = f'segment {i + 1} of {len(segments)}: '
        with _watched(model, gradients) as outputs:
            loss, _, state = wrapper.loss(segment, state if memory else None)
        if outputs:
            return f'{where}the output of {outputs[0]}'
        if not all_finite(loss):
            return f'{where}the loss'
        if memory and not all_finite(*leaves(state)):
            return f'{where}the state after it'
        losses.append(loss)
    for i, loss in enumerate(losses):
        model.zero_grad()
        loss.backward(retain_graph=True)
        bad = (name for name, parameter in model.named_parameters() if not _finite_gradient(parameter))
        if name := next(iter(gradients), None) or next(bad, None):
            return f'segment {i + 1} of {len(segments)}: the gradient of {name}, which comes from the loss there'
    return NOTHING_BY_ITSELF


@contextmanager
def _watched(model: nn.Module, gradients: list[str]) -> Iterator[list[str]]:
    """Looks at what each module returns, as long as the block lasts, and at its gradient, whenever that is computed.

    Args:
        model: the model.
        gradients: gets the names of the outputs whose gradient is not finite, in the order of backward.

    Yields:
        A list that gets the names of the modules whose output is not finite, in the order in which they run.
    """
    outputs: list[str] = []

    def watch(name: str, output: Any) -> None:
        for leaf in leaves(output):
            if not all_finite(leaf):
                outputs.append(name)
            elif leaf.requires_grad:
                leaf.register_hook(lambda grad: None if all_finite(grad) else gradients.append(f'the output of {name}'))

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: watch(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _finite_gradient(parameter: Tensor) -> bool:
    return parameter.grad is None or all_finite(parameter.grad)
