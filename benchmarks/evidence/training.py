"""Trains and evaluates a row on one seed."""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.evidence.rows import MILLION, LanguageRow, TaskRow
from examples.train_a_task import Progress, train
from segment_recurrence_pytorch.data import Streams, python_source
from segment_recurrence_pytorch.graphs import TrainingStep
from segment_recurrence_pytorch.tasks import accuracy
from segment_recurrence_pytorch.trainer import compiled_advance, reading_by
from segment_recurrence_pytorch.training import bits_per_byte, first_bytes, valid_streams, warmup_cosine
from segment_recurrence_pytorch.wrapper import SegmentWrapper

EVALUATION_SEED = 1000  # added to the seed of the run, so evaluations use other sequences than the training
COMPILED_FROM = 3000  # steps of a byte model that pay for compiling it: they take a fifth less time then


def run_row(
    row: TaskRow | LanguageRow, seed: int, quick: bool, twin: bool = True, device: str = 'cpu'
) -> dict[str, Any]:
    """Trains and evaluates a row on one seed, and returns the result.

    Args:
        row: the row.
        seed: the seed.
        quick: whether to train only three steps.
        twin: whether to train also the twin of a byte row, without memory. Default: True.
        device: where to train. Default: 'cpu'.
    """
    if isinstance(row, LanguageRow):
        return run_language(row, seed, quick, twin, device)
    return run_task(row, seed, quick, device)


def train_task(row: TaskRow, wrapper: SegmentWrapper, seed: int, steps: int) -> Progress:
    """Trains a model on the task of a row, with its curriculum.

    Args:
        row: the row.
        wrapper: the model in its wrapper.
        seed: seed of the task.
        steps: number of training steps.
    """
    return train(
        wrapper,
        row.task(),
        parameter_groups(row, wrapper),
        stages=row.stages,
        steps=steps,
        batch_size=row.batch_size,
        virtual_length=row.repetition,
        seed=seed,
        name=f'{row.name}, seed {seed}',
    )


def parameter_groups(row: TaskRow | LanguageRow, wrapper: SegmentWrapper) -> list[dict[str, Any]]:
    """Returns the model's groups of parameters, with the learning rates of the row."""
    named = {'gate_lr': row.gate_lr, 'emb_lr': row.emb_lr}
    rates = {name: factor for name, factor in named.items() if factor is not None}
    return wrapper.model.param_groups(row.lr, 0.01, **rates)


def run_task(row: TaskRow, seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Trains and evaluates a task row on one seed, and returns the result.

    Args:
        row: the row.
        seed: the seed.
        quick: whether to train only three steps, and to evaluate only two lengths.
        device: where to train.
    """
    torch.manual_seed(seed)
    wrapper = row.wrapper().to(device)
    start = time.process_time()
    progress = train_task(row, wrapper, seed, 3 if quick else row.steps)
    trained = time.process_time() - start
    curve, seconds = {}, {}
    for segments in row.lengths[:2] if quick else row.lengths:
        generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
        start = time.process_time()
        count = 4 if quick else row.million_sequences if segments >= MILLION else row.sequences
        share = accuracy(wrapper, row.task(), segments, batch_size=count, generator=generator)
        curve[segments], seconds[segments] = round(share, 4), round(time.process_time() - start, 1)
        print(f'{row.name} seed {seed}: {segments:6,} segments {share:.3f} {seconds[segments]:6.1f} s', flush=True)
    seconds_of = {'train_cpu_seconds': round(trained), 'evaluation_cpu_seconds': seconds}
    return {'curve': curve, 'reached': progress.reached, 'history': progress.history, **seconds_of}


def run_language(row: LanguageRow, seed: int, quick: bool, twin: bool, device: str) -> dict[str, Any]:
    """Trains a byte model with memory and its twin without memory on the same bytes. Returns their bits per byte.

    Args:
        row: the row.
        seed: the seed.
        quick: whether to train only three steps, and to evaluate fewer bytes.
        twin: whether to train the twin, too.
        device: where to train.
    """
    corpus = python_source()
    held_out = first_bytes(corpus.valid, 10_000 if quick else 131_072)
    steps = 3 if quick else row.steps
    compiled = steps >= COMPILED_FROM
    bits, seconds = {}, {}
    for name, memory in (('with memory', True), ('without', False))[: 1 + twin]:
        torch.manual_seed(seed)
        wrapper = row.wrapper().to(device)
        order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(seed)).tolist()
        length = wrapper.segment_length * row.segments
        streams = Streams([corpus.train[i] for i in order], row.batch_size, length, loop=True)
        groups = parameter_groups(row, wrapper)
        train_step = TrainingStep(wrapper, groups, betas=(0.9, 0.95), schedule=lambda step: warmup_cosine(step / steps))
        start, state = time.process_time(), None
        wrapper.train()
        with reading_by(wrapper.model, compiled_advance(wrapper.model) if compiled else None):
            for _ in tqdm(range(steps), desc=f'{row.name}, {name}, seed {seed}', disable=None):
                _, state = train_step.read(next(streams), state, memory)
        seconds[name] = round(time.process_time() - start)
        bits[name] = round(bits_per_byte(wrapper, valid_streams(held_out, length), memory), 4)
        print(f'{row.name} seed {seed}: {name} {bits[name]:.4f} bits per byte', flush=True)
    gain = {'gain': round(bits['without'] - bits['with memory'], 4)} if twin else {}
    return {
        'corpus': corpus.name,
        'sha256': corpus.sha256,
        'compiled': compiled,
        'bits': bits,
        **gain,
        'train_cpu_seconds': seconds,
    }
