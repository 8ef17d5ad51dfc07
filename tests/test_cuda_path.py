"""The way that the library takes on a GPU, without one. The cases are in `cuda_cases`."""

from __future__ import annotations

import pytest

from tests import cuda_cases, pretend


@pytest.fixture(scope='session')
def results(tmp_path_factory, request):
    return pretend.once(tmp_path_factory, request.config)


@pytest.mark.parametrize('name', cuda_cases.NAMES)
def test_on_a_device_that_is_not_there(results, name):
    if 'skip' in results:
        pytest.skip(results['skip'])
    assert name in results, results['ended']
    assert not results[name], results[name]
