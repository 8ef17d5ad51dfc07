"""The README's code runs as written, but for the sizes in this table and for a device that is not there."""

import json
import re
import socket
from pathlib import Path
from statistics import mean

import pytest
import torch

from benchmarks.evidence.report import CHECKS, load
from tests.blocks import SMALLER, blocks_of, run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text()
# a block that stands in the README and on a page runs once; docs/distributed.md is one script for several processes,
# which `distributed_cases.the_page_runs` runs
PAGES = [page for page in sorted((ROOT / 'docs').rglob('*.md')) if page.name != 'distributed.md']
BLOCKS = {block: page for page in [*PAGES, ROOT / 'README.md'] for block in blocks_of(page)}
NAMES = [f'{page.stem}: {block.strip().splitlines()[-1][:40]}' for block, page in BLOCKS.items()]


def test_numbers_of_retrofits_are_measured():
    folder = Path(__file__).resolve().parent.parent / 'benchmarks' / 'results' / 'retrofit'
    runs = [json.loads(path.read_text()) for path in folder.glob('*-?.json')]

    def of(method, base=None):
        return {
            (run['base'], run['seed']): run for run in runs if run['method'] == method and base in (None, run['base'])
        }

    unmodified = of('unmodified')
    guess = mean(run['memorize']['curve']['5'] for run in unmodified.values())
    assert f'the models as they were guess ({guess:.2f})'.replace('(0', '(') in README
    shifts = {}
    for method, base in (('rmt', 'llama'), ('infini', 'llama'), ('rmt', 'gpt2')):
        found = of(method, base)
        assert sorted(seed for _, seed in found) == [0, 1, 2]
        assert all(run['memorize']['curve']['5'] == 1 for run in found.values())
        shifts[method, base] = mean(run['bytes']['300'] - unmodified[key]['bytes']['300'] for key, run in found.items())
    said = (
        f'a Llama with memory tokens gains {-shifts["rmt", "llama"]:.3f} bits per byte, with Infini-attention '
        f'{-shifts["infini", "llama"]:.3f}; a GPT-2, whose learned positions the memory shifts, loses '
        f'{shifts["rmt", "gpt2"]:.3f}'
    )
    assert re.sub(r'\b0\.', '.', said) in README


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
    named = re.findall(r'`(test_\w+)`', README)
    assert len(named) > 10
    for name in named:
        assert f'def {name}(' in tests


def test_speeds_are_those_that_were_measured():
    results = Path(__file__).resolve().parent.parent / 'benchmarks' / 'results'
    rmt = json.loads((results / 'rmt_training.json').read_text())['times_ours']
    assert f'four residual streams | {rmt["published, 4 streams (its default)"]:.2f} |' in README
    assert f'one residual stream | {rmt["published, 1 stream"]:.2f} |' in README
    for row in json.loads((results / 'infini_training.json').read_text())['rows']:
        ours, published = row['operations']['ours'], row['operations']['published']
        cells = f'{row["segment_length"]}, {row["rule"]} | {row["times_faster"]:.2f} | {ours:,} | {published:,}'
        assert f'| {cells} |' in README
    million = json.loads((results / 'infini_million.json').read_text())
    assert f'{million["peak_ratio_without_inputs"]} times the peak memory of 65,536 tokens' in README
    rows = json.loads((results / 'vocabulary.json').read_text())['rows']
    parts, whole = (rows[arm]['peak_megabytes'] / 1000 for arm in ('parts', 'whole'))
    slower = rows['parts']['seconds'] / rows['whole']['seconds']
    assert parts / whole <= 0.2
    assert f'memory is {parts:.1f} GB instead of {whole:.1f} GB, in {slower:.2f} times the time' in README
    times = [row['times_sequential'] for row in json.loads((results / 'scan.json').read_text())['rows']]
    for name, words in (('chunked', 'than a\nchunked scan'), ('associative', 'than an associative one')):
        slower = [round(row[name], 1) for row in times]
        assert f'{min(slower)} to {max(slower)} times faster {words}' in README
    generation = json.loads((results / 'generation.json').read_text())
    for row in generation['tokens']:
        model = {'rmt': 'RMT', 'infini': 'Infini'}[row['model']]
        cells = [row[f'{what}_{how}'] for what in ('times_faster', 'batch') for how in ('eager', 'compiled')]
        assert f'| {model}, {row["segment_length"]} | {" | ".join(map(str, cells))} |' in README
    places = generation['positions'].values()
    for words, values in (
        ('costs {} (RMT) and {} (Infini) times one at 1,024', [place['time_ratio'] for place in places]),
        ('with {} and {} MB more', [place['megabytes_more'] for place in places]),
        ('Rows of different lengths cost {} and {} times', generation['ragged_times_aligned'].values()),
        ('is read at {} and {} times', generation['prompt_times_evaluation'].values()),
    ):
        assert words.format(*values) in README.replace('\n', ' ')
    growth = json.loads((results / 'gradient_reach.json').read_text())['gradient_norm']
    grown = {name: norms['32'] / norms['1'] for name, norms in growth.items()}
    words = "grows {scaled:.0f} times; it grows {sum:.0f} times with `'sum'`, {previous:.0f} with `'previous'`, and "
    assert (words + 'shrinks to {learned:.1f} with').format(**grown) in README


def test_what_the_defaults_learn_is_what_was_measured():
    path = Path(__file__).parents[1] / 'benchmarks' / 'results' / 'search' / 'runs.jsonl'
    checks = [run for run in map(json.loads, path.read_text().splitlines())
              if run['spec']['seed'] >= CHECKS and run['spec']['start'] == 'default']  # fmt: skip
    text = README.replace('\n', ' ')
    for model, words in (('rmt', 'RMT learned it within {} to {} steps'), ('infini', 'Infini within {} to {} (')):
        runs = [run for run in checks if (run['spec']['model'], run['spec']['trial']) == (model, 'memorize')]
        assert sorted(run['spec']['seed'] for run in runs) == [500, 501, 502, 503, 504]
        assert all(run['acc']['5'] == 1 for run in runs)
        steps = [run['passed']['5'] for run in runs]
        assert words.format(min(steps), max(steps)) in text
    folder = path.parents[1] / 'evidence'
    million = {name: mean(result['curve']['31250'] for result in load(folder, name))
               for name in ('infini_passkey', 'rmt_memorize')}  # fmt: skip
    infini, rmt = (f'{share:.2f}'.removeprefix('0') for share in million.values())
    assert (
        f'a million tokens Infini still tells {infini} of the values, and RMT, trained for 2,500 steps, {rmt}' in text
    )
    gains = [mean(result['gain'] for result in load(folder, name)) for name in ('rmt_bytes_16', 'infini_bytes_64')]
    rmt, infini = (f'{gain:.2f}'.replace('0.', '.') for gain in gains)
    assert f'RMT gains {rmt} bits per byte with segments of 16, and Infini {infini} with segments of 64' in text
