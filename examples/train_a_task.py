"""Trains the memory of one of the library's models on a task, and shows for how long it lasts.

    python examples/train_a_task.py                                       # RMT, 1,000 steps, two to three minutes
    python examples/train_a_task.py --model infini --lengths 5 31250      # asked after a million tokens, too
    python examples/train_a_task.py --model infini --virtual_length 1e4   # the linear rule, trained for long texts
    python examples/train_a_task.py --memory_noise 0.3

The first segment of a text holds a marked token among noise, and the last token of the text asks for it. The loop is
`train` below. The benchmarks of this project train with the same function.

Letters: b rows of the batch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from infini_transformer_pytorch import InfiniTransformer
from infini_transformer_pytorch.infini import GATE_LR
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.graphs import TrainingStep
from segment_recurrence_pytorch.tasks import Memorize, SegmentCurriculum, Task, accuracy, virtual_lengths


class Progress(NamedTuple):
    """How a training went.

    Attributes:
        reached: the step at which each stage of the curriculum was reached, by its number of segments.
        history: step, stage and loss of every fiftieth step and of the last one.
    """

    reached: dict[int, int]
    history: list[dict[str, float]]


def train(
    wrapper: SegmentWrapper,
    task: Task,
    groups: list[dict[str, Any]],
    *,
    stages: Sequence[int],
    steps: int,
    batch_size: int = 32,
    virtual_length: float = 0.0,
    seed: int = 0,
    name: str = 'training',
) -> Progress:
    """Trains a model on a task whose sequences get longer as the model gets better.

    Args:
        wrapper: the model in its wrapper.
        task: the task.
        groups: what `model.param_groups` returned: the parameters with their learning rates.
        stages: numbers of segments of the curriculum.
        steps: number of steps.
        batch_size: number b of sequences of a step. Default: 32.
        virtual_length: the largest number of times that a segment counts as read. Default: 0, each counts once.
        seed: seed of the sequences. Default: 0.
        name: what the progress bar shows. Default: 'training'.
    """
    draw, curriculum = torch.Generator().manual_seed(seed), SegmentCurriculum(stages, threshold=0.9)
    # linear warm-up for 50 steps, then linearly down to 3 %
    train_step = TrainingStep(
        wrapper,
        groups,
        betas=(0.9, 0.98),
        schedule=lambda step: min(1, (step + 1) / 50) * max(0.03, 1 - step / steps),
    )
    progress = Progress({}, [])
    wrapper.train()
    for step in (bar := tqdm(range(1, steps + 1), desc=name, disable=None)):
        segments = curriculum.draw(draw)
        tokens, labels = task.batch(segments, batch_size, draw)
        per_segment = {}
        if virtual_length:
            per_segment['write_scale'] = virtual_lengths(batch_size, segments, most=virtual_length, generator=draw)
        loss, _ = train_step(tokens, labels=labels, per_segment=per_segment)
        curriculum.update(math.exp(-loss.item()), segments)
        stage = curriculum.stages[curriculum.stage]
        progress.reached.setdefault(stage, step)
        if step % 50 == 0 or step == steps:
            progress.history.append({'step': step, 'segments': stage, 'loss': round(loss.item(), 4)})
            bar.set_postfix_str(f'{stage} segments, loss {loss.item():.3f}')
    return progress


def main(
    model: str = 'rmt',
    steps: int = 1000,
    seed: int = 0,
    memory_noise: float = 0.0,
    virtual_length: float = 0.0,
    gate_lr: float = GATE_LR,
    lengths: Sequence[int] = (5, 16, 64, 256, 1024),
    sequences: int = 64,
) -> dict[int, float]:
    """Trains a model to remember a marked token, and returns the accuracy by number of segments."""
    torch.manual_seed(seed)
    task = Memorize()
    sizes: dict[str, Any] = dict(num_tokens=task.num_tokens, dim=64, depth=2, heads=4, dim_head=16)
    made: RecurrentMemoryTransformer | InfiniTransformer
    if model == 'rmt':
        made = RecurrentMemoryTransformer(
            seq_len=task.segment_length, num_memory_tokens=4, memory_noise=memory_noise, **sizes
        )
        groups = made.param_groups(3e-3, 0.01)
    else:
        if virtual_length:  # the default rule cannot count a segment several times
            sizes['memory_rule'] = 'linear'
        made = InfiniTransformer(**sizes)
        groups = made.param_groups(3e-3, 0.01, gate_lr=gate_lr)
    wrapper = SegmentWrapper(made, segment_length=task.segment_length)
    progress = train(
        wrapper, task, groups, stages=[1, 2, 3, 4, 5], steps=steps, virtual_length=virtual_length, seed=seed
    )
    for segments, step in progress.reached.items():
        print(f'step {step:5}: from here on {segments} segments of {task.segment_length} tokens')
    found = {}
    print('\nsegments    tokens    remembered')
    for segments in lengths:
        generator = torch.Generator().manual_seed(1000 + seed)  # other sequences than those of the training
        found[segments] = accuracy(wrapper, task, segments, batch_size=sequences, generator=generator)
        bar, note = '#' * round(20 * found[segments]), '  longer than in training' * (segments > 5)
        print(f'{segments:8}{segments * task.segment_length:10,}{found[segments]:14.1%}  {bar}{note}', flush=True)
    print(f'guessing {1 / task.values:23.1%}')
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=['rmt', 'infini'], default='rmt', help='(default: %(default)s)')
    parser.add_argument('--steps', type=int, default=1000, help='of the training (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and data (default: %(default)s)')
    parser.add_argument('--memory_noise', type=float, default=0.0, help='of RMT, in training (default: none)')
    parser.add_argument('--virtual_length', type=float, default=0.0,
                        help='of Infini: how many times a segment can count as read (default: once)')  # fmt: skip
    parser.add_argument('--gate_lr', type=float, default=GATE_LR,
                        help='of Infini: factor of the learning rate of the gates (default: %(default)g)')  # fmt: skip
    parser.add_argument('--lengths', type=int, nargs='+', default=[5, 16, 64, 256, 1024], metavar='SEGMENTS',
                        help='of the texts that are tried (default: up to 1024; 31250: a million tokens)')  # fmt: skip
    arguments = parser.parse_args()
    if min(arguments.steps, *arguments.lengths) < 1:
        parser.error('--steps and --lengths are counts: give 1 or more')
    of_model: dict[str, dict[str, float]] = {
        'rmt': {'virtual_length': 0, 'gate_lr': GATE_LR},
        'infini': {'memory_noise': 0},
    }
    for name, default in of_model[arguments.model].items():
        if getattr(arguments, name) != default:
            parser.error(f'--{name} has no meaning for {arguments.model}: take the other --model, or leave it out')
    if arguments.virtual_length and not 1 <= arguments.virtual_length < math.inf:
        parser.error('--virtual_length is the largest number of times that a segment counts: give 1 or more')
    if not 0 <= arguments.memory_noise < math.inf or not 0 < arguments.gate_lr < math.inf:
        parser.error('--memory_noise is 0 or more, --gate_lr more than 0')
    main(**vars(arguments))
