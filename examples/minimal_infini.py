"""The Infini-Transformer (arXiv 2404.07143) in one file of plain PyTorch.

A text is read segment by segment, with causal attention inside each segment. Beside it, each head of each layer has a
compressive memory of all segments before: a matrix M and a normaliser z, which sum up the keys and values of their
tokens. A query recalls from it a mean of all past values, weighted by how well their keys fit, at a cost that does not
grow with the text. M and z of each layer are the state. By the linear rule (delta=False) each token adds its value to
M, by the delta rule (delta=True) only the difference from what M holds for its key already.

Equations are numbered as in version 1 of the paper; version 2 adds 4 to each number. Rotary positions count inside a
segment, and the memory knows no positions. The library's model with the same weights, by the same names, is
`InfiniTransformer` with memory_rule='delta' or 'linear', and its other options left at their defaults. As there,
sigmoid(gate) is the share of the local attention, so a gate is minus the beta of equation 6.

    python examples/minimal_infini.py          # learns to remember, in about a minute on one CPU thread

Letters: b batch, n tokens of a segment, h heads, d features of a head.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Memory = tuple[Tensor, Tensor]  # M (b, h, d, d) and z (b, h, d) of one layer


def rotated(t: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i + 1) of queries or keys (b, h, n, d) by their positions (arXiv 2104.09864)."""
    n, d = t.shape[-2:]
    frequencies = 10000 ** -(torch.arange(0, d, 2, device=t.device, dtype=t.dtype) / d)
    angles = torch.arange(n, device=t.device, dtype=t.dtype)[:, None] * frequencies
    x, y = t.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x * angles.cos() - y * angles.sin(), y * angles.cos() + x * angles.sin()), dim=-1).flatten(-2)


class InfiniAttention(nn.Module):
    def __init__(self, dim: int, heads: int, delta: bool):
        super().__init__()
        self.heads, self.delta = heads, delta
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.fastweight_mem = nn.ParameterDict({'head_gates': torch.zeros(heads)})  # 0: equal shares

    def forward(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, h, n, d) each
        out = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        q, k = F.elu(q) + 1, F.elu(k) + 1  # sigma; from here on nothing is rotated
        M = z = k.new_zeros(())
        if memory is not None:  # in the first segment there is nothing to recall, and nothing to correct
            M, z = memory
            recalled = q @ M / (q @ z[..., None])  # equation 3
            share = self.fastweight_mem['head_gates'].sigmoid()[:, None, None]
            out = share * out + (1 - share) * recalled  # equation 6
            if self.delta:
                v = v - k @ M / (k @ z[..., None])  # equation 5: what the memory says already is not written again
        after = M + k.mT @ v, z + k.sum(dim=-2)  # equation 4
        return self.to_out(out.transpose(1, 2).flatten(-2)), after


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, delta: bool):
        super().__init__()
        self.attn_norm = nn.RMSNorm(dim, eps=1e-12)  # as good as none, as in the published package
        self.attn = InfiniAttention(dim, heads, delta)
        self.ff_norm = nn.RMSNorm(dim, eps=1e-12)
        inner = dim * 8 // 3
        self.ff = nn.ModuleDict({'proj_in': nn.Linear(dim, 2 * inner), 'proj_out': nn.Linear(inner, dim)})

    def forward(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        out, after = self.attn(self.attn_norm(x), memory)
        x = x + out
        values, gates = self.ff['proj_in'](self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff['proj_out'](values * F.gelu(gates)), after  # GEGLU (arXiv 2002.05202)


class MinimalInfini(nn.Module):
    def __init__(self, num_tokens: int, dim: int, depth: int, heads: int, delta: bool = True):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.5)
        self.layers = nn.ModuleList(Block(dim, heads, delta) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-12)
        self.logits = nn.Linear(dim, num_tokens)

    def forward(self, tokens: Tensor, memories: list[Memory] | None = None) -> tuple[Tensor, list[Memory]]:
        """Reads one segment (b, n). Returns its logits (b, n, num_tokens), and the memories of all layers after it."""
        x, after = self.token_emb(tokens), []
        for i, layer in enumerate(self.layers):
            x, memory = layer(x, None if memories is None else memories[i])
            after.append(memory)
        return self.logits(self.norm(x)), after


def read(model: nn.Module, tokens: Tensor, segment_length: int) -> Tensor:
    """Reads texts of any length segment by segment, and returns all of their logits."""
    memories, logits = None, []
    for segment in tokens.split(segment_length, dim=1):
        segment_logits, memories = model(segment, memories)
        logits.append(segment_logits)
    return torch.cat(logits, dim=1)


def main(steps: int = 600, seed: int = 0, sequences: int = 64) -> dict[int, float]:
    """Trains a model to remember a marked token, and returns the accuracy by number of segments."""
    from segment_recurrence_pytorch.tasks import Memorize, SegmentCurriculum  # the data; the model is all above

    generator = torch.manual_seed(seed)
    # The first segment holds `MARK value` among noise, and the last token of the text asks for the value. Few segments
    # come first; one more is added when the probability of the right answer has been 0.9 for some time.
    task, curriculum = Memorize(), SegmentCurriculum([2, 3, 4, 5], threshold=0.9)
    model = MinimalInfini(task.num_tokens, dim=64, depth=2, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    # the learning rate warms up, then goes straight down to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f'{size:,} parameters learn which of {task.values} tokens was marked in the first segment of a text')
    for step in range(1, steps + 1):
        segments = curriculum.draw(generator)
        tokens, labels = task.batch(segments, 32, generator)
        loss = F.cross_entropy(read(model, tokens, task.segment_length).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()  # through all segments
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curriculum.update(loss.neg().exp().item(), segments)
        if step % 100 == 0:
            print(f'step {step:4} of {steps}, segments up to {curriculum.stages[curriculum.stage]}, loss {loss:.3f}')

    accuracy = {}
    print('\nsegments    tokens    remembered')
    for segments in (2, 3, 4, 5, 8, 16, 64, 256):
        tokens, labels = task.batch(segments, sequences, generator)
        with torch.no_grad():
            answers = read(model, tokens, task.segment_length)[:, -1].argmax(dim=-1)
        accuracy[segments] = (answers == labels[:, -1]).float().mean().item()
        bar, note = '#' * round(20 * accuracy[segments]), '  longer than in training' * (segments > 5)
        print(f'{segments:8}{tokens.shape[1]:10,}{accuracy[segments]:14.1%}  {bar}{note}')
    print(f'guessing {1 / task.values:23.1%}')
    return accuracy


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=600, help='of the training (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and data (default: %(default)s)')
    main(**vars(parser.parse_args()))
