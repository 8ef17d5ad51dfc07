"""Runs the notebooks of the documentation from their first cell to their last, and keeps their outputs in them.

python docs/run_notebooks.py            # all in docs/notebooks, each about a minute on one CPU core
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent


def run(path: Path) -> None:
    """Runs a notebook and writes it again, without what changes from run to run though the outputs do not."""
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    resources = {'metadata': {'path': str(ROOT)}}  # where `examples` can be imported
    with tempfile.TemporaryDirectory() as folder:  # the kernel is reached by files in it, not through the network
        files = Config(KernelManager=Config(transport='ipc', ip=f'{folder}/kernel'))
        NotebookClient(notebook, kernel_name='python3', timeout=1200, resources=resources, config=files).execute()
    for index, cell in enumerate(notebook.cells):
        cell.metadata = {}
        cell.id = f'{path.stem}-{index}'
        if cell.cell_type == 'code':
            cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
    notebook.metadata = {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}}
    nbformat.write(notebook, path)
    print(f'{path.relative_to(ROOT)}: {time.perf_counter() - start:.0f} seconds')


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    for each in sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb')):
        run(each)
