"""Output of a script that runs for long. Whatever happens to its output, the script can go on, or end in order."""

from __future__ import annotations

import io
import os
import sys

from tqdm import tqdm


def prepare_output(*, silent: bool = False) -> None:
    """Makes standard output take any text: characters that it does not have are printed as ?.

    An output that was closed before the program began is replaced by one that goes nowhere.

    Args:
        silent: whether what is printed goes nowhere. Errors are still shown. Default: False.
    """
    if silent:
        sys.stdout = None
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115  open until the program ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='replace')


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one.

    If the output goes to a file on a full disk, Python keeps the text and writes it with a later one. If nobody reads
    the output any more, it goes nowhere, and `reader_is_gone` tells it.

    Args:
        text: the line.
    """
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except OSError:
        pass


def discard_output() -> None:
    """Sends nowhere what is printed from now on, and what Python has not written yet, since nobody reads it."""
    _gone.append(sys.stdout)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def reader_is_gone() -> bool:
    """Returns whether the reader of standard output has gone away, as `head` does."""
    return sys.stdout in _gone


_gone: list[object] = []  # outputs that nobody reads
