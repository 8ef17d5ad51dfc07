"""Two and four processes give the numbers of one. The cases are in `distributed_cases`."""

from __future__ import annotations

import json

import pytest
from filelock import FileLock

from tests import distributed_cases, ranks


@pytest.fixture(scope='session')
def results(tmp_path_factory, request):
    """A function from a number of processes to what went wrong in each case. The processes are started once."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, 'workerinput'):  # the folder of all workers of pytest-xdist
        folder = folder.parent

    def of(count: int) -> dict[str, str]:
        with FileLock(folder / f'ranks-{count}.lock'):
            path, own = folder / f'ranks-{count}.json', folder / f'ranks-{count}'
            if not path.exists():
                own.mkdir()
                path.write_text(json.dumps(ranks.run(distributed_cases, count, own)))
            return json.loads(path.read_text())

    return of


NAMED = [(count, name) for count in (2, 4) for name in ranks.cases(distributed_cases, count)]


@pytest.mark.parametrize(('count', 'name'), NAMED, ids=[f'{count} ranks, {name}' for count, name in NAMED])
def test_ranks_are_one_process(results, count, name):
    wrong = results(count)[name]
    assert not wrong, wrong
