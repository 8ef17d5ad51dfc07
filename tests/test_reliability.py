"""docs/reliability.md: every fault has a test that exists, and the numbers are those that were measured."""

import json
import re
from pathlib import Path

from benchmarks import kill, soak

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'reliability.md').read_text()
ROWS = [re.split(r'(?<!\\)\|', line)[1:-1] for line in PAGE.splitlines() if line.startswith('| ')]
FAULTS = [row for row in ROWS if len(row) == 3 and row[2].strip() != 'test']


def test_each_fault_has_a_test_that_exists():
    folder = Path(__file__).parent
    tests = ''.join(path.read_text() for path in [*folder.glob('test_*.py'), folder / 'train_cases.py'])
    assert len(FAULTS) >= 20
    for fault, _, names in FAULTS:
        found = re.findall(r'`(\w+)`', names)
        assert found, fault
        for name in found:
            assert f'def {name}(' in tests, name


def test_the_tables_are_what_was_measured():
    results = ROOT / 'benchmarks' / 'results'
    killed, soaked = (json.loads((results / f'{name}.json').read_text()) for name in ('kill', 'soak'))
    assert kill.table(killed['rows']) in PAGE
    assert all(value for row in killed['rows'] for name, value in row.items() if name.endswith('_equal'))
    assert [(row['ranks'], row['kills']) for row in killed['rows']] == [(1, 20), (1, 20), (2, 5), (2, 5)]
    assert soak.table(soaked['rows']) in PAGE
    assert all(abs(row['largest_change_percent']) < 2 for row in soaked['rows'].values())
