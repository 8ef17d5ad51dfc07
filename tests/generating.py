"""Every causal model of the tests, and what the generation tests do with them."""

import pytest
import torch

from segment_recurrence_pytorch import SegmentWrapper
from tests.conftest import INFINI_OPTIONS, RMT_OPTIONS, long_unless, make_infini, make_rmt

LENGTH = 6
CASES = {f'rmt, {name}': (make_rmt, options) for name, options in RMT_OPTIONS.items() if options.get('causal', True)}
CASES |= {f'infini, {name}': (make_infini, options) for name, options in INFINI_OPTIONS.items()}
FEW = ['rmt, plain', 'rmt, xl mixed', 'rmt, xl long', 'rmt, no memory', 'infini, delta, gqa']
FEW += ['rmt, axial', 'infini, deltanet, decay, gqa']
ALL = pytest.mark.parametrize('case', CASES)
MANY = pytest.mark.parametrize('case', long_unless(FEW, CASES))
SOME = pytest.mark.parametrize('case', FEW)


def wrapped(case, **more):
    make, options = CASES[case]
    return SegmentWrapper(make(**{**options, **more}), segment_length=LENGTH)


def recorded(wrapper, prompt, count, **options):
    """New tokens (b, n), the logits (b, n, v) that they were chosen from, and the cursor."""
    logits = []

    def keep(given):
        logits.append(given)
        return given

    new, cursor = wrapper.generate_tokens(prompt, count, temperature=0, filter_fn=keep, return_cursor=True, **options)
    return new, torch.stack(logits, 1), cursor
