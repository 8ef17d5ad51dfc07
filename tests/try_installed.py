"""What a user does first, in an environment into which only the package was installed: imports it and runs the README.

    .venv-installed/bin/python tests/try_installed.py

Nothing of the repository is imported but `blocks.py`, which stands beside this file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import blocks
import torch

PACKAGES = ('recurrent_memory_transformer_pytorch', 'infini_transformer_pytorch', 'segment_recurrence_pytorch')

for package in PACKAGES:
    module = import_module(package)
    assert Path(sys.prefix) in Path(module.__file__).parents, f'{package} comes from {module.__file__}'
    print(package, module.__version__)
os.chdir(tempfile.mkdtemp())
tried = 0
for block in blocks.blocks_of(blocks.ROOT / 'README.md'):
    if any(extra in block for extra in ('transformers', 'accelerate', 'init_process_group')):
        continue
    blocks.run(block, 'README.md')
    tried += 1
assert tried >= 2, 'the README has no block that can be run'
print(f'{tried} blocks of the README run with torch {torch.__version__}')
