"""The README's code runs as written, but for the sizes in this table and for a device that is not there."""

import re
import socket
from pathlib import Path

import pytest
import torch

from tests.blocks import SMALLER, blocks_of, run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text()
# a block that stands in the README and on a page runs once; docs/distributed.md is one script for several processes,
# which `distributed_cases.the_page_runs` runs
PAGES = [page for page in sorted((ROOT / 'docs').rglob('*.md')) if page.name != 'distributed.md']
BLOCKS = {block: page for page in [*PAGES, ROOT / 'README.md'] for block in blocks_of(page)}
NAMES = [f'{page.stem}: {block.strip().splitlines()[-1][:40]}' for block, page in BLOCKS.items()]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of Trainer, on a machine without a GPU
@pytest.mark.parametrize(('block', 'page'), BLOCKS.items(), ids=NAMES)
def test_blocks_run(block, page, tmp_path, monkeypatch):
    if 'transformers' in block:
        pytest.importorskip('transformers', reason='needs the extra hf: pip install .[hf]')
    monkeypatch.chdir(tmp_path)
    many = 'init_process_group' in block
    if many:  # what torchrun says to a single process
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        for name, value in {'RANK': 0, 'WORLD_SIZE': 1, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}.items():
            monkeypatch.setenv(name, str(value))
    try:
        run(block, page.name)
    finally:
        if many:
            torch.distributed.destroy_process_group()


def test_every_replacement_is_used():
    for large in SMALLER:
        assert any(large in block for block in BLOCKS), large


def test_every_named_test_exists():
    tests = ''.join(path.read_text() for path in Path(__file__).parent.glob('test_*.py'))
    named = re.findall(r'`(test_\w+)`', (ROOT / 'docs' / 'migrating.md').read_text())
    assert len(named) > 10
    for name in named:
        assert f'def {name}(' in tests


def test_one_reads_it_at_once():
    """What does not fit into 200 lines belongs to a page; each page that is named is there."""
    assert len(README.splitlines()) < 200
    links = re.findall(r'\]\(([^)#]+)[^)]*\)|(?:src|srcset)="([^"]+)"', README)
    inside = [name for pair in links for name in pair if name and not name.startswith('http')]
    assert len(inside) > 25
    assert [name for name in inside if not (ROOT / name).exists()] == []
