"""Trains a segment-recurrent transformer on bytes, and reports in bits per byte what it learned.

    python train_enwik8.py                                    # laptop CPU, about 3 minutes
    python train_enwik8.py --data enwik8.gz --preset base     # one GPU
    python train_enwik8.py --steps 500 --memory off           # the twin to compare with --steps 500
    python train_enwik8.py --resume runs/NAME                 # continues a run that was stopped
    python train_enwik8.py --sample --resume runs/NAME --prompt "import "

Each row of a batch goes through its documents in order. Its state is carried from step to step, and reset where a
document starts. The folder runs/NAME gets metrics.jsonl, loss.png, config.json and model.safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.checkpoint import (
    load_training_state,
    load_weights,
    save_training_state,
    save_weights,
)
from segment_recurrence_pytorch.data import Streams, baselines, load_corpus
from segment_recurrence_pytorch.state import from_list, map_state, to_list
from segment_recurrence_pytorch.training import (
    StopRequest,
    bits_per_byte,
    check_writable,
    drop_lines_after,
    first_bytes,
    has_bfloat16,
    plot_losses,
    plot_memory_shares,
    train_loss,
    valid_streams,
    warmup_cosine,
    write_on,
)

# the arguments of the models, and how they are trained: segments of a step, batch, learning rate, steps or minutes
PRESETS: dict[str, dict[str, Any]] = {
    'small': {
        'rmt': dict(dim=128, depth=3, heads=2, seq_len=64, num_memory_tokens=4, rotary_pos_emb=True),
        'infini': dict(dim=128, depth=3, heads=2, dim_head=64, memory_rule='delta', segment_length=64),
        'training': dict(segments=4, batch_size=16, lr=2e-3, minutes=3.0),
    },
    'base': {
        'rmt': dict(dim=512, depth=8, heads=8, seq_len=256, num_memory_tokens=16, rotary_pos_emb=True),
        'infini': dict(dim=512, depth=8, heads=8, dim_head=64, memory_rule='delta', segment_length=256),
        'training': dict(segments=4, batch_size=32, lr=1e-3, steps=20_000),
    },
    # arXiv 2207.06881, enwik8: 12 layers, segment 128, 10 memory tokens, 400k steps; arXiv 2404.07143: the PG19 sizes
    'paper': {
        'rmt': dict(dim=512, depth=12, heads=8, seq_len=128, num_memory_tokens=10, rotary_pos_emb=True),
        'infini': dict(dim=1024, depth=12, heads=8, dim_head=128, memory_rule='delta', segment_length=2048),
        'training': dict(segments=3, batch_size=22, lr=2.5e-4, steps=400_000),
    },
}
WEIGHT_DECAY, CLIP = 0.01, 1.0
SAMPLE_BYTES, PROMPT = 256, 'import '
SAVE_SECONDS = 600
VALIDATED = {'on': 'carried', 'off': 'reset'}  # how the state is treated in validation, as in training


def main() -> None:
    """Trains a model, or samples from a trained one."""
    args = parse_arguments()
    run, folder = open_run(args)
    if args.sample:
        sample_run(args, run, folder)
    else:
        train(args, run, folder)


def train(args: argparse.Namespace, run: dict[str, Any], folder: Path) -> None:
    """Makes one run, from loading the corpus to printing a sample.

    Args:
        args: the command line.
        run: the settings that are fixed for the run.
        folder: the folder of the run.
    """
    import matplotlib  # noqa: F401  if it is missing, the error comes now and not after the training

    preset = PRESETS[run['preset']]
    training = preset['training']
    steps, minutes = run['steps'], run['minutes']
    if args.threads:
        torch.set_num_threads(args.threads)

    corpus = load_corpus(run['data'], download=args.download)
    print(f'corpus      {corpus.name}: {sum(map(len, corpus.train)):,} training bytes')
    print(f'            sha256 {corpus.sha256}')
    torch.manual_seed(run['seed'])
    device = torch.device(args.device)
    wrapper = MODELS[run['model']](**preset[run['model']]).to(device)
    model = wrapper.model
    length = wrapper.segment_length * training['segments']
    order = torch.randperm(len(corpus.train), generator=torch.Generator().manual_seed(run['seed'])).tolist()
    streams = Streams([corpus.train[i] for i in order], training['batch_size'], length, loop=True)
    valid = first_bytes(corpus.valid, run['valid_bytes'])
    valid_streams(valid, length)  # a corpus that is too small is refused now, not after the training
    optimizer = torch.optim.AdamW(model.param_groups(training['lr'], WEIGHT_DECAY), betas=(0.9, 0.95))
    scales = [group['lr'] / training['lr'] for group in optimizer.param_groups]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
    print(
        f'model       {run["model"]}, memory {run["memory"]}, {parameters:,} parameters,'
        f' {device.type}, {"bfloat16" if has_bfloat16(device) else "float32"}, attention {model.attention_backend}'
    )

    state, step, seconds = None, 0, 0.0
    if args.resume:
        saved = load_training_state(folder / 'training.pt')
        if saved.get('sha256') != corpus.sha256:
            raise ValueError(f'{folder} was trained on other bytes, sha256 {saved.get("sha256")}: give its --data')
        load_weights(model, folder / 'model.safetensors')
        optimizer.load_state_dict(saved['optimizer'])
        streams.load_state_dict(saved['streams'])
        step, seconds = saved['step'], saved['seconds']
        if saved['state'] is not None:
            state = map_state(lambda t: t.to(device), from_list(saved['state'], model.initial_state(1)))
        drop_lines_after(folder, step)
    else:
        folder.mkdir(parents=True)
        config = {'run': run, **preset, 'corpus': corpus.name, 'sha256': corpus.sha256, 'torch': torch.__version__}
        (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    print(f'run         {folder}{f", from step {step:,} on" if step else ""}')
    reference = baselines(corpus.train, valid)
    for name, bits in reference.items():
        print(f'{name:11} {bits:.3f} bits per byte, of the same {sum(map(len, valid)):,} validation bytes')

    def progress() -> float:
        return max(step / steps if steps else 0, seconds / (60 * minutes) if minutes else 0)

    def save() -> None:
        save_weights(model, folder / 'model.safetensors')
        carried = None if state is None else to_list(state)
        parts = {'optimizer': optimizer.state_dict(), 'streams': streams.state_dict(), 'state': carried}
        save_training_state(parts | {'step': step, 'seconds': seconds, 'sha256': corpus.sha256}, folder / 'training.pt')

    wrapper.train()
    unit = {'total': steps, 'initial': step, 'unit': 'step'} if steps else {'total': round(60 * minutes), 'unit': 's'}
    last_save = time.perf_counter()
    with (
        open(folder / 'metrics.jsonl', 'a', buffering=1) as metrics,
        tqdm(**unit, desc='training', disable=None) as bar,
        StopRequest() as stop,
    ):
        while progress() < 1 and not stop.requested:
            start = time.perf_counter()
            lr = training['lr'] * warmup_cosine(progress())
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                group['lr'] = lr * scale
            with precision:
                loss, num_targets, state = train_loss(wrapper, next(streams), state, run['memory'] == 'on')
            optimizer.zero_grad()
            loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            optimizer.step()
            step += 1
            taken = time.perf_counter() - start
            seconds += taken
            bits = loss.item() / math.log(2)
            line = {'step': step, 'bits': bits, 'lr': lr, 'gradient_norm': gradient_norm, 'bytes': int(num_targets)}
            if isinstance(model, InfiniTransformer):
                line['memory_shares'] = [
                    [round(share, 4) for share in layer] for layer in model.memory_shares().tolist()
                ]
            metrics.write(json.dumps(line | {'seconds': round(seconds, 2)}) + '\n')
            bar.update(1 if steps else min(taken, bar.total - bar.n))
            bar.set_postfix_str(f'step {step}, {bits:.3f} bits per byte')
            if bar.disable and step & (step - 1) == 0:
                print(f'step {step:6} {bits:7.3f} bits per byte {seconds:6.0f} s', flush=True)
            if time.perf_counter() - last_save > SAVE_SECONDS:
                save()
                last_save = time.perf_counter()

        save()
        if stop.requested:
            print(f'stopped at step {step:,} and saved; to go on: python train_enwik8.py --resume {folder}')
            return
        scores = {}
        for name, memory in (('carried', True), ('reset', False)):
            with precision:
                scores[name] = bits_per_byte(wrapper, valid_streams(valid, length), memory)
        metrics.write(json.dumps({'step': step, 'valid': scores, **reference}) + '\n')

    report(run, scores, step, seconds)
    plot_losses(folder, {'validation': scores[VALIDATED[run['memory']]], **reference})
    if isinstance(model, InfiniTransformer):
        plot_memory_shares(folder)
    print_sample(wrapper, valid[0], run['memory'] == 'on')


def parse_arguments() -> argparse.Namespace:
    """Returns the command line.

    The settings that are fixed for a run are missing in it unless they were given, so that --resume can tell whether
    they were.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what to train (fixed for a run)')
    what.add_argument('--model', choices=list(MODELS), default=argparse.SUPPRESS, help='default rmt')
    what.add_argument('--preset', choices=list(PRESETS), default=argparse.SUPPRESS, help='sizes; default small')
    what.add_argument('--memory', choices=['on', 'off'], default=argparse.SUPPRESS, help='off: reset at every segment')
    what.add_argument('--seed', type=int, default=argparse.SUPPRESS, help='default 0')
    what.add_argument('--data', metavar='PATH', default=argparse.SUPPRESS,
                      help='raw, .gz, .bz2, .xz, .zip; default data/enwik8*, else the source of Python')  # fmt: skip
    how_long = parser.add_argument_group('how long')
    how_long.add_argument('--steps', type=int, help='optimizer steps: the same run on every machine')
    how_long.add_argument('--minutes', type=float, help='minutes of training; the schedule follows the clock')
    how_long.add_argument('--valid-bytes', type=int, help='validation bytes to score, default 131072; 0: all')
    sample = parser.add_argument_group('sample from a run instead of training')
    sample.add_argument('--sample', action='store_true', help='print how the model in --resume goes on')
    sample.add_argument('--prompt', default=PROMPT, help=f'what it goes on after, default {PROMPT!r}')
    sample.add_argument('--bytes', type=int, default=SAMPLE_BYTES, help=f'how far, default {SAMPLE_BYTES}')
    sample.add_argument('--temperature', type=float, default=1.0, help='0: always the most likely byte; default 1')
    where = parser.add_argument_group('where')
    where.add_argument('--out', default='runs', help='folder of the runs, default runs')
    where.add_argument('--name', help='folder of this run in --out; default MODEL-PRESET-TIME')
    where.add_argument('--resume', metavar='FOLDER', help='go on with the run in this folder')
    where.add_argument('--download', action='store_true', help='fetch enwik8 into data/ if it is not there')
    where.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    where.add_argument('--threads', type=int, help='CPU threads')
    args = parser.parse_args()
    if args.sample and not args.resume:
        parser.error('--sample needs a trained model: give its folder as --resume FOLDER')
    if args.sample and not args.prompt:
        parser.error('--prompt is empty: give at least one character')
    for name in ('steps', 'minutes', 'threads', 'bytes'):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f'--{name} is {getattr(args, name)}: it must be above 0')
    if (args.valid_bytes or 0) < 0:
        parser.error(f'--valid-bytes is {args.valid_bytes}: give 0 (all) or more')
    if args.download and getattr(args, 'data', None):
        parser.error('--download fetches enwik8, --data names another file: give one of them')
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f'--device {args.device} is not there: {str(error).splitlines()[0]}')
    return args


def open_run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Returns the settings that are fixed for the run, and its folder. It creates and changes nothing.

    With --resume it is the folder of the old run, whose settings must not change. Without, it is a folder that can be
    made.

    Args:
        args: the command line.
    """
    fixed: dict[str, Any] = {'model': 'rmt', 'preset': 'small', 'memory': 'on', 'seed': 0, 'data': None}
    given = {name: value for name, value in vars(args).items() if name in fixed}
    if args.sample:  # with --sample, --seed is the seed of the sample and not that of the run
        given.pop('seed', None)
    length = {'steps': args.steps, 'minutes': args.minutes}
    if args.resume:
        folder = Path(args.resume)
        try:
            saved = json.loads((folder / 'config.json').read_text())['run']
            known = saved['model'] in MODELS and saved['preset'] in PRESETS and {'steps', 'minutes'} < set(saved)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{folder} is no run to go on with: {type(error).__name__} {error}') from error
        if not known:
            raise ValueError(f'{folder} is no run of this program: {saved}')
        for name, value in given.items():
            if saved[name] != value:
                raise ValueError(f'{folder} was made with --{name} {saved[name]}, not {value}: leave --{name} out')
        if not args.sample:
            check_writable(folder)
        run = saved | length if any(length.values()) else saved
    else:
        run = fixed | given
        twin = '' if run['memory'] == 'on' else '-memory-off'
        name = args.name or f'{run["model"]}-{run["preset"]}{twin}-{time.strftime("%Y%m%d-%H%M%S")}'
        folder = Path(args.out) / name
        if folder.exists():
            raise ValueError(f'{folder} is there already: give another --name, or --resume {folder}')
        check_writable(next(parent for parent in folder.parents if parent.exists()))
        if not any(length.values()):
            length = {name: PRESETS[run['preset']]['training'].get(name) for name in length}
        run |= length | {'valid_bytes': 131_072}
    return run if args.valid_bytes is None else run | {'valid_bytes': args.valid_bytes}, folder


def build_rmt(**sizes: Any) -> SegmentWrapper:
    """Returns a Recurrent Memory Transformer over bytes, in its wrapper."""
    return RecurrentMemoryTransformerWrapper(RecurrentMemoryTransformer(num_tokens=256, use_flash_attn=True, **sizes))


def build_infini(*, segment_length: int, **sizes: Any) -> SegmentWrapper:
    """Returns an Infini-Transformer over bytes, in its wrapper."""
    return InfiniTransformerWrapper(InfiniTransformer(num_tokens=256, **sizes), segment_length)


MODELS = {'rmt': build_rmt, 'infini': build_infini}


def report(run: dict[str, Any], scores: dict[str, float], step: int, seconds: float) -> None:
    """Prints the validation, and what can be concluded from it.

    Args:
        run: the settings of the run.
        scores: bits per byte with the state carried ('carried') and with the state reset at every segment ('reset').
        step: number of training steps.
        seconds: seconds of training.
    """
    print(f'trained     {step:,} steps in {seconds:.0f} s')
    for name, bits in scores.items():
        print(f'validation  {bits:.3f} bits per byte, state {name}{" at every segment" if name == "reset" else ""}')
    twin = 'off' if run['memory'] == 'on' else 'on'
    others = ''.join(f' --{name} {run[name]}' for name in ('model', 'preset', 'seed', 'data') if run[name] is not None)
    difference = scores['reset'] - scores['carried']
    print(
        f'            The difference, {difference:+.3f}, is a diagnostic: what this model leans on.\n'
        f'            What memory gains is another question: train a twin, both for the same number of steps, with\n'
        f'            --memory {twin} --steps {step}{others}\n'
        f'            and compare its validation, state {VALIDATED[twin]}, with {scores[VALIDATED[run["memory"]]]:.3f}.'
    )


def print_sample(wrapper: SegmentWrapper, text: Tensor, memory: bool) -> None:
    """Prints how the model continues a text. A model that was trained without memory continues it only inside one
    segment.

    Args:
        wrapper: the model in its wrapper.
        text: bytes, the first of which are the prompt, (n,).
        memory: whether the model was trained with memory.
    """
    prompt = text[: wrapper.segment_length // 2].long()[None].to(wrapper.model.device)
    shown = bytes(prompt[0].tolist()).decode(errors='replace')
    print(f'sample      the model goes on after the first bytes of the validation text, {shown!r}:')
    write_on(wrapper, prompt, SAMPLE_BYTES if memory else wrapper.segment_length - prompt.shape[1])


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
    wrapper = MODELS[run['model']](**PRESETS[run['preset']][run['model']]).to(args.device)
    load_weights(wrapper.model, folder / 'model.safetensors')
    prompt = torch.tensor([list(args.prompt.encode())], device=args.device)
    count, room = args.bytes, wrapper.segment_length - prompt.shape[1]
    if run['memory'] == 'off' and count > room:
        raise ValueError(
            f'{folder} was trained without memory, for one segment of {wrapper.segment_length} bytes: '
            f'{prompt.shape[1]} in the prompt leave --bytes {max(0, room)}'
        )
    print(args.prompt, end='', flush=True)
    write_on(wrapper, prompt, count, temperature=args.temperature)


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        sys.exit(f'error: {error}')
