"""What all workers of pytest-xdist share: it is made by whichever of them comes first."""

from __future__ import annotations

import json

from filelock import FileLock


def made_once(tmp_path_factory, config, name, make):
    """What `make` returned, which has to have a form in JSON, from its only call in this run of the tests.

    Args:
        tmp_path_factory: the fixture.
        config: that of pytest.
        name: names the result.
        make: called with a folder of its own.
    """
    base = tmp_path_factory.getbasetemp()
    if hasattr(config, 'workerinput'):  # the folder of all workers
        base = base.parent
    with FileLock(base / f'{name}.lock'):
        path, own = base / f'{name}.json', base / name
        if not path.exists():
            own.mkdir()
            path.write_text(json.dumps(make(own)))
        return json.loads(path.read_text())
