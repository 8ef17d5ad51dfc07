"""Runs a function many times, in several processes at once."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm import tqdm


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--processes` to a command line."""
    parser.add_argument('--processes', type=_count, default=1, help='number of runs at once (default: %(default)s)')


def at_once(
    function: Callable[..., Any],
    calls: list[tuple[Any, ...]],
    processes: int,
    keep: Callable[[int, Any], None],
) -> list[int]:
    """Calls a function with each of the arguments. Each process computes on one CPU thread.

    A call that fails does not stop the others: it is printed, and its number is returned.

    Args:
        function: a function of a module, since other processes import it.
        calls: the arguments of each call.
        processes: the number of calls at once. With 1 they run in this process, in their order.
        keep: gets the number of a call and its result, in this process, as soon as it is there.

    Returns:
        The numbers of the calls that failed.
    """
    failed = []
    for index, found in (_in_processes if processes > 1 else _here)(function, calls, processes):
        if isinstance(found, Exception):
            failed.append(index)
            print(f'failed: {calls[index]}: {type(found).__name__}: {found}', file=sys.stderr, flush=True)
        else:
            keep(index, found)
    return failed


def _here(function: Callable[..., Any], calls: list[tuple[Any, ...]], _: int) -> Iterator[tuple[int, Any]]:
    for index, arguments in enumerate(calls):
        yield index, _on_one_thread(function, arguments)


def _in_processes(
    function: Callable[..., Any], calls: list[tuple[Any, ...]], processes: int
) -> Iterator[tuple[int, Any]]:
    before = os.environ.get('TQDM_DISABLE')
    os.environ['TQDM_DISABLE'] = '1'  # of the processes: the bar here counts the calls
    try:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context('spawn')) as pool:
            waiting = {pool.submit(_on_one_thread, function, each): index for index, each in enumerate(calls)}
            for future in tqdm(as_completed(waiting), desc='runs', total=len(waiting), disable=not sys.stderr.isatty()):
                yield waiting[future], future.exception() or future.result()
    finally:
        if before is None:
            del os.environ['TQDM_DISABLE']
        else:
            os.environ['TQDM_DISABLE'] = before


def _on_one_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    try:
        return function(*arguments)
    except Exception as error:  # the caller tells it, and goes on with the other calls
        return error


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f'it is {count}: give 1 or more')
    return count
