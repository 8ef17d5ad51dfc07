"""docs/reliability.md: every fault has a test that exists, and the numbers are those that were measured."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize('name', ['test_killed_at_each_moment', 'test_then_the_gradients_in_the_order_of_backward'])
def test_the_page_names_what_it_should(name):
    assert f'`{name}`' in PAGE
