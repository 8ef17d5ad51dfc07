"""The training script, run in this process with tiny models: a run takes a fraction of a second."""

import io
import json
import os
import resource
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train_enwik8
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import trainer

ROOT = Path(__file__).resolve().parent.parent
# dropout and XL memories, so that random states and the whole carried state matter
TINY = {
    'rmt': dict(dim=16, depth=2, heads=2, dim_head=8, seq_len=16, num_memory_tokens=2, use_xl_memories=True,
                ff_dropout=0.1),
    'infini': dict(dim=16, depth=2, heads=2, dim_head=8, segment_length=16, memory_rule='delta', ff_dropout=0.1),
    'training': dict(segments=3, batch_size=4, lr=2e-3, minutes=3.0),
}  # fmt: skip


MODELS = {'rmt': RecurrentMemoryTransformer, 'infini': InfiniTransformer}
IMPORT_PLOTS = train_enwik8.import_plots


class Done(NamedTuple):
    """A run that has ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@contextmanager
def tiny():
    """The preset `small` is a tiny one, and few bytes are sampled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_enwik8.PRESETS, 'small', TINY)
        patch.setattr(train_enwik8, 'SAMPLE_BYTES', 20)
        patch.setattr(train_enwik8, 'import_plots', lambda: None)  # plots take longer than the training
        yield


def main(*arguments, encoding='utf-8') -> Done:
    """What `python train_enwik8.py ...` does in this folder. An error that would print a traceback is raised."""
    arguments = ['--device', 'cpu', *map(str, arguments)]
    out, err, code = io.TextIOWrapper(io.BytesIO(), encoding), io.StringIO(), 0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'argv', ['train_enwik8.py', *arguments])
        try:
            train_enwik8.main()
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=err)
                code = 1
        if sys.stdout is not out:  # that of a rank which prints nowhere
            sys.stdout.close()
    assert before == {number: signal.getsignal(number) for number in before}
    out.flush()
    return Done(code, out.buffer.getvalue().decode(encoding), err.getvalue())


def train(*arguments, name='a', **options) -> Done:
    """A new run."""
    return main('--data', 'text', '--valid-bytes', 600, '--name', name, *arguments, **options)


def metrics(folder):
    """The lines of a run, which must be JSON: NaN is none."""
    lines = (Path(folder) / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def without_clock(lines):
    return [{name: value for name, value in line.items() if name != 'seconds'} for line in lines]


def steps(folder):
    """The steps of the checkpoints of a run, and nothing else may lie beside them."""
    names = os.listdir(Path(folder) / 'checkpoints')
    return sorted(int(name.removeprefix('step-')) for name in names)


def files(folder):
    """What lies in a folder, with the time at which it was changed."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob('*')}


@contextmanager
def full_disk(limit=0):
    """No file can grow beyond a number of bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_step(monkeypatch, actions):
    """Calls an action when the loss of a step was computed. If it returns a tensor, this is the loss instead."""
    train_loss = trainer.train_loss
    step = 0

    def acting(*arguments):
        nonlocal step
        step += 1
        returned = train_loss(*arguments)
        loss = actions[step]() if step in actions else None
        return returned._replace(loss=loss) if isinstance(loss, torch.Tensor) else returned

    monkeypatch.setattr(trainer, 'train_loss', acting)


@contextmanager
def spoiled(step, segment):
    """The second layer of an RMT writes NaN in one segment of one step, however often this segment is read."""
    now, advance, train_loss = {'step': 0}, RecurrentMemoryTransformer.advance, trainer.train_loss

    def advancing(model, tokens, *arguments, **options):
        now.update(module=model.layers[1].ff.proj_out, tokens=tokens)
        return advance(model, tokens, *arguments, **options)

    def counting(wrapper, piece, *arguments):
        now['step'] += 1
        if now['step'] == step:
            now['bad'] = piece.tokens[0].split(wrapper.segment_length)[segment - 1]
        return train_loss(wrapper, piece, *arguments)

    def hook(module, inputs, output):
        if module is now['module'] and 'bad' in now and (now['tokens'] == now['bad']).all(dim=1).any():
            return output * float('nan')
        return output

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecurrentMemoryTransformer, 'advance', advancing)
            patch.setattr(trainer, 'train_loss', counting)
            yield
    finally:
        handle.remove()
