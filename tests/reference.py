"""The executable definition of what the fast code must compute: one row, one position, one loop at a time.

Nothing here is shared with the library but the weights.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def rotated(vector: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector (d,), its pairs (2i, 2i + 1) turned as complex numbers."""
    pairs = torch.view_as_complex(vector.view(-1, 2).contiguous())
    exponents = torch.arange(0, len(vector), 2, dtype=torch.float64) / len(vector)
    turn = torch.polar(torch.ones_like(exponents), position * theta**-exponents)
    return torch.view_as_real(pairs * turn).flatten().to(vector.dtype)


def rmt_may_attend(model, query: tuple[str, int], key: tuple[str, int]) -> bool:
    """The table of memory masks: query and key are (kind, index in its kind)."""
    (kind, i), (key_kind, j) = query, key
    if not model.causal:
        return True
    if kind == 'read':
        return key_kind == 'read' and (j <= i or model.memory_mask != 'causal')
    if kind == 'text':
        return key_kind in ('xl', 'read') or (key_kind == 'text' and j <= i)
    return key_kind != 'write' or j <= i or model.memory_mask == 'block'


def rmt_segment(model, text: Tensor, positions: list[int], memory: Tensor, xl: list):
    """One row's segment, its padding left out. text: ids (n,) or embeddings (n, dim); positions: their columns.
    xl: for each layer a list of (keys (g, d), values (g, d)), one a past token.
    Returns hidden states (n, dim), memory (m, dim), xl."""
    m, n = model.num_memory_tokens, len(positions)
    x = model.token_emb.weight[text] if text.ndim == 1 else text
    if model.pos_emb is not None:
        x = x + model.pos_emb.weight[positions]
    if m:
        write = {'learned': lambda: model.memory_tokens, 'previous': lambda: memory,
                 'sum': lambda: memory + model.memory_tokens,
                 'scaled': lambda: model.memory_tokens + memory / math.sqrt(model.dim)}[model.write_init]()  # fmt: skip
        x = torch.cat((memory + model.read_memory_emb, x, write))
    rows = [('read', i) for i in range(m)] + [('text', i) for i in positions] + [('write', i) for i in range(m)]
    depth, new_xl = len(model.layers), []
    for index, block in enumerate(model.layers):
        attn = block.attn
        past = xl[min(index + 1, depth - 1) if model.enhanced_xl_recurrence else index]
        normed = rms_norm(x, block.attn_norm.weight)
        q = (normed @ attn.to_q.weight.T).view(len(rows), attn.heads, -1)
        k, v = (normed @ attn.to_kv.weight.T).view(len(rows), 2, -1, q.shape[-1]).unbind(1)
        if hasattr(attn.q_norm, 'weight'):
            q, k = rms_norm(q, attn.q_norm.weight), rms_norm(k, attn.k_norm.weight)
        new_xl.append((list(xl[index]) + [(k[m + i].detach(), v[m + i].detach()) for i in range(n)])
                      [-model.xl_mem_len:] if model.xl_mem_len else [])  # fmt: skip
        keys = [('xl', i) for i in range(len(past))] + rows
        all_k, all_v = [p[0] for p in past] + list(k), [p[1] for p in past] + list(v)

        def place(kind: str, i: int, length: int = len(past)) -> int:
            first = model.positions.first
            return {'xl': first + i - length, 'text': first + i}.get(kind, 0)

        out = torch.zeros_like(q)
        for row, query in enumerate(rows):
            seen = [j for j, key in enumerate(keys) if rmt_may_attend(model, query, key)]
            for head in range(attn.heads):
                group = head * k.shape[1] // attn.heads
                head_q, head_k = q[row, head], [all_k[j][group] for j in seen]
                if model.positions is not None:
                    theta = model.positions.theta
                    head_q = rotated(head_q, place(*query), theta)
                    head_k = [rotated(each, place(*keys[j]), theta) for each, j in zip(head_k, seen, strict=True)]
                weights = (torch.stack(head_k) @ head_q / math.sqrt(len(head_q))).softmax(0)
                out[row, head] = weights @ torch.stack([all_v[j][group] for j in seen])
        x = x + out.flatten(1) @ attn.to_out.weight.T
        normed = rms_norm(x, block.ff_norm.weight)
        a, gates = F.linear(normed, block.ff.proj_in.weight, block.ff.proj_in.bias).chunk(2, -1)
        x = x + F.linear(a * F.gelu(gates), block.ff.proj_out.weight, block.ff.proj_out.bias)
    x = rms_norm(x, model.norm.weight)
    return x[m : m + n], x[m + n :], new_xl


def axial_read(axial, series: list[Tensor]) -> Tensor:
    """series: memories (m, dim), newest last -> the memory that is read (m, dim); slot by slot, head by head."""
    length, heads, d = axial.positions.shape
    series = series[-length:]
    read = []
    for slot in range(len(series[0])):
        values = [rms_norm(memory[slot], axial.norm.weight) for memory in series]
        q = (axial.to_q.weight @ values[-1]).view(heads, d)
        projected = [(axial.to_kv.weight @ value).view(2, heads, d) for value in values]
        out = []
        for head in range(heads):
            keys, seen = [axial.null_kv[0, head, 0]], [axial.null_kv[1, head, 0]]
            for age, (k, v) in enumerate(reversed(projected)):
                keys.append(k[head] + axial.positions[length - 1 - age, head])
                seen.append(v[head])
            out.append((torch.stack(keys) @ q[head] / math.sqrt(d)).softmax(0) @ torch.stack(seen))
        read.append(series[-1][slot] + axial.to_out.weight @ torch.cat(out))
    return torch.stack(read)


def rmt_row(model, text: Tensor, valid: Tensor | None = None, memory: Tensor | None = None, xl: list | None = None):
    """One row of any length through the segment loop. Padded columns are left out, a segment without a valid one
    does not happen. Returns hidden states at the valid columns (n, dim), memory (m, dim), xl."""
    series = []
    valid = torch.ones(len(text), dtype=torch.bool) if valid is None else valid
    if memory is None:
        memory = model.initial_memory if model.num_memory_tokens else torch.zeros(0, model.dim, dtype=model.dtype)
    xl = [[] for _ in model.layers] if xl is None else xl
    hiddens = []
    for start in range(0, len(text), model.seq_len):
        columns = [c for c in range(start, min(start + model.seq_len, len(text))) if valid[c]]
        if columns:
            series.append(memory)
            read = memory if model.axial is None else axial_read(model.axial, series)
            hidden, memory, xl = rmt_segment(model, text[columns], [c - start for c in columns], read, xl)
            hiddens.append(hidden)
    return torch.cat(hiddens) if hiddens else torch.zeros(0, model.dim, dtype=model.dtype), memory, xl


def mean_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not -100, 0 if there is none; logits (b, n, v), targets (b, n)."""
    losses = [
        -row.log_softmax(-1)[target]
        for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True)
        if target != -100
    ]
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def truncated_loss(tokens: Tensor, segment_length: int, k: int | None, forward) -> Tensor:
    """Next-token loss by a hand-written loop over segments; the state entering every k-th one is detached.
    forward(segment, state) -> (logits, state)."""
    from torch.utils._pytree import tree_map_only

    inputs, targets, state, logits = tokens[:, :-1], tokens[:, 1:], None, []
    for i, start in enumerate(range(0, inputs.shape[1], segment_length)):
        if k is not None and i > 0 and i % k == 0:
            state = tree_map_only(Tensor, Tensor.detach, state)
        segment_logits, state = forward(inputs[:, start : start + segment_length], state)
        logits.append(segment_logits)
    return mean_nll(torch.cat(logits, 1), targets)


def infini_phi(t: Tensor, rule: str) -> Tensor:
    t = torch.where(t > 0, t + 1, t.clamp(max=0).exp())
    return t / t.norm() if rule == 'deltanet' else t


def infini_write(rule, keys, values, strength, decay, M, z, strength_in_normaliser=True):
    """One head's memory after the tokens of a segment, written one after the other. keys (n, d), values (n, e)."""
    M0, z0, G = M, z, decay.prod()
    for k, v, beta, gamma in zip(keys, values, strength, decay, strict=True):
        k = infini_phi(k, rule)
        M = gamma * M
        if rule == 'deltanet':
            M = M + beta * torch.outer(k, v - k @ M)
            z = torch.ones_like(z)
            continue
        if rule == 'delta' and z0.any():
            v = v - G * (k @ M0) / (k @ z0)
        M = M + beta * torch.outer(k, v)
        z = gamma * z + (beta * k if strength_in_normaliser else k)
    return M, z


def infini_read(rule, q, M, z):
    """What one query (d,) recalls."""
    q = infini_phi(q, rule)
    return q @ M if rule == 'deltanet' else q @ M / (q @ z)


def infini_segment(model, text: Tensor, positions: list[int], memories: list):
    """One row's segment, its padding left out. memories: for each layer and key/value head (M (d, e), z (d)).
    Returns hidden states (n, dim) and the memories."""
    x = model.token_emb.weight[text] if text.ndim == 1 else text
    n, depth, after = len(positions), len(model.layers), []
    for index, block in enumerate(model.layers):
        attn = block.attn
        memory, groups = attn.fastweight_mem, attn.heads // attn.kv_heads
        rule = memory.memory_rule
        normed = rms_norm(x, block.attn_norm.weight, 1e-12)
        q, kv = (normed @ attn.to_qkv.weight.T).split(
            (attn.heads * attn.dim_head, 2 * attn.kv_heads * attn.dim_head), -1
        )
        q, (k, v) = q.view(n, attn.heads, -1), kv.view(n, 2, attn.kv_heads, -1).unbind(1)
        if hasattr(attn.q_norm, 'weight'):
            q, k = rms_norm(q, attn.q_norm.weight, 1e-12), rms_norm(k, attn.k_norm.weight, 1e-12)
        ones = torch.ones(n, attn.kv_heads, dtype=x.dtype)
        strength = ones if attn.to_strength is None else F.linear(normed, *attn.to_strength.parameters()).sigmoid()
        decay = ones if attn.to_decay is None else F.linear(normed, attn.to_decay.weight, attn.to_decay.bias).sigmoid()
        source = memories[min(index + 1, depth - 1) if model.mem_read_from == 'above' else index]
        shown = source
        if memory.mem_transform == 'talking_heads':
            over = torch.eye(attn.kv_heads, dtype=x.dtype) + memory.talking_heads.exp()
            shown = [
                tuple(sum(over[g, other] * source[other][part] for other in range(attn.kv_heads)) for part in (0, 1))
                for g in range(attn.kv_heads)
            ]
        elif memory.mem_transform == 'kv_proj':
            over = torch.eye(attn.dim_head, dtype=x.dtype) + memory.key_proj.exp()
            shown = [(over[g] @ M @ memory.value_proj[g], over[g] @ z) for g, (M, z) in enumerate(source)]
        out = torch.zeros(n, attn.heads, attn.dim_head, dtype=x.dtype)
        for i in range(n):
            for head in range(attn.heads):
                g = head // groups
                turned = torch.stack([rotated(k[j, g], positions[j], model.rotary_theta) for j in range(i + 1)])
                scores = turned @ rotated(q[i, head], positions[i], model.rotary_theta) / math.sqrt(attn.dim_head)
                local = scores.softmax(0) @ v[: i + 1, g]
                M, z = shown[g]
                if z.any():
                    gate = memory.head_gates[head].sigmoid()
                    local = gate * local + (1 - gate) * infini_read(rule, q[i, head], M, z)
                out[i, head] = local
        after.append([
            infini_write(rule, k[:, g], v[:, g], strength[:, g], decay[:, g], *memories[index][g],
                         memory.strength_in_normaliser)
            for g in range(attn.kv_heads)
        ])  # fmt: skip
        x = x + out.flatten(1) @ attn.to_out.weight.T
        normed = rms_norm(x, block.ff_norm.weight, 1e-12)
        a, gates = F.linear(normed, block.ff.proj_in.weight, block.ff.proj_in.bias).chunk(2, -1)
        x = x + F.linear(a * F.gelu(gates), block.ff.proj_out.weight, block.ff.proj_out.bias)
    return rms_norm(x, model.norm.weight, 1e-12), after


def infini_row(model, text: Tensor, segment_length: int, valid: Tensor | None = None, memories: list | None = None):
    """One row of any length through the segment loop, padded columns left out: hidden states (n, dim), memories."""
    valid = torch.ones(len(text), dtype=torch.bool) if valid is None else valid
    if memories is None:
        d = model.dim_head
        empty = (torch.zeros(d, d, dtype=model.dtype), torch.zeros(d, dtype=model.dtype))
        memories = [[empty] * model.kv_heads for _ in model.layers]
    hiddens = []
    for start in range(0, len(text), segment_length):
        columns = [c for c in range(start, min(start + segment_length, len(text))) if valid[c]]
        if columns:
            hidden, memories = infini_segment(model, text[columns], [c - start for c in columns], memories)
            hiddens.append(hidden)
    return torch.cat(hiddens) if hiddens else torch.zeros(0, model.dim, dtype=model.dtype), memories


def generate_by_rereading(model, prompt: Tensor, num_tokens: int, segment_length: int, state=None) -> Tensor:
    """The most likely tokens (b, num_tokens) after prompt (b, n): the open segment is read again for every token."""
    *past, current = prompt.split(segment_length, dim=1)
    for segment in past:
        _, state = model.advance(segment, state)
    tokens = []
    for _ in range(num_tokens):
        hidden, next_state = model.advance(current, state)
        tokens.append(model.to_logits(hidden)[:, -1:].argmax(-1))
        full = current.shape[1] == segment_length
        state = next_state if full else state
        current = tokens[-1] if full else torch.cat((current, tokens[-1]), dim=1)
    return torch.cat(tokens, dim=1)


def babilong_answer(text: str, question: str) -> str:
    """The answer to a question of qa1 to qa5, from the sentences of the text that are facts, by asking for each thing
    when it last happened."""
    who, the = r'(Bill|Daniel|Fred|Jeff|John|Mary|Sandra)', r'the (apple|football|milk)'
    kinds = {
        'move': rf'{who} (?:journeyed|moved|travelled|went|went back) to the (\w+)\.',
        'take': rf'{who} (?:got|grabbed|picked up|took) {the} there\.',
        'leave': rf'{who} (?:discarded|dropped|left|put down) {the}\.',
        'give': rf'{who} (?:gave|handed|passed) {the} to {who}\.',
        'relation': r'The (\w+) is (north|south|east|west) of the (\w+)\.',
    }
    found = sorted((m.start(), kind, m.groups()) for kind, form in kinds.items() for m in re.finditer(form, text))
    events = [(kind, parts) for _, kind, parts in found]

    def place_of(person, now):
        for kind, parts in reversed(events[:now]):
            if kind == 'move' and parts[0] == person:
                return parts[1]
        return None

    def place_of_thing(thing, now):
        for i in reversed(range(now)):
            kind, parts = events[i]
            if kind != 'move' and kind != 'relation' and parts[1] == thing:
                return place_of(parts[0], i) if kind == 'leave' else place_of(parts[2 if kind == 'give' else 0], now)
        return None

    if m := re.fullmatch(rf'Where is {who}\?', question):
        return place_of(m[1], len(events))
    if m := re.fullmatch(rf'Where is {the}\?', question):
        return place_of_thing(m[1], len(events))
    if m := re.fullmatch(rf'Where was {the} before the (\w+)\?', question):
        places = [place_of_thing(m[1], now) for now in range(len(events) + 1)]
        arrivals = [now for now in range(1, len(places)) if places[now] == m[2] != places[now - 1]]
        return places[arrivals[-1] - 1]
    relations = {parts for kind, parts in events if kind == 'relation'}
    turned = dict(north='south', south='north', east='west', west='east')
    relations |= {(b, turned[direction], a) for a, direction, b in relations}
    if m := re.fullmatch(r'What is (\w+) of the (\w+)\?', question):
        (answer,) = [a for a, direction, b in relations if (direction, b) == m.groups()]
        return answer
    if m := re.fullmatch(r'What is the (\w+) (\w+) of\?', question):
        (answer,) = [b for a, direction, b in relations if (a, direction) == m.groups()]
        return answer
    gifts = [parts for kind, parts in events if kind == 'give']
    if m := re.fullmatch(rf'Who gave {the} to {who}\?', question):
        return [giver for giver, thing, receiver in gifts if (thing, receiver) == m.groups()][-1]
    if m := re.fullmatch(rf'Who gave {the}\?', question):
        return [giver for giver, thing, _ in gifts if thing == m[1]][-1]
    if m := re.fullmatch(rf'Who received {the}\?', question):
        return [receiver for _, thing, receiver in gifts if thing == m[1]][-1]
    if m := re.fullmatch(rf'What did {who} give to {who}\?', question):
        return [thing for giver, thing, receiver in gifts if (giver, receiver) == m.groups()][-1]
    if m := re.fullmatch(rf'Who did {who} give {the} to\?', question):
        return [receiver for giver, thing, receiver in gifts if (giver, thing) == m.groups()][-1]
    raise ValueError(question)
