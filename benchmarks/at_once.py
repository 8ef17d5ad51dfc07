"""Runs a function many times, in several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from tqdm import tqdm


def at_once(function: Callable[..., Any], calls: list[tuple[Any, ...]], processes: int) -> Iterator[tuple[int, Any]]:
    """Calls a function with each of the arguments, and yields the number of a call and its result when it is there.

    Each process computes on one CPU thread. A call that fails does not stop the others: its result is the exception.

    Args:
        function: a function of a module, since other processes import it.
        calls: the arguments of each call.
        processes: the number of calls at once. With 1 they run in this process, in their order.
    """
    if processes == 1:
        for index, arguments in enumerate(calls):
            yield index, on_one_thread(function, arguments)
        return
    os.environ['TQDM_DISABLE'] = '1'  # of the processes: the bar here counts the calls
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context('spawn')) as pool:
        waiting = {pool.submit(on_one_thread, function, arguments): index for index, arguments in enumerate(calls)}
        for future in tqdm(as_completed(waiting), desc='runs', total=len(waiting), disable=not sys.stderr.isatty()):
            yield waiting[future], future.exception() or future.result()


def on_one_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Returns the result of a call, or its exception."""
    torch.set_num_threads(1)
    try:
        return function(*arguments)
    except Exception as error:
        return error
