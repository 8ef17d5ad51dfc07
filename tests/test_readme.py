"""The README's code runs as written, but for the sizes in this table and for a device that is not there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parent.parent / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
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
    '10000': '100',
    '9980': '80',
    'length = 2048': 'length = 30',
    'seq_len = 8192': 'seq_len = 40',
    '[:, :1000]': '[:, :20]',
}


@pytest.mark.parametrize('block', BLOCKS, ids=[block.strip().splitlines()[-1][:40] for block in BLOCKS])
def test_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for large, small in SMALLER.items():
        block = block.replace(large, small)
    if not torch.cuda.is_available():
        block = block.replace('.cuda()', '')
    exec(compile(block, 'README.md', 'exec'), {})


def test_every_replacement_is_used():
    for large in SMALLER:
        assert any(large in block for block in BLOCKS), large


def test_every_named_test_exists():
    tests = ''.join(path.read_text() for path in Path(__file__).parent.glob('test_*.py'))
    named = re.findall(r'`(test_\w+)`', README)
    assert len(named) > 10
    for name in named:
        assert f'def {name}(' in tests
