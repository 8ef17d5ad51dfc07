"""What a memory does for a pretrained language model: a tiny Llama and a tiny GPT-2, pretrained here, then retrofitted.

    python -m benchmarks.retrofit                 # all runs that have no result yet, then the page
    python -m benchmarks.retrofit --seeds 0       # those of one seed
    python -m benchmarks.retrofit --report        # only docs/results.md

For each base and seed: the base learns the bytes of the default corpus in segments of 64, each read by itself. Then it
is retrofitted, and trained on in two ways, with all of its weights.

    bytes       on rows of four segments, as the unmodified base is, for the same steps, on the same rows: bits per byte
                before the first step, after 50 steps, and at the end
    memorize    on `tasks.Memorize` over printable bytes, whose first segment holds what is asked for in the last one:
                accuracy at 1 segment (no memory needed), at 5, the longest in training, and at longer ones

Rules and seeds, and what was tried before: results/retrofit/rules.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.evidence.report import report
from benchmarks.evidence.results import PAGE
from benchmarks.evidence.results import RESULTS as EVIDENCE
from examples.train_a_task import train
from segment_recurrence_pytorch import SegmentModel, SegmentWrapper
from segment_recurrence_pytorch.checkpoint import replacing
from segment_recurrence_pytorch.data import python_source
from segment_recurrence_pytorch.graphs import TrainingStep
from segment_recurrence_pytorch.loss import IGNORE
from segment_recurrence_pytorch.tasks import Example, Memorize, accuracy
from segment_recurrence_pytorch.training import warmup_cosine

RESULTS = Path(__file__).parent / 'results' / 'retrofit'
SEEDS = (0, 1, 2)
SEGMENT, SEGMENTS, BATCH = 64, 4, 16  # of the bytes
BASE_STEPS, BYTE_STEPS, MENDING = 1000, 300, 50
TASK_STEPS, TASK_LENGTHS = 1500, (1, 2, 5, 16, 64)
BASE_LR, LR = 3e-3, 1e-3
RUNS = [('llama', 'unmodified'), ('llama', 'rmt'), ('llama', 'infini'), ('gpt2', 'unmodified'), ('gpt2', 'rmt')]


class Printable(Memorize):
    """The task on bytes that the base has read: the tokens begin with the space and not with the byte 0. On bytes that
    never occur in text, whose embeddings were not trained, the first stage alone takes several times as long."""

    first = ord(' ')

    def pieces(self, segments: int, batch_size: int, generator: torch.Generator) -> Iterator[Example]:
        """See `tasks.Task.pieces`."""
        for tokens, labels in super().pieces(segments, batch_size, generator):
            asked = labels if labels is None else torch.where(labels == IGNORE, labels, labels + self.first)
            yield Example(tokens + self.first, asked)


def new_base(name: str) -> Any:
    """Returns a language model of transformers over bytes, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == 'llama':
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=128)
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=96, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def retrofitted(lm: Any, method: str) -> SegmentModel:
    """Returns a language model with a memory, or ('unmodified') as it is, reading each segment by itself."""
    from infini_transformer_pytorch.huggingface import add_infini_attention
    from recurrent_memory_transformer_pytorch.huggingface import RecurrentMemoryLM

    if method == 'infini':
        return add_infini_attention(lm)
    return RecurrentMemoryLM(lm, num_memory_tokens=4 if method == 'rmt' else 0)


def wrapped(lm: Any, method: str, segment_length: int) -> SegmentWrapper:
    """Returns a copy of a language model with a memory, in a wrapper."""
    return SegmentWrapper(retrofitted(copy.deepcopy(lm), method), segment_length=segment_length)


@cache
def rows_of_bytes(split: str, count: int) -> Tensor:
    """Returns rows of bytes of four segments and one byte, (count, 257), in a fixed random order."""
    length = SEGMENT * SEGMENTS + 1
    documents = getattr(python_source(), split)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [documents[i][: len(documents[i]) // length * length].view(-1, length) for i in order]
    return torch.cat(pieces)[:count].long()


@torch.no_grad()
def bits(wrapper: SegmentWrapper) -> float:
    """Returns the bits per byte of 128 validation rows."""
    wrapper.eval()
    found = wrapper.loss(rows_of_bytes('valid', 128)).loss.item() / math.log(2)
    wrapper.train()
    return round(found, 4)


def learn_bytes(wrapper: SegmentWrapper, steps: int, lr: float, seed: int, name: str) -> dict[str, float]:
    """Trains on rows of bytes, and returns the bits per byte at some steps.

    Args:
        wrapper: the model in its wrapper.
        steps: number of steps.
        lr: the learning rate.
        seed: seed of the rows.
        name: what the progress bar shows.
    """
    rows, draw = rows_of_bytes('train', 20_000), torch.Generator().manual_seed(seed)
    rates = wrapper.model.param_groups(lr, 0.01)
    train_step = TrainingStep(wrapper, rates, betas=(0.9, 0.95), schedule=lambda done: warmup_cosine(done / steps))
    found = {'0': bits(wrapper)}
    wrapper.train()
    for done in tqdm(range(1, steps + 1), desc=name, disable=None):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=draw)]
        train_step(batch)
        if done in (MENDING, steps):
            found[f'{done}'] = bits(wrapper)
    return found


def told(wrapper: SegmentWrapper, task: Memorize, segments: int, seed: int) -> float:
    """Returns the accuracy on 256 new sequences of so many segments."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return round(accuracy(wrapper, task, segments, batch_size=256, generator=draw), 4)


def learn_task(wrapper: SegmentWrapper, steps: int, lr: float, seed: int, name: str) -> dict[str, Any]:
    """Trains on the task, and returns when it reached each stage, and its accuracy at several lengths.

    Args:
        wrapper: the model in its wrapper.
        steps: number of steps.
        lr: the learning rate.
        seed: seed of the task.
        name: what the progress bar shows.
    """
    task = Printable()
    groups = wrapper.model.param_groups(lr, 0.01)
    progress = train(wrapper, task, groups, stages=[1, 2, 3, 4, 5], steps=steps, seed=seed, name=name)
    reached = {f'{stage}': step for stage, step in progress.reached.items()}
    found = {f'{segments}': told(wrapper, task, segments, seed) for segments in TASK_LENGTHS}
    return {'reached': reached, 'curve': found, 'without_memory': task.without_memory}


def run(base: str, seed: int, folder: Path, *, base_steps: int, byte_steps: int, task_steps: int, lr: float) -> None:
    """Makes the runs of a base and a seed that have no result yet."""
    todo = [method for each, method in RUNS if each == base and not (folder / f'{base}-{method}-{seed}.json').exists()]
    if not todo:
        return
    torch.manual_seed(seed)
    pretrained = new_base(base)
    start = time.process_time()
    wrapper = SegmentWrapper(retrofitted(pretrained, 'unmodified'), segment_length=SEGMENT)
    first = learn_bytes(wrapper, base_steps, BASE_LR, seed, f'{base} {seed}, base')
    seconds = round(time.process_time() - start)
    for method in todo:
        torch.manual_seed(seed)
        start = time.process_time()
        name = f'{base} {seed}, {method}'
        text = learn_bytes(wrapped(pretrained, method, SEGMENT), byte_steps, lr, seed + 1000, f'{name}, bytes')
        torch.manual_seed(seed)
        task = learn_task(
            wrapped(pretrained, method, Printable().segment_length), task_steps, lr, seed, f'{name}, task'
        )
        found = {
            'base': base, 'method': method, 'seed': seed, 'base_bits': first, 'base_cpu_seconds': seconds,
            'bytes': text, 'memorize': task, 'cpu_seconds': round(time.process_time() - start),
            'base_steps': base_steps, 'byte_steps': byte_steps, 'task_steps': task_steps, 'lr': lr,
        }  # fmt: skip
        print(json.dumps(found), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f'{base}-{method}-{seed}.json') as part:
            part.write_text(json.dumps(found, indent=2) + '\n')


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=list(SEEDS))
    parser.add_argument('--bases', nargs='+', choices=('llama', 'gpt2'), default=['llama', 'gpt2'])
    parser.add_argument('--report', action='store_true', help='only the page')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [] if arguments.report else arguments.seeds:
        for base in arguments.bases:
            run(base, seed, RESULTS, base_steps=BASE_STEPS, byte_steps=BYTE_STEPS, task_steps=TASK_STEPS, lr=LR)
    report(EVIDENCE, PAGE)


if __name__ == '__main__':
    main()
