"""The Python blocks of the README and of the pages in docs: with which sizes, and how, the tests run them.

This file imports only PyTorch, so `try_installed.py` can use it in an environment that holds nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# the only edits of a block, but for `.cuda()`, which is left out where there is no GPU
SMALLER = {
    'dim = 512': 'dim = 16',
    'depth = 6': 'depth = 2',
    'depth = 8': 'depth = 2',
    'dim_head = 64': 'dim_head = 8',
    'dim_head = 128': 'dim_head = 8',
    'heads = 8': 'heads = 2',
    'seq_len = 1024': 'seq_len = 16',
    'segment_length = 512': 'segment_length = 16',
    'num_memory_tokens = 128': 'num_memory_tokens = 4',
    'num_tokens = 20000': 'num_tokens = 256',
    '(1, 1024)': '(1, 16)',
    '10241': '161',
    '10240': '160',
    '10000, 512)': '100, 16)',
    '10000': '100',
    ':512]': ':8]',
    '512:]': '8:]',
    'split(1000': 'split(30',
    'split(1024': 'split(16',
    'segment_length = 1024': 'segment_length = 16',
    'text.shape[1] - 1, 2048': 'text.shape[1] - 1, 32',
    'start + 2049': 'start + 33',
    '9980': '80',
    'length = 2048': 'length = 30',
    'seq_len = 8192': 'seq_len = 40',
    '[:, :1000]': '[:, :20]',
    'max_new_tokens = 100': 'max_new_tokens = 20',
    'range(1000)': 'range(3)',
    '256, batch_size = 64': '4, batch_size = 4',
}


def blocks_of(path: Path) -> list[str]:
    """The Python blocks of a file in Markdown that stand there, not those that are included from another file."""
    found = re.findall(r'^```python[^\n]*\n(.*?)^```', path.read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in found if not block.startswith('--8<--')]


def smaller(block: str) -> str:
    """A block with small sizes, for the device that is there."""
    for large, small in SMALLER.items():
        block = block.replace(large, small)
    return block if torch.cuda.is_available() else block.replace('.cuda()', '')


def run(block: str, name: str) -> None:
    """Runs a block with small sizes, as a program of its own."""
    exec(compile(smaller(block), name, 'exec'), {})
