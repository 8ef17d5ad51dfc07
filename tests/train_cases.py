"""What the training script does in several processes, compared with what it does in one.

`tests/ranks.py` runs these cases, `tests/test_train_ranks.py` reports them and makes the runs of one process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train_enwik8
from segment_recurrence_pytorch import console, trainer
from segment_recurrence_pytorch.trainer import Training
from tests import script
from tests.ranks import case
from tests.script import MODELS, at_step, main, metrics, spoiled, steps, without_clock

FOLDER = Path()  # of all processes; `tests.ranks` sets it
STEPS = 20
NEAR = 1e-5
# without dropout, which differs from rank to rank
SIZES = {
    'rmt': dict(dim=16, depth=2, heads=2, dim_head=8, seq_len=16, num_memory_tokens=2, use_xl_memories=True),
    'infini': dict(dim=16, depth=2, heads=2, dim_head=8, segment_length=16, memory_rule='delta'),
    'training': dict(segments=4, batch_size=4, lr=2e-3, minutes=3.0),
}
SETTINGS = '--valid-bytes', 600, '--precision', 'float32', '--save-minutes', 1000


def prepare(folder):
    """The corpus, and for each model a run of one process: a whole one, and one that was stopped at step 7."""
    (folder / 'text').write_bytes((script.ROOT / 'tests' / 'test_rmt.py').read_bytes())
    with pytest.MonkeyPatch.context() as patch, tiny(SIZES):
        patch.chdir(folder)
        for model in MODELS:
            assert new(model, '--steps', STEPS, '--name', f'{model}-whole').code == 0
            with pytest.MonkeyPatch.context() as inner:
                at_step(inner, {7: lambda: os.kill(os.getpid(), signal.SIGTERM)})
                assert new(model, '--steps', STEPS, '--name', f'{model}-stopped').code == 128 + signal.SIGTERM


@contextmanager
def tiny(sizes):
    with script.tiny(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_enwik8.PRESETS, 'small', sizes)
        yield


@contextmanager
def at_work(sizes=SIZES):
    """All ranks work in their common folder, and wait for each other at the end."""
    before = Path.cwd()
    os.chdir(FOLDER)
    try:
        with tiny(sizes):
            yield
    finally:
        os.chdir(before)
    dist.barrier()


def new(model, *arguments):
    return main('--data', 'text', '--model', model, *SETTINGS, *arguments)


def run(name):
    return Path('runs') / name


def same_losses(name, whole, until=STEPS):
    have, want = metrics(run(name)), metrics(run(whole))
    assert [line['step'] for line in have[:until]] == list(range(1, until + 1))
    for mine, theirs in zip(have[:until], want, strict=False):
        assert mine['bytes'] == theirs['bytes']
        assert abs(mine['bits'] - theirs['bits']) < NEAR, mine['step']
        assert abs(mine['gradient_norm'] - theirs['gradient_norm']) < NEAR * theirs['gradient_norm'], mine['step']
    if len(have) > until:
        for scores in ('carried', 'reset'):
            assert abs(have[-1]['valid'][scores] - want[-1]['valid'][scores]) < NEAR


def same_run(have, want):
    """Two runs have the same weights and lines, bit for bit."""
    mine, theirs = (load_file(run(name) / 'model.safetensors') for name in (have, want))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert without_clock(metrics(run(have))) == without_clock(metrics(run(want)))


def ended(done, code, rank):
    """A run ended with this code on all ranks, and only the first one has printed something."""
    dist.barrier()  # the first one ends last
    assert done.code == code, done
    if rank:
        assert (done.out, done.err) == ('', '')


@case(2, 4)
def the_losses_of_one_process(rank, ranks):
    for model in MODELS:
        with at_work():
            ended(new(model, '--steps', STEPS, '--name', f'{model}-ddp'), 0, rank)
            same_losses(f'{model}-ddp', f'{model}-whole')


@case(2)
def sharded_the_losses_of_one_process(rank, ranks):
    for model in MODELS:
        with at_work():
            ended(new(model, '--steps', STEPS, '--name', f'{model}-fsdp', '--parallel', 'fsdp'), 0, rank)
            same_losses(f'{model}-fsdp', f'{model}-whole')


@case(2, 4)
def context_parallel_the_losses_of_one_process(rank, ranks):
    for parallel in ('ddp', 'fsdp'):
        with at_work():
            how = '--context-parallel', 2, '--parallel', parallel
            ended(new('infini', '--steps', STEPS, '--name', f'context-{parallel}', *how), 0, rank)
            same_losses(f'context-{parallel}', 'infini-whole')


@case(2, 4)
def the_twin_without_memory(rank, ranks):
    with at_work():
        ended(new('rmt', '--steps', 3, '--memory', 'off', '--name', 'off'), 0, rank)
        assert len(metrics(run('off'))) == 4


@case(2, 4)
def a_run_of_one_process_goes_on(rank, ranks):
    """Resumed on more ranks: XL memories and all other states of the rows are divided."""
    for model, parallel in (('rmt', 'ddp'), ('rmt', 'fsdp'), ('infini', 'ddp')):
        with at_work():
            name = f'{model}-{parallel}-resumed'
            if rank == 0:
                shutil.copytree(run(f'{model}-stopped'), run(name))
            dist.barrier()
            done = main('--resume', run(name), '--parallel', parallel)
            ended(done, 0, rank)
            assert rank or f'ranks       {ranks} instead of 1' in done.out
            same_losses(name, f'{model}-whole')


@case(2, 4)
def one_rank_is_told_to_stop(rank, ranks):
    """All stop after the same step, with a checkpoint, and go on as if never stopped; with dropout."""
    sizes = {**SIZES, 'rmt': {**SIZES['rmt'], 'ff_dropout': 0.1}, 'infini': {**SIZES['infini'], 'ff_dropout': 0.1}}
    for model, parallel in (('rmt', 'ddp'), ('infini', 'ddp'), ('rmt', 'fsdp')):
        with at_work(sizes):
            how = '--parallel', parallel
            ended(new(model, '--steps', 6, '--name', f'{model}-{parallel}-all', *how), 0, rank)
        with at_work(sizes), pytest.MonkeyPatch.context() as patch:
            name = f'{model}-{parallel}-stop'
            if rank == ranks - 1:
                at_step(patch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
            ended(new(model, '--steps', 6, '--name', name, *how), 128 + signal.SIGTERM, rank)
            assert steps(run(name)) == [0, 3]
        with at_work(sizes):
            ended(main('--resume', run(name), *how), 0, rank)
            assert steps(run(name)) == [3, 6]
            if ranks == 2 or parallel == 'fsdp':
                same_run(name, f'{model}-{parallel}-all')
            else:  # DistributedDataParallel sums in another order after its first step, which three addends can tell
                same_losses(name, f'{model}-{parallel}-all', 6)


@case(2)
def a_checkpoint_for_one_process(rank, ranks):
    """`test_train_ranks.py` resumes these runs in one process."""
    for model, parallel in (('rmt', 'ddp'), ('infini', 'fsdp')):
        with at_work(), pytest.MonkeyPatch.context() as patch:
            at_step(patch, {7: lambda: os.kill(os.getpid(), signal.SIGTERM)})
            name = f'{model}-for-one'
            ended(new(model, '--steps', STEPS, '--name', name, '--parallel', parallel), 128 + signal.SIGTERM, rank)


@case(2)
def the_clock_is_one(rank, ranks):
    """The clock of one rank runs 50 times as fast: all stop, and all save, when the fastest says so."""
    saved, clock = [], time.perf_counter
    save = Training.save
    with at_work(), pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(trainer.time, 'perf_counter', lambda: 50 * clock())
        patch.setattr(Training, 'save', lambda training, place: (saved.append(training.step), save(training, place)))
        begun = clock()
        done = main(
            '--data', 'text', '--valid-bytes', 600, '--minutes', 0.2, '--save-minutes', 0.02, '--name', 'clock'
        )  # fmt: skip
        ended(done, 0, rank)
        assert clock() - begun < 10
        of_ranks = [None] * ranks
        dist.all_gather_object(of_ranks, saved)
        assert of_ranks[0] == of_ranks[1]
        assert len(saved) > 2
        assert metrics(run('clock'))[-2]['seconds'] >= 12


@case(2)
def every_rank_draws_its_own_dropout(rank, ranks):
    drawn, train_loss = [], trainer.train_loss

    def watching(wrapper, *arguments):
        weights = torch.cat([parameter.detach().flatten() for parameter in wrapper.parameters()])
        drawn.append((torch.get_rng_state(), weights))
        return train_loss(wrapper, *arguments)

    with at_work(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, 'train_loss', watching)
        ended(new('rmt', '--steps', 1, '--name', 'dropout'), 0, rank)
    of_ranks = [None] * ranks
    dist.all_gather_object(of_ranks, drawn[0])
    (state, weights), (other_state, other_weights) = of_ranks
    assert not torch.equal(state, other_state)
    assert torch.equal(weights, other_weights)


@case(2)
def nan_on_one_rank(rank, ranks):
    """All stop before the step. The rank whose rows they are is named, with the segment and the tensor."""
    for parallel in ('ddp', 'fsdp'):
        with at_work():
            name = f'nan-{parallel}'
            with spoiled(3, 2) if rank == 1 else nullcontext():
                done = new('rmt', '--steps', 6, '--name', name, '--parallel', parallel)
            ended(done, 1, rank)
            assert rank or 'step 3 has NaN' in done.err
            assert rank or 'what rank 1 reads, segment 2 of 4: the output of layers.1.ff' in done.err, done.err
            assert steps(run(name)) == [0]
            assert len(metrics(run(name))) == 2


@case(2)
def nan_on_one_rank_that_is_left_out(rank, ranks):
    with at_work(), spoiled(3, 2) if rank == 1 else nullcontext():
        ended(new('rmt', '--steps', 6, '--name', 'skipped', '--skip-bad-steps', 1), 0, rank)
        assert 'what rank 1 reads' in metrics(run('skipped'))[2]['skipped']
        assert steps(run('skipped')) == [0, 6]


@case(2)
def a_full_disk_while_saving(rank, ranks):
    """Only the first rank meets it. All go on, and the next checkpoint is saved."""
    saved, save_weights = [], trainer.save_weights

    def full_once(model, path):
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, 'No space left on device')
        save_weights(model, path)

    with at_work(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, 'save_weights', full_once)
        done = new('rmt', '--steps', 3, '--name', 'full', '--save-minutes', 0)
        ended(done, 0, rank)
        assert rank or 'not saved   step 1: ' in done.out
        assert steps(run('full')) == [2, 3]


@case(2)
def a_disk_that_stays_full(rank, ranks):
    """The first rank shows validation and sample, and then the error. The other one waits, and is silent."""

    def full(model, path):
        if saved:
            raise OSError(28, 'No space left on device')
        saved.append(path)
        save_weights(model, path)

    saved, save_weights = [], trainer.save_weights
    with at_work(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, 'save_weights', full)
        done = new('rmt', '--steps', 3, '--name', 'stays-full')
        ended(done, 1, rank)
        assert rank or 'sample      ' in done.out
        assert rank or 'error: rank 0 of 2: the end of the training is not saved, only step 0; to go on' in done.err


@case(2)
def a_reader_that_goes_away(rank, ranks):
    """Nobody reads what the first rank prints: both save after the step, and end."""
    for place, name, saved in ((train_enwik8, 'before', [0]), (trainer, 'in-a-step', [0, 2])):
        say, lines = place.say, []

        def closed(text, say=say, lines=lines):
            lines.append(text)
            if len(lines) == 1:
                console._gone.append(sys.stdout)
            say(text)

        with at_work(), pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(place, 'say', closed)
            ended(new('rmt', '--steps', 6, '--name', name), 128 + signal.SIGPIPE, rank)
            assert steps(run(name)) == saved


@case(2)
def different_bytes_or_options(rank, ranks):
    """Ranks on different machines may have been started differently: refused, by one of them alone."""
    (FOLDER / f'text-{rank}').write_bytes((FOLDER / 'text').read_bytes() + b'x' * rank)
    cases = (
        (('--data', f'text-{rank}'), '--data is text-1 for rank 1, and text-0 for rank 0'),
        (('--keep', rank + 1), '--keep is 2 for rank 1, and 1 for rank 0'),
        (('--parallel', ('ddp', 'fsdp')[rank]), '--parallel is fsdp for rank 1'),
    )
    for arguments, why in cases:
        with at_work():
            done = new('rmt', '--steps', 2, '--name', 'different', *arguments)
            ended(done, 1, rank)
            assert rank or why in done.err, done.err
    load_corpus = train_enwik8.load_corpus
    with at_work(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_enwik8, 'load_corpus', lambda path, **options: load_corpus(f'text-{rank}', **options))
        done = new('rmt', '--steps', 2, '--name', 'different')
        ended(done, 1, rank)
        assert rank or 'rank 1 has other bytes than rank 0: their sha256 are ' in done.err, done.err
    with at_work(), pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(train_enwik8, 'load_corpus', lambda path, **options: load_corpus('missing', **options))
        done = new('rmt', '--steps', 2, '--name', 'different')
        assert done.code == 1
        assert done.err.startswith('error: rank 1 of 2: missing') if rank == 1 else done.err == ''
        assert not run('different').exists()


@case(2)
def what_is_refused(rank, ranks):
    """All ranks end, the first one says why, and nothing is left behind."""
    odd = {**SIZES, 'training': {**SIZES['training'], 'batch_size': 3}}
    short = {**SIZES, 'training': {**SIZES['training'], 'segments': 1}}
    cases = (
        (odd, 'rmt', (), 'the 3 rows of a batch cannot be divided among 2 ranks'),
        (SIZES, 'rmt', ('--context-parallel', 2), 'needs --model infini with memory'),
        (SIZES, 'infini', ('--context-parallel', 2, '--memory', 'off'), 'needs --model infini with memory'),
        (short, 'infini', ('--context-parallel', 2), 'has 1 segments, and each rank needs one'),
        (SIZES, 'rmt', ('--data', 'missing'), 'missing'),
        (SIZES, 'rmt', ('--data', 'tiny'), 'bytes'),
        (SIZES, 'rmt', ('--name', 'rmt-whole'), 'is there already'),
    )
    (FOLDER / 'tiny').write_bytes(b'too small')
    for sizes, model, arguments, why in cases:
        with at_work(sizes):
            before = sorted(Path('runs').iterdir())
            done = main('--data', 'text', '--model', model, '--steps', 2, *arguments)
            ended(done, 1, rank)
            assert rank or why in done.err, done.err
            assert sorted(Path('runs').iterdir()) == before
    with at_work():
        done = new('rmt', '--minutes', 'nan')
        ended(done, 2, rank)
        assert rank or 'it must be above 0' in done.err
