"""Evaluation mode for the time of a `with` block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_evaluations: dict[
    nn.Module, int
] = {}  # modules that were in training mode, and the number of `evaluating` blocks that they are in
_evaluations_lock = threading.Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode inside the `with` block.

    Afterwards every submodule is in the mode in which it was before. Blocks may overlap, also in several threads: the
    modes come back when the last of them ends.

    Args:
        module: the module.
    """
    with _evaluations_lock:
        held = [each for each in module.modules() if each.training or each in _evaluations]
        for each in held:
            _evaluations[each] = _evaluations.get(each, 0) + 1
            each.training = False
    try:
        yield
    finally:
        with _evaluations_lock:
            for each in held:
                _evaluations[each] -= 1
                if not _evaluations[each]:
                    del _evaluations[each]
                    each.training = True
