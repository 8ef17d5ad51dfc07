"""Makes infini_peer.safetensors with infini-transformer-pytorch 0.2.1: run it with that package's environment.

.venv-peer/bin/python tests/data/make_infini_peer.py     (needs safetensors there)
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from infini_transformer_pytorch import InfiniTransformer

GRADIENTS = {
    'token_emb.weight': 'token_emb.weight',
    'layers.0.0.to_qkv.weight': 'layers.0.attn.to_qkv.weight',
    'layers.1.0.fastweight_mem.head_gates': 'layers.1.attn.fastweight_mem.head_gates',
}


def main() -> None:
    """Weights, logits over four segments of 6, and truncated losses with their gradients, of four small models."""
    out = {}
    for case in ('linear', 'delta', 'linear_learned', 'delta_learned'):
        torch.manual_seed(0)
        model = InfiniTransformer(
            num_tokens=11,
            dim=12,
            depth=2,
            heads=2,
            dim_head=4,
            use_mem_delta_rule='delta' in case,
            learned_delta_update='learned' in case,
        ).double()
        with torch.no_grad():
            for layer in model.layers:
                layer[0].fastweight_mem.head_gates.uniform_(-1, 1)
        x = torch.randint(0, 11, (2, 24))
        memories, logits = None, []
        for segment in x.split(6, dim=1):
            segment_logits, _, memories = model(segment, past_memories=memories, return_new_memories=True)
            logits.append(segment_logits)
        out |= {f'{case}/weights/{name}': tensor.clone() for name, tensor in model.state_dict().items()}
        out |= {f'{case}/x': x, f'{case}/logits': torch.cat(logits, dim=1).detach()}
        for k in (2, 3):
            model.zero_grad()
            memories, total = None, 0.0
            for i, (segment, target) in enumerate(zip(x[:, :-1].split(6, 1), x[:, 1:].split(6, 1), strict=True)):
                logits_i, _, memories = model(segment, past_memories=memories, return_new_memories=True)
                total = total + F.cross_entropy(logits_i.flatten(0, 1), target.flatten(), reduction='sum') / 46
                if (i + 1) % k == 0:
                    memories = [type(layer)(*(part.detach() for part in layer)) for layer in memories]
            total.backward()
            out[f'{case}/loss_{k}'] = total.detach()
            for theirs, ours in GRADIENTS.items():
                out[f'{case}/gradient_{k}/{ours}'] = model.get_parameter(theirs).grad.clone()
    save_file(out, Path(__file__).parent / 'infini_peer.safetensors')


if __name__ == '__main__':
    main()
