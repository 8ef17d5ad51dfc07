"""The log of a run is JSON line by line, whatever is written and however the disk or a process ends."""

import json

import pytest

from segment_recurrence_pytorch.metrics import MetricsLog, keep_steps, read_metrics, write_validation
from tests.script import full_disk

INF, NAN = float('inf'), float('nan')


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'metrics.jsonl'


def test_each_line_is_there_as_soon_as_it_is_written(path):
    log = MetricsLog(path)
    for step in (1, 2):
        log.write({'step': step, 'bits': 0.1})
        assert len(path.read_text().splitlines()) == step
    log.close()
    log = MetricsLog(path)
    log.write({'step': 3})
    log.close()
    assert [line['step'] for line in read_metrics(path)] == [1, 2, 3]


def test_nan_and_infinite_numbers_become_null(path):
    log = MetricsLog(path)
    log.write({'step': 1, 'bits': NAN, 'shares': [[0.5, INF], [-INF]], 'text': 'NaN'})
    log.close()
    assert path.read_text() == '{"step": 1, "bits": null, "shares": [[0.5, null], [null]], "text": "NaN"}\n'


def test_a_full_disk_loses_no_line(path):
    """What does not fit is written later, where it was cut off."""
    log = MetricsLog(path)
    log.write({'step': 1})
    with full_disk(path.stat().st_size + 5):
        log.write({'step': 2})
        log.write({'step': 3})
        assert path.read_text() == '{"step": 1}\n{"ste'
        assert [line['step'] for line in read_metrics(path)] == [1]
        with pytest.raises(OSError, match='File too large'):
            log.sync()
    log.write({'step': 4})
    log.sync()
    assert path.read_text() == ''.join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
    log.close()


def test_damaged_lines_are_left_out(path):
    good = ['{"step": 1, "bits": 2.0}', '{"step": 2}']
    bad = ['', '{"step": 3', '[4]', '5', 'null', '{"bits": 6}', '{"step": "7"}', '{"step": 8.0}', '\udcff']
    path.write_text('\n'.join([good[0], *bad, good[1]]), errors='surrogateescape')
    assert read_metrics(path) == [json.loads(line) for line in good]
    assert read_metrics(path.with_name('none')) == []


def test_lines_after_the_checkpoint_are_removed(path):
    lines = [
        '{"step": 1}',
        '{"step": 2, "bits": 2.50}',
        '{"step": 2, "valid": {}}',
        '{"step": 3}',
        '{"step": 3, "valid": {"reset": 2}}',
        '{"step": 3, "valid": {"reset": 1}}',
        '{"step": 4, "valid": {}}',
        '{"step": 4}',
        '{"st',
    ]
    path.write_text('\n'.join(lines))
    assert keep_steps(path, 3) == 0
    assert path.read_text().splitlines() == [lines[0], lines[1], lines[3], lines[5]]
    path.write_text('\n'.join(lines[1:]))
    assert keep_steps(path, 4) == 1
    path.unlink()
    assert keep_steps(path, 4) == 4
    assert path.read_text() == ''


def test_a_validation_replaces_those_before_and_half_lines(path):
    """A half line, which a full disk has left, does not swallow it."""
    path.write_text('{"step": 1, "valid": {}}\n{"step": 1}\n{"step": 2,')
    write_validation(path, {'step': 2, 'valid': {'reset': NAN}})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "valid": {"reset": null}}\n'
    with full_disk(10), pytest.raises(OSError, match='File too large'):
        write_validation(path, {'step': 3, 'valid': {}})
    assert read_metrics(path)[-1]['step'] == 2
