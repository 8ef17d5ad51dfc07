"""Resident memory of processes that run for long: streaming generation, and training by the training script.

    nice python -m benchmarks.soak                         # half an hour; Linux, which tells it in /proc

Three processes run beside each other, one thread each. One generates tokens without end: one token of an RMT with XL
memories, one of an Infini-Transformer, and so on, four rows each. Two are the training script with its default sizes,
on the source of Python, with a checkpoint every minute: one for each model. Memory is read every five seconds. What
counts is how far the mean of a minute is from that of minute 6, in the minutes after it.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.interleave import ROOT, write_results
from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper
from segment_recurrence_pytorch.training import StopRequest

MINUTES, WARM_UP, EVERY = 30, 5, 5  # minutes of each process, of which the first ones do not count; seconds
TRAINING = [sys.executable, str(ROOT / 'train_enwik8.py'), '--device', 'cpu', '--threads', '1', '--minutes', '9999',
            '--save-minutes', '1', '--name', 'a', '--model']  # fmt: skip
COMMANDS = {
    'generation': [sys.executable, '-m', 'benchmarks.soak', '--generate'],
    'training rmt': [*TRAINING, 'rmt'],
    'training infini': [*TRAINING, 'infini'],
}


def generate() -> None:
    """Generates until a signal comes, and then prints how many tokens each row has."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rmt = RecurrentMemoryTransformer(
        num_tokens=256, dim=128, depth=3, heads=2, seq_len=64, num_memory_tokens=4, use_xl_memories=True
    )
    infini = InfiniTransformer(num_tokens=256, dim=128, depth=3, heads=2, dim_head=64, memory_rule='delta')
    prompt = torch.randint(0, 256, (4, 10))
    streams = [
        RecurrentMemoryTransformerWrapper(rmt).stream(prompt),
        InfiniTransformerWrapper(infini, segment_length=64).stream(prompt),
    ]
    tokens = 0
    with StopRequest() as stop:
        while stop.signal is None:
            for stream in streams:
                next(stream)
            tokens += 1
    print(tokens)


def megabytes(process: subprocess.Popen) -> float:
    """Returns the resident megabytes of a process."""
    pages = int(Path(f'/proc/{process.pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def summary(by_minute: list[float]) -> dict[str, Any]:
    """Returns how flat the memory of a process is.

    Args:
        by_minute: the mean of resident megabytes, for each minute.
    """
    first, *later = by_minute[WARM_UP:]
    farthest = max(later, key=lambda value: abs(value - first))
    return {
        'megabytes_by_minute': [round(value, 1) for value in by_minute],
        'megabytes_in_minute_6': round(first, 1),
        'megabytes_in_the_last_minute': round(later[-1], 1),
        'largest_change_percent': round(100 * (farthest / first - 1), 2),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the table of docs/reliability.md.

    Args:
        rows: the results by the name of the process.
    """
    lines = ['| process | done | MB in minute 6 | in the last minute | largest change |', '|---|---|---|---|---|']
    for name, row in rows.items():
        done = f'{row["steps"]:,} steps' if 'steps' in row else f'{row["tokens_a_row"]:,} tokens a row'
        megabytes = f'{row["megabytes_in_minute_6"]} | {row["megabytes_in_the_last_minute"]}'
        lines.append(f'| {name} | {done} | {megabytes} | {row["largest_change_percent"]:+.2f} % |')
    return '\n'.join(lines)


def main() -> None:
    """Runs the processes and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=int, default=MINUTES, help=f'default {MINUTES}, which writes the JSON')
    parser.add_argument('--generate', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate:
        generate()
        return
    with tempfile.TemporaryDirectory() as top:
        folders = {name: Path(top) / name.replace(' ', '-') for name in COMMANDS}
        processes, environment = {}, {**os.environ, 'PYTHONPATH': str(ROOT)}
        for name, command in COMMANDS.items():
            folders[name].mkdir()
            processes[name] = subprocess.Popen(
                command, cwd=folders[name], env=environment, stdout=subprocess.PIPE, text=True
            )
        found: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for minute in range(arguments.minutes):
            samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(EVERY)
                for name, process in processes.items():
                    samples[name].append(megabytes(process))
            for name in COMMANDS:
                found[name].append(statistics.mean(samples[name]))
            print(minute + 1, *(f'{name} {found[name][-1]:.1f} MB' for name in COMMANDS), sep='   ', flush=True)
        rows: dict[str, dict[str, Any]] = {}
        for name, process in processes.items():
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate()
            log = folders[name] / 'runs' / 'a' / 'metrics.jsonl'
            done = {'steps': len(log.read_text().splitlines())} if log.exists() else {'tokens_a_row': int(out)}
            rows[name] = done if arguments.minutes <= WARM_UP + 1 else done | summary(found[name])
            print(name, rows[name])
    if arguments.minutes == MINUTES:
        results = {'torch': torch.__version__, 'minutes': MINUTES, 'seconds_between_samples': EVERY, 'rows': rows}
        write_results(__file__, results)


if __name__ == '__main__':
    main()
