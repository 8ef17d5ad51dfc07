"""The Recurrent Memory Transformer (arXiv 2207.06881, section 3; 2304.11062) in one file of plain PyTorch.

A text is read segment by segment. Each segment stands between two copies of the memory, m vectors that the segment
before has written, and a transformer reads all of these rows:

    [read memory | text | write memory]

What the last layer makes of the write rows is the memory of the next segment. Who sees whom: a read row sees the read
rows, a text row the read rows and the text up to itself, and a write row sees everything. The gradient of the loss
passes through the memory, so that a question at the end of a text teaches its first segment what to write.

The library's model with the same weights, by the same names, is the causal `RecurrentMemoryTransformer` with
write_init='previous', memory_mask='block' and abs_pos_emb=True, without XL memories and without rotary positions. The
paper's memory is the same in both places; the embedding that tells the read rows apart is the library's addition.

    python examples/minimal_rmt.py          # learns to remember, in about a minute and a half on one CPU thread

Letters: b batch, n tokens of a segment, m memory tokens, h heads, d features of a head.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (b, h, m + n + m, d) each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ff_norm = nn.RMSNorm(dim, eps=1e-6)
        inner = dim * 8 // 3
        self.ff = nn.ModuleDict({'proj_in': nn.Linear(dim, 2 * inner), 'proj_out': nn.Linear(inner, dim)})

    def forward(self, x: Tensor, sees: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), sees)
        values, gates = self.ff['proj_in'](self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.ff['proj_out'](values * F.gelu(gates))  # GEGLU (arXiv 2002.05202)


class MinimalRMT(nn.Module):
    def __init__(self, num_tokens: int, dim: int, depth: int, heads: int, num_memory_tokens: int, seq_len: int):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(seq_len, dim)
        self.initial_memory = nn.Parameter(torch.empty(num_memory_tokens, dim))
        self.read_memory_emb = nn.Parameter(torch.empty(num_memory_tokens, dim))
        for embedding in (self.token_emb.weight, self.pos_emb.weight, self.initial_memory, self.read_memory_emb):
            nn.init.normal_(embedding, std=0.5)
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.logits = nn.Linear(dim, num_tokens)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads one segment (b, n). Returns its logits (b, n, num_tokens), and the memory (b, m, dim) after it."""
        (b, n), m = tokens.shape, len(self.initial_memory)
        if memory is None:  # a text starts
            memory = self.initial_memory.expand(b, -1, -1)
        text = self.token_emb(tokens) + self.pos_emb.weight[:n]
        # the same memory on both sides; the read embedding tells one from the other
        x = torch.cat((memory + self.read_memory_emb, text, memory), dim=1)

        # True = sees: a row sees itself and the rows before it,
        sees = torch.ones(m + n + m, m + n + m, dtype=torch.bool, device=x.device).tril()
        sees[:m, :m] = True  # a read row also the read rows after it,
        sees[m + n :] = True  # and a write row also the write rows after it
        for layer in self.layers:
            x = layer(x, sees)
        _, text, written = self.norm(x).split((m, n, m), dim=1)
        return self.logits(text), written


def read(model: nn.Module, tokens: Tensor, segment_length: int) -> Tensor:
    """Reads texts of any length segment by segment, and returns all of their logits."""
    memory, logits = None, []
    for segment in tokens.split(segment_length, dim=1):
        segment_logits, memory = model(segment, memory)
        logits.append(segment_logits)
    return torch.cat(logits, dim=1)


def main(steps: int = 1200, seed: int = 0, sequences: int = 64) -> dict[int, float]:
    """Trains a model to remember a marked token, and returns the accuracy by number of segments."""
    from segment_recurrence_pytorch.tasks import Memorize, SegmentCurriculum  # the data; the model is all above

    generator = torch.manual_seed(seed)
    # The first segment holds `MARK value` among noise, and the last token of the text asks for the value. Few segments
    # come first; one more is added when the probability of the right answer has been 0.9 for some time.
    task, curriculum = Memorize(), SegmentCurriculum([1, 2, 3, 4, 5], threshold=0.9)
    model = MinimalRMT(task.num_tokens, dim=64, depth=2, heads=4, num_memory_tokens=4, seq_len=task.segment_length)
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
    for segments in (1, 2, 3, 4, 5, 8, 16, 64, 256):
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
    parser.add_argument('--steps', type=int, default=1200, help='of the training (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and data (default: %(default)s)')
    main(**vars(parser.parse_args()))
