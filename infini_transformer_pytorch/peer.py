"""Checkpoints of infini-transformer-pytorch 0.2.1: the names of their weights, and the sign of their learned
strength."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

NAMES = [
    (r'layers\.(\d+)\.0\.norm\.gamma', r'layers.\1.attn_norm.weight'),
    (r'layers\.(\d+)\.0\.to_(qkv|out)\.weight', r'layers.\1.attn.to_\2.weight'),
    (r'layers\.(\d+)\.0\.fastweight_mem\.head_gates', r'layers.\1.attn.fastweight_mem.head_gates'),
    (r'layers\.(\d+)\.0\.to_learned_delta_update_weights\.0\.weight', r'layers.\1.attn.to_strength.weight'),
    (r'layers\.(\d+)\.1\.norm\.gamma', r'layers.\1.ff_norm.weight'),
    (r'layers\.(\d+)\.1\.(proj_in|proj_out)\.(weight|bias)', r'layers.\1.ff.\2.\3'),
    (r'norm\.gamma', 'norm.weight'),
    (r'to_logits\.(weight|bias)', r'logits.\1'),
    (r'(token_emb\.weight)', r'\1'),
]
COMPUTED = re.compile(r'layers\.\d+\.0\.rotary_emb\.\w+')  # rotary frequencies, which are computed here


def translated(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of such a checkpoint under the names that they have in this library.

    Args:
        state_dict: the weights of the checkpoint.

    Raises:
        ValueError: if a name is not one of such a checkpoint.
    """
    weights = {}
    for name, tensor in state_dict.items():
        if COMPUTED.fullmatch(name):
            continue
        ours = next((re.sub(old, new, name) for old, new in NAMES if re.fullmatch(old, name)), None)
        if ours is None:
            raise ValueError(f'{name} is no weight of infini-transformer-pytorch 0.2.1')
        # the published model learns the share that is not written: sigmoid(-x) = 1 - sigmoid(x)
        weights[ours] = -tensor if ours.endswith('to_strength.weight') else tensor
    return weights


def arguments_of(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the constructor arguments that can be told from the shapes of the weights.

    Args:
        state_dict: the weights of the checkpoint.

    Raises:
        ValueError: if a weight that such a checkpoint has is missing.
    """
    try:
        num_tokens, dim = state_dict['token_emb.weight'].shape
        heads = state_dict['layers.0.0.fastweight_mem.head_gates'].shape[0]
        inner = state_dict['layers.0.0.to_out.weight'].shape[1]
        ff_inner = state_dict['layers.0.1.proj_out.weight'].shape[1]
    except KeyError as error:
        raise ValueError(f'no checkpoint of infini-transformer-pytorch 0.2.1: {error.args[0]} is missing') from error
    depth = 1 + max(int(name.split('.')[1]) for name in state_dict if name.startswith('layers.'))
    return {
        'num_tokens': num_tokens,
        'dim': dim,
        'depth': depth,
        'heads': heads,
        'dim_head': inner // heads,
        # the smallest ff_mult that gives this number of inner features, int(ff_mult * dim * 2 / 3)
        'ff_mult': next(mult for mult in (ff_inner * 1.5 / dim, (ff_inner + 0.5) * 1.5 / dim)
                        if int(mult * dim * 2 / 3) == ff_inner),
        'learned_delta_update': 'layers.0.0.to_learned_delta_update_weights.0.weight' in state_dict,
    }  # fmt: skip
