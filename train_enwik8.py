"""Trains a segment-recurrent transformer on bytes, and reports in bits per byte what it learned.

    python train_enwik8.py                                    # laptop CPU, about 3 minutes
    python train_enwik8.py --data enwik8.gz --preset base     # one GPU
    python train_enwik8.py --steps 500 --memory off           # the twin to compare with --steps 500
    python train_enwik8.py --resume runs/NAME                 # continues a run that was stopped
    python train_enwik8.py --compare runs/A runs/B            # a table and a plot of runs that have ended
    torchrun --nproc-per-node=2 train_enwik8.py               # the same run in two processes; docs/distributed.md
    python train_enwik8.py --sample --resume runs/NAME --prompt "import "

Each row of a batch goes through its documents in order. Its state is carried from step to step, and reset where a
document starts. The folder runs/NAME gets metrics.jsonl, plots, run.json (what the run fixes), config.json (the
arguments of the model), model.safetensors, and checkpoints. Ctrl-C and SIGTERM save and end the program.
docs/reliability.md tells what happens when something fails.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == '__main__':
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load ends without a traceback
    # threads that wait sleep, which is read when torch is loaded: else a step takes many times as long while another
    # program keeps one of the cores busy
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import argparse
import io
import json
import math
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.checkpoint import check_name, load_weights
from segment_recurrence_pytorch.checks import is_number, is_whole
from segment_recurrence_pytorch.compare import VALIDATED, Run, read_ended, table
from segment_recurrence_pytorch.console import discard_output, prepare_output, reader_is_gone, say
from segment_recurrence_pytorch.data import PYTHON_SOURCE, Corpus, Streams, baselines, load_corpus, python_source
from segment_recurrence_pytorch.distributed import gathered
from segment_recurrence_pytorch.metrics import keep_steps, write_validation
from segment_recurrence_pytorch.model import SegmentModel
from segment_recurrence_pytorch.ranks import TIMEOUT, Ranks, lost_rank, rank_of_environment
from segment_recurrence_pytorch.run_folder import checkpoints, held
from segment_recurrence_pytorch.trainer import Training
from segment_recurrence_pytorch.training import (
    bits_per_byte,
    check_writable,
    first_bytes,
    has_bfloat16,
    valid_streams,
    write_on,
)

# the arguments of the models, and how they are trained: segments of a step, batch, learning rate, steps or minutes
PRESETS: dict[str, dict[str, Any]] = {
    'small': {
        'rmt': dict(dim=128, depth=3, heads=2, seq_len=64, num_memory_tokens=4, rotary_pos_emb=True),
        'infini': dict(dim=128, depth=3, heads=2, dim_head=64, segment_length=64),
        'training': dict(segments=4, batch_size=16, lr=2e-3, minutes=3.0),
    },
    'base': {
        'rmt': dict(dim=512, depth=8, heads=8, seq_len=256, num_memory_tokens=16, rotary_pos_emb=True),
        'infini': dict(dim=512, depth=8, heads=8, dim_head=64, segment_length=256),
        'training': dict(segments=4, batch_size=32, lr=1e-3, steps=20_000),
    },
    # arXiv 2207.06881, enwik8: 12 layers, segment 128, 10 memory tokens, 400k steps; arXiv 2404.07143: the PG19 sizes
    'paper': {
        'rmt': dict(dim=512, depth=12, heads=8, seq_len=128, num_memory_tokens=10, rotary_pos_emb=True),
        'infini': dict(dim=1024, depth=12, heads=8, dim_head=128, memory_rule='delta', segment_length=2048),
        'training': dict(segments=3, batch_size=22, lr=2.5e-4, steps=400_000),
    },
}
SAMPLE_BYTES, PROMPT = 256, 'import '
SAMPLE_SEGMENTS = 3  # whole segments that are read before the sample at the end of a training
FIXED = 'model', 'preset', 'memory', 'seed'  # the settings that cannot change in a run; the bytes of the corpus neither
PRECISIONS = 'float32', 'bfloat16'
# what run.json says of each setting
RUN_CHECKS = {
    'model': lambda value: value in MODELS,
    'preset': lambda value: value in PRESETS,
    'memory': lambda value: value in VALIDATED,
    'seed': lambda value: is_whole(value) and -(2**63) <= value < 2**64,
    'data': lambda value: value is None or isinstance(value, str),
    'precision': lambda value: value in PRECISIONS,
    'steps': lambda value: value is None or (is_whole(value) and value > 0),
    'minutes': lambda value: value is None or (is_number(value) and 0 < value <= MOST),
    'valid_bytes': lambda value: is_whole(value) and value >= 0,
}
OWN_OPTIONS = 'device', 'threads'  # options that may differ from rank to rank
# options that a run does not hold, so that the command which goes on with it repeats them
REPEATED = ('parallel', 'context_parallel', 'save_minutes', 'keep', 'skip_bad_steps', 'timeout_minutes', 'compare',
            'compile', 'threads', 'device')  # fmt: skip
MOST = 1e9  # steps, minutes and other numbers of the command line: two thousand years of minutes
LONGEST_NAME = 200  # bytes; file systems take 255, and hidden names are longer


def main() -> None:
    """Trains a model, or samples from a trained one. Ends the program with one line where something is wrong."""
    is_first = not rank_of_environment()
    prepare_output(silent=not is_first)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    args = folder = ranks = None
    try:
        with nullcontext() if is_first else redirect_stderr(io.StringIO()):  # what all ranks would say, one says
            args = parse_arguments()
        ranks = Ranks(args.device, timeout=args.timeout_minutes)
        options = ranks.gather({name: value for name, value in vars(args).items() if name not in OWN_OPTIONS})
        ranks.on_first(lambda: check_same_options(options))
        beside = ranks.on_first(lambda: [read_ended(Path(each)) for each in args.compare])
        if len(beside) > 1:
            ranks.on_first(lambda: compare_runs(beside))
            ranks.close()
            return
        run, folder = ranks.on_first(lambda: open_run(args))
        if not args.sample:
            train(args, run, folder, ranks, beside)
        elif ranks.is_first:
            sample_run(args, run, folder)
        ranks.close()
    except KeyboardInterrupt:
        say(f'\nstopped{"" if args is None or args.sample else going_on(folder, args)}')
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        discard_output()
    except (ValueError, OSError) as error:
        is_shown = ranks is not None and ranks.shown_elsewhere is error
        sys.exit(1 if is_shown else f'error: {of_rank(ranks)}{error}')
    except RuntimeError as error:
        how = lost_rank(error)
        if ranks is None or how is None:
            raise
        message = f'error: {of_rank(ranks)}another rank has ended or does not answer ({how}){going_on(folder, args)}'
        if ranks.owns_group:  # nothing that waits for the others may run any more
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        sys.exit(message)
    if reader_is_gone():
        sys.exit(128 + signal.SIGPIPE)


def of_rank(ranks: Ranks | None) -> str:
    """Returns the beginning of an error message, which tells the rank if there are several."""
    return '' if ranks is None or ranks.size == 1 else f'rank {ranks.rank} of {ranks.size}: '


def train(args: argparse.Namespace, run: dict[str, Any], folder: Path, ranks: Ranks, beside: list[Run]) -> None:
    """Makes one run, from loading the corpus to printing a sample.

    Args:
        args: the command line.
        run: the settings of the run.
        folder: the folder of the run.
        ranks: the processes that make the run together. The first one prints and writes.
        beside: the run to compare with at the end, if any.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    ranks.on_first(lambda: check_parallel(args, run, ranks))
    ranks.divide(args.context_parallel)
    if args.download and ranks.size > 1:  # by one rank
        ranks.on_first(lambda: load_run_corpus(args, run, folder).sha256)
    corpus = ranks.together(lambda: load_run_corpus(args, run, folder))
    sums = ranks.gather(corpus.sha256)
    ranks.on_first(lambda: check_same_corpus(sums))
    say(f'corpus      {corpus.name}: {sum(map(len, corpus.train)):,} training bytes')
    say(f'            sha256 {corpus.sha256}')
    training = ranks.together(lambda: make_training(args, run, folder, ranks, corpus))
    plots = import_plots()
    model, memory = training.model, training.memory
    valid = first_bytes(corpus.valid, run['valid_bytes'])
    with ExitStack() as stack:
        place = ranks.on_first(lambda: stack.enter_context(held(folder, new=not args.resume)))
        training.begin(place)
        say(f'run         {folder}{f", from step {training.step:,} on" if training.step else ""}')
        log = folder / 'metrics.jsonl'
        if lost := ranks.on_first(lambda: keep_steps(log, training.step)):
            say(f'metrics     {log} has no line of {lost:,} of {training.step:,} steps: plots leave them out')
        reference = ranks.on_first(lambda: baselines(corpus.train, valid))
        for name, bits in reference.items():
            say(f'{name:11} {bits:.3f} bits per byte, of the same {sum(map(len, valid)):,} validation bytes')
        training.go_on(log)

        scores = {}
        for name, carry in (('carried', True), ('reset', False)):
            with training.precision:
                pieces = map(ranks.piece, valid_streams(valid, training.streams.length))
                scores[name] = bits_per_byte(training.wrapper, pieces, carry)
        report(run, folder, scores, training.step, training.seconds)
        with gathered(model):
            if ranks.is_first:
                levels = {'validation': scores[VALIDATED[run['memory']]], **reference}
                try:
                    write_validation(log, {'step': training.step, 'valid': scores, **reference})
                    if beside:
                        say(table([*beside, read_ended(folder)]))
                except (OSError, ValueError) as error:  # the disk is full, or the folder is gone
                    say(f'not logged  {error}')
                draw_plots(plots, folder, levels, run['model'], beside)
                print_sample(training.wrapper, valid, memory)
        ranks.on_first(training.check_saved)  # the others wait for the first one, and end as it does


def make_training(
    args: argparse.Namespace, run: dict[str, Any], folder: Path, ranks: Ranks, corpus: Corpus
) -> Training:
    """Returns a run that can begin, and says what it is. It writes nothing.

    Args:
        args: the command line.
        run: the settings of the run.
        folder: the folder of the run.
        ranks: the processes that make the run together.
        corpus: the bytes.
    """
    settings = PRESETS[run['preset']]['training']

    def streams(wrapper: SegmentWrapper) -> Streams:
        length = wrapper.segment_length * settings['segments']
        order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(run['seed'])).tolist()
        valid_streams(first_bytes(corpus.valid, run['valid_bytes']), length)  # too small a corpus is refused now
        return Streams([corpus.train[i] for i in order], settings['batch_size'], length, loop=True)

    training = Training(
        lambda device, group: build(run, device, group),
        streams,
        run,
        about={'run': run, **sizes(run), 'corpus': corpus.name, 'sha256': corpus.sha256, 'torch': torch.__version__},
        fixed={name: run[name] for name in FIXED} | sizes(run) | {'sha256': corpus.sha256},
        lr=settings['lr'],
        folder=folder,
        ranks=ranks,
        options=args,
        going_on=partial(going_on, folder, args),
    )
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    say(
        f'model       {run["model"]}, memory {run["memory"]}, {parameters:,} parameters,'
        f' {ranks.device.type}, {run["precision"]}, attention {training.model.attention_backend}'
    )
    if ranks.size > 1:
        context = f', {ranks.context} for the segments of a row' if ranks.context > 1 else ''
        say(f'ranks       {ranks.size}, {args.parallel}{context}')
    return training


def build(run: dict[str, Any], device: torch.device, group: Any) -> SegmentWrapper:
    """Returns the model of a run in its wrapper.

    Args:
        run: the settings of the run.
        device: the device.
        group: the ranks over which losses are summed, or None.
    """
    model, segment_length = MODELS[run['model']](**PRESETS[run['preset']][run['model']])
    return SegmentWrapper(model, segment_length=segment_length, process_group=group).to(device)


def check_same_options(options: list[dict[str, Any]]) -> None:
    """Raises ValueError if the ranks were started with different command lines.

    Args:
        options: the command line of each rank.
    """
    for rank, given in enumerate(options):
        for name in sorted(set(given) | set(options[0])):
            if given.get(name) != options[0].get(name):
                raise ValueError(
                    f'--{name.replace("_", "-")} is {given.get(name)} for rank {rank}, and {options[0].get(name)} for '
                    'rank 0: start all ranks with the same command line'
                )


def check_same_corpus(sums: list[str]) -> None:
    """Raises ValueError if the ranks have different bytes.

    Args:
        sums: the sha256 of the corpus of each rank.
    """
    for rank, found in enumerate(sums):
        if found != sums[0]:
            raise ValueError(
                f'rank {rank} has other bytes than rank 0: their sha256 are {found} and {sums[0]}. Put the same corpus '
                'on all machines, or give it as --data'
            )


def check_parallel(args: argparse.Namespace, run: dict[str, Any], ranks: Ranks) -> None:
    """Raises ValueError if the ranks cannot divide the work of a run.

    Args:
        args: the command line.
        run: the settings of the run.
        ranks: the processes.
    """
    training, context = PRESETS[run['preset']]['training'], args.context_parallel
    if ranks.size % context:
        raise ValueError(
            f'--context-parallel {context} does not divide the number of processes, {ranks.size}: start a multiple '
            'of it'
        )
    if training['batch_size'] % (ranks.size // context):
        raise ValueError(
            f'the {training["batch_size"]} rows of a batch cannot be divided among {ranks.size // context} ranks: '
            'start another number of processes'
        )
    if context == 1:
        return
    if run['model'] != 'infini' or run['memory'] != 'on':
        raise ValueError(
            f'--context-parallel {context} needs --model infini with memory, whose segments different ranks can read '
            'at once: leave it out'
        )
    if training['segments'] < context:
        raise ValueError(
            f'--context-parallel is {context}, but a row of this preset has {training["segments"]} segments, and each '
            'rank needs one: give a smaller number'
        )


def parse_arguments() -> argparse.Namespace:
    """Returns the command line.

    The settings that are fixed for a run are missing in it unless they were given, so that --resume can tell whether
    they were.
    """
    parser = make_parser()
    args = parser.parse_args()
    if args.sample and not args.resume:
        parser.error('--sample needs a trained model: give its folder as --resume FOLDER')
    for name, default in (('prompt', PROMPT), ('bytes', SAMPLE_BYTES), ('temperature', 1.0)):
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.sample:
            parser.error(f'--{name} is for a sample from a run: add --sample --resume FOLDER, or leave it out')
    if args.sample and not args.prompt:
        parser.error('--prompt is empty: give at least one character')
    if args.compare and args.sample:
        parser.error('--sample prints text, --compare a table: give one of them')
    if len(args.compare) > 1 and (args.resume or args.name is not None):
        parser.error('--compare with several runs trains none: leave --resume and --name out')
    if args.resume and any(Path(each).resolve() == Path(args.resume).resolve() for each in args.compare):
        parser.error('--compare names the run of --resume: give another run')
    if len({Path(each).resolve() for each in args.compare}) < len(args.compare):
        parser.error('--compare names a run twice: give each of them once')
    if args.resume == '':
        parser.error('--resume is empty: give the folder of a run')
    if args.name is not None and args.resume:
        parser.error('--name names a new run, --resume goes on with an old one: give one of them')
    if args.name is not None and (args.name == '' or Path(args.name).name != args.name):
        parser.error(f'--name is {args.name!r}: give the name of one folder, and the folder that holds it as --out')
    if args.name is not None and args.name.startswith('.'):
        parser.error(f'--name is {args.name!r}: it begins with a point, as names of folders that are not done do')
    if args.name is not None and len(os.fsencode(args.name)) > LONGEST_NAME:
        parser.error(f'--name has {len(os.fsencode(args.name))} bytes: give at most {LONGEST_NAME}')
    for name in ('steps', 'minutes', 'threads', 'bytes', 'keep', 'context_parallel', 'timeout_minutes'):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            finite = ', and finite' if value > 0 else ''
            parser.error(f'--{name.replace("_", "-")} is {value}: it must be above 0{finite}')
        if value is not None and value > MOST:
            parser.error(f'--{name.replace("_", "-")} is {value:g}: give at most {MOST:g}')
    for name in ('valid_bytes', 'save_minutes', 'skip_bad_steps', 'temperature'):
        value = getattr(args, name) or 0
        if not 0 <= value < math.inf:
            parser.error(f'--{name.replace("_", "-")} is {value}: give 0, or a finite number above it')
    if not -(2**63) <= getattr(args, 'seed', 0) < 2**64:
        parser.error(f'--seed is {args.seed}: it must fit into 64 bits')
    if args.download and getattr(args, 'data', None):
        parser.error('--download fetches enwik8, --data names another file: give one of them')
    try:
        own = int(os.environ.get('LOCAL_RANK', '0'))
        if torch.device(args.device) == torch.device('cuda') and own < torch.cuda.device_count():
            torch.cuda.set_device(own)  # before anything is made on the first GPU, which other processes use
        torch.ones(1, device=args.device).item()  # the device meta makes tensors too, but without numbers
    except Exception as error:  # each kind of device has errors of its own
        parser.error(f'--device {args.device} cannot be used here: {str(error).splitlines()[0]}')
    if args.compile and args.context_parallel > 1:
        parser.error('--compile reads on one rank, --context-parallel on several: give one of them')
    if args.compile and args.parallel == 'fsdp':
        parser.error('--compile needs whole parameters, --parallel fsdp gives each rank a part: give one of them')
    if args.compile:
        check_compiler(parser, args.device)
    return args


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line. The settings that are fixed for a run have no default in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what to train (fixed for a run, but for the place of the data)')
    what.add_argument('--model', choices=list(MODELS), default=argparse.SUPPRESS, help='default rmt')
    what.add_argument('--preset', choices=list(PRESETS), default=argparse.SUPPRESS, help='sizes; default small')
    what.add_argument('--memory', choices=['on', 'off'], default=argparse.SUPPRESS, help='off: reset at every segment')
    what.add_argument('--seed', type=int, default=argparse.SUPPRESS, help='default 0')
    what.add_argument('--data', metavar='PATH', default=argparse.SUPPRESS,
                      help='raw, .gz, .bz2, .xz, .zip; default data/enwik8*, else the source of Python')  # fmt: skip
    how_long = parser.add_argument_group('how long')
    how_long.add_argument('--steps', type=int, help='optimizer steps: a run that can be repeated')
    how_long.add_argument('--minutes', type=float, help='minutes of training; the schedule follows the clock')
    how_long.add_argument('--valid-bytes', type=int, help='validation bytes to score, default 131072; 0: all')
    safe = parser.add_argument_group('what is kept')
    safe.add_argument('--save-minutes', type=float, default=5.0,
                      help='minutes between two checkpoints, default 5; 0: one after every step')  # fmt: skip
    safe.add_argument('--keep', type=int, default=2, help='number of checkpoints that stay, default 2')
    safe.add_argument('--skip-bad-steps', type=int, default=0, metavar='N',
                      help='leave out up to N steps with NaN or infinite values; default 0')  # fmt: skip
    sample = parser.add_argument_group('sample from a run instead of training')
    sample.add_argument('--sample', action='store_true', help='print how the model in --resume goes on')
    sample.add_argument('--prompt', help=f'what it goes on after, default {PROMPT!r}')
    sample.add_argument('--bytes', type=int, help=f'how far, default {SAMPLE_BYTES}')
    sample.add_argument('--temperature', type=float, help='0: always the most likely byte; default 1')
    compared = parser.add_argument_group('runs beside each other')
    compared.add_argument('--compare', nargs='+', default=[], metavar='RUN',
                          help='folders of runs that have ended: a table and a plot of them, and no training. One RUN: '
                               'train, and compare with it at the end')  # fmt: skip
    many = parser.add_argument_group('many processes (start them with torchrun)')
    many.add_argument('--parallel', choices=['ddp', 'fsdp'], default='ddp',
                      help='each process has a copy of the parameters, or a part of them; default ddp')  # fmt: skip
    many.add_argument('--context-parallel', type=int, default=1, metavar='N',
                      help='N processes read the segments of the same rows (--model infini); default 1')  # fmt: skip
    many.add_argument('--timeout-minutes', type=float, default=TIMEOUT,
                      help=f'how long a process waits for another one, default {TIMEOUT:g}')  # fmt: skip
    where = parser.add_argument_group('where')
    where.add_argument('--out', default='runs', help='folder of the runs, default runs')
    where.add_argument('--name', help='folder of this run in --out; default MODEL-PRESET-TIME')
    where.add_argument('--resume', metavar='FOLDER', help='go on with the run in this folder')
    where.add_argument('--download', action='store_true', help='fetch enwik8 into data/ if it is not there')
    where.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    where.add_argument('--threads', type=int, help='CPU threads')
    where.add_argument('--precision', choices=PRECISIONS, default=argparse.SUPPRESS,
                       help='of matrix products; default bfloat16 where the device has it')  # fmt: skip
    where.add_argument('--compile', action='store_true',
                       help='compile the training: minutes at the start; docs/script.md has the gain')  # fmt: skip
    return parser


def check_compiler(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program with a message if nothing can be compiled: on a CPU that needs a C++ compiler."""
    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except Exception as error:
        why, *_ = str(error).strip().splitlines() or [type(error).__name__]
        parser.error(f'--compile cannot be used here: {why}. Install a C++ compiler, or leave it out')


def open_run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Returns the settings of the run, and its folder. It creates and changes nothing.

    With --resume it is the folder of the old run, whose settings must not change. Without, it is a folder that can be
    made.

    Args:
        args: the command line.
    """
    default: dict[str, Any] = {'model': 'rmt', 'preset': 'small', 'memory': 'on', 'seed': 0, 'data': None}
    default['precision'] = 'bfloat16' if has_bfloat16(torch.device(args.device)) else 'float32'
    given = {name: value for name, value in vars(args).items() if name in default}
    if args.sample:  # with --sample, --seed is the seed of the sample and not that of the run
        given.pop('seed', None)
    length = {'steps': args.steps, 'minutes': args.minutes}
    if args.resume:
        folder = Path(args.resume)
        saved = read_run(folder)['run']
        for name in FIXED:
            if given.get(name, saved[name]) != saved[name]:
                raise ValueError(f'{folder} was made with --{name} {saved[name]}, not {given[name]}: leave it out')
        if not args.sample:
            check_writable(folder, 'make it writable, or go on with a copy of it')
        run = saved | given | (length if any(length.values()) else {})
    else:
        run = default | given
        twin = '' if run['memory'] == 'on' else '-memory-off'
        # milliseconds, since several runs may be started at once
        now = f'{time.strftime("%Y%m%d-%H%M%S")}-{time.time_ns() // 1_000_000 % 1000:03}'
        name = args.name or f'{run["model"]}-{run["preset"]}{twin}-{now}'
        folder = Path(args.out) / name
        check_name(folder)
        if folder.exists():
            raise ValueError(f'{folder} is there already: give another --name, or --resume {shlex.quote(str(folder))}')
        check_writable(next(parent for parent in folder.parents if parent.exists()), 'give another --out')
        if not any(length.values()):
            length = {name: PRESETS[run['preset']]['training'].get(name) for name in length}
        run |= length | {'valid_bytes': 131_072}
    return run if args.valid_bytes is None else run | {'valid_bytes': args.valid_bytes}, folder


def read_run(folder: Path) -> dict[str, Any]:
    """Returns what run.json says of a run: its settings and its corpus.

    Args:
        folder: the folder of the run.

    Raises:
        ValueError: if the folder holds no run, or one of another version of this program, or if run.json is damaged.
    """
    path = folder / 'run.json'
    if not os.path.isdir(folder):
        raise ValueError(f'{folder} is no run to go on with: there is no such folder. Give that of a run, as runs/NAME')
    if os.path.exists(folder / 'training.pt') and not os.path.exists(path):
        raise ValueError(
            f'{folder} was made by an earlier version of this program, which wrote no checkpoints: '
            'go on with that version, or train again'
        )
    try:
        about = json.loads(path.read_text())
        run = about['run']
        wrong = [name for name, check in RUN_CHECKS.items() if not check(run[name])]
        if wrong or not any((run['steps'], run['minutes'])):
            raise ValueError(f'{wrong[0]} is {run[wrong[0]]!r}' if wrong else 'it has neither steps nor minutes')
        made_with, known = {name: about[name] for name in ('sizes', 'training')}, sizes(run)
        about['sha256'], about['corpus']
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f'{path} lacks {error}' if isinstance(error, KeyError) else f'{path}: {error}'
        raise ValueError(f'{folder} is no run to go on with: {why}') from error
    if made_with != json.loads(json.dumps(known)):
        raise ValueError(f'{folder} was made with {made_with}, the preset {run["preset"]} is now {known}')
    return about


def sizes(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes of the model of a run, and how it is trained."""
    preset = PRESETS[run['preset']]
    training = {name: value for name, value in preset['training'].items() if name not in ('steps', 'minutes')}
    return {'sizes': preset[run['model']], 'training': training}


def load_run_corpus(args: argparse.Namespace, run: dict[str, Any], folder: Path) -> Corpus:
    """Returns the corpus of a run. That of an old run must hold the same bytes as before, wherever they are now.

    Args:
        args: the command line.
        run: the settings of the run.
        folder: the folder of the run.
    """
    about = read_run(folder) if args.resume else {}
    # enwik8 may have come into data/ since, and has not to be read in its place
    from_python = run['data'] is None and str(about.get('corpus')).startswith(PYTHON_SOURCE)
    try:
        corpus = python_source() if from_python else load_corpus(run['data'], download=args.download)
    except ValueError as error:
        moved = args.resume and not hasattr(args, 'data')
        raise ValueError(f'{error}. If it was moved, say where it is now with --data' if moved else error) from error
    if about and about['sha256'] != corpus.sha256:
        how = f'go on with {about["corpus"]}' if from_python else 'give the file that holds these as --data'
        raise ValueError(
            f'{corpus.name} has other bytes than those that {folder} was trained on, which were {about["corpus"]} '
            f'with sha256 {about["sha256"]}: {how}'
        )
    return corpus


def import_plots() -> ModuleType | None:
    """Returns the module that plots. Without matplotlib it says what is missing, and returns None: a plot can be made
    after the training, from metrics.jsonl."""
    try:
        from segment_recurrence_pytorch import plots
    except ImportError as error:
        say(f'plots       none, {error}: pip install matplotlib, then --resume makes them')
        return None
    return plots


def draw_plots(plots: ModuleType | None, folder: Path, levels: dict[str, float], model: str, beside: list[Run]) -> None:
    """Draws the plots of a run, and says where they are.

    Args:
        plots: the module that plots, or None.
        folder: the folder of the run.
        levels: bits per byte by name, the validation first.
        model: the name of the model.
        beside: the run to compare with, if any.
    """
    if plots is None:
        return
    try:
        plots.plot_losses(folder, levels, beside)
        say(f'plot        {folder / "loss.png"}')
        if model == 'infini':
            plots.plot_memory_shares(folder)
            say(f'plot        {folder / "memory_shares.png"}')
    except Exception as error:  # the disk is full, or a plot meets what it does not know: the run is done all the same
        say(f'no plot     {type(error).__name__}: {error}')


def compare_runs(runs: list[Run]) -> None:
    """Prints a table of runs that have ended, and plots them in the folder of the first one.

    Args:
        runs: the runs.
    """
    say(table(runs))
    plots, path = import_plots(), runs[0].folder / 'compared.png'
    if plots is None:
        return
    try:
        plots.plot_comparison(runs, path)
        say(f'plot        {path}')
    except Exception as error:  # as in `draw_plots`: the table is there
        say(f'no plot     {type(error).__name__}: {error}')


def going_on(folder: Path | None, args: argparse.Namespace | None, **changed: Any) -> str:
    """Returns the end of a message that tells how to go on with a run. It is empty if there is nothing to go on with.

    Args:
        folder: the folder of the run. None: it is not known yet.
        args: the command line. None: it is not known yet.
        changed: options that shall be other ones then than they are now.
    """
    if args is None or folder is None or not checkpoints(folder):
        return ''
    start = 'python'
    if rank_of_environment() is not None:
        start = f'torchrun --nproc-per-node={os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])}'
    parser, again = make_parser(), [sys.argv[0], '--resume', str(folder)]
    for name in REPEATED:
        value = changed.get(name, getattr(args, name))
        if value != parser.get_default(name):
            values = [] if value is True else value if isinstance(value, list) else [value]
            again += [f'--{name.replace("_", "-")}']
            again += [f'{each:g}' if isinstance(each, float) else str(each) for each in values]
    return f'; to go on: {start} {shlex.join(again)}'


def build_rmt(**sizes: Any) -> tuple[SegmentModel, int]:
    """Returns a Recurrent Memory Transformer over bytes, and the length of its segments."""
    return RecurrentMemoryTransformer(num_tokens=256, use_flash_attn=True, **sizes), sizes['seq_len']


def build_infini(*, segment_length: int, **sizes: Any) -> tuple[SegmentModel, int]:
    """Returns an Infini-Transformer over bytes, and the length of its segments."""
    return InfiniTransformer(num_tokens=256, **sizes), segment_length


MODELS: dict[str, Callable[..., tuple[SegmentModel, int]]] = {'rmt': build_rmt, 'infini': build_infini}


def report(run: dict[str, Any], folder: Path, scores: dict[str, float], step: int, seconds: float) -> None:
    """Prints the validation, and what can be concluded from it.

    Args:
        run: the settings of the run.
        folder: the folder of the run.
        scores: bits per byte with the state carried ('carried') and with the state reset at every segment ('reset').
        step: number of training steps.
        seconds: seconds of training.
    """
    say(f'trained     {step:,} steps in {seconds:.0f} s')
    for name, bits in scores.items():
        say(f'validation  {bits:.3f} bits per byte, state {name}{" at every segment" if name == "reset" else ""}')
    twin = 'off' if run['memory'] == 'on' else 'on'
    names = 'model', 'preset', 'seed', 'data', 'precision', 'valid_bytes'
    given = {name.replace('_', '-'): run[name] for name in names if run[name] is not None}
    others = ''.join(f' --{name} {shlex.quote(str(value))}' for name, value in given.items())
    difference = scores['reset'] - scores['carried']
    say(
        f'            The difference, {difference:+.3f}, is a diagnostic: what this model leans on.\n'
        f'            What memory gains is another question: train a twin, both for the same number of steps, with\n'
        f'            --memory {twin} --steps {step}{others} --compare {shlex.quote(str(folder))}'
    )


def print_sample(wrapper: SegmentWrapper, texts: list[Tensor], memory: bool) -> None:
    """Prints how the model continues a text after some segments, and how it continues the last bytes of them alone. A
    model that was trained without memory continues only these, and only inside one segment.

    Args:
        wrapper: the model in its wrapper.
        texts: documents, (n,) bytes each. The first one that is long enough is continued.
        memory: whether the model was trained with memory.
    """
    length = wrapper.segment_length
    last = max(1, length // 2)
    text = next((text for text in texts if len(text) >= SAMPLE_SEGMENTS * length + last), max(texts, key=len))
    whole = min(SAMPLE_SEGMENTS, max(0, len(text) - last) // length) * length
    prompt = text[: whole + last].long()[None].to(wrapper.model.device)
    end = prompt[:, whole:]
    shown = repr(bytes(end[0].tolist()).decode(errors='replace'))
    if memory and whole:
        say(f'sample      the model has read {prompt.shape[1]} bytes of a validation text, up to {shown}:')
        write_on(wrapper, prompt, SAMPLE_BYTES)
        say(f'sample      without memory of the {whole} bytes before these {end.shape[1]}:')
    else:
        say(f'sample      the model goes on after these bytes of a validation text, {shown}:')
    write_on(wrapper, end, SAMPLE_BYTES if memory else length - end.shape[1])


def sample_run(args: argparse.Namespace, run: dict[str, Any], folder: Path) -> None:
    """Prints how a trained model continues the prompt of the command line.

    Args:
        args: the command line.
        run: the settings of the run.
        folder: the folder of the run.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    if hasattr(args, 'seed'):
        torch.manual_seed(args.seed)
    wrapper = build(run, torch.device(args.device), None)
    load_weights(wrapper.model, folder / 'model.safetensors')
    prompt = torch.tensor([list(os.fsencode(args.prompt))], device=args.device)
    count, room = args.bytes, wrapper.segment_length - prompt.shape[1]
    if run['memory'] == 'off' and count > room:
        raise ValueError(
            f'{folder} was trained without memory, for one segment of {wrapper.segment_length} bytes: '
            f'{prompt.shape[1]} in the prompt leave --bytes {max(0, room)}'
        )
    print(args.prompt, end='', flush=True)
    write_on(wrapper, prompt, count, temperature=args.temperature)


if __name__ == '__main__':
    main()
