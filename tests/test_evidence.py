"""The evidence: every row runs, and the page is what the committed results say."""

import json

import pytest

from benchmarks import evidence
from benchmarks.evidence_experiments import EXPERIMENTS
from benchmarks.evidence_report import load, report
from benchmarks.evidence_rows import ROWS, LanguageRow


@pytest.mark.parametrize('name', ROWS)
def test_a_row_trains_evaluates_and_reports(name, tmp_path):
    evidence.run(ROWS[name], 7, tmp_path, quick=True)
    result = json.loads((tmp_path / f'{name}-7.json').read_text())
    assert (result['row'], result['seed'], result['quick']) == (name, 7, True)
    if isinstance(ROWS[name], LanguageRow):
        assert all(0 < bits < 9 for bits in result['bits'].values())
    else:
        assert all(0 <= share <= 1 for share in result['curve'].values())
    report(tmp_path, tmp_path / 'page' / 'results.md')
    assert ROWS[name].claim in (tmp_path / 'page' / 'results.md').read_text()
    plots = list((tmp_path / 'page').glob('*.png'))
    assert isinstance(ROWS[name], LanguageRow) or plots


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_an_experiment_runs_goes_on_and_reports(name, tmp_path, monkeypatch):
    evidence.run_experiment(EXPERIMENTS[name], tmp_path, quick=True)
    before = {path: path.read_text() for path in (tmp_path / 'experiments').iterdir()}
    assert len(before) == len(EXPERIMENTS[name].rows)
    monkeypatch.setattr(evidence, 'run_row', None)  # what is there is not run again
    evidence.run_experiment(EXPERIMENTS[name], tmp_path, quick=True)
    assert {path: path.read_text() for path in (tmp_path / 'experiments').iterdir()} == before
    report(tmp_path, tmp_path / 'page' / 'results.md')
    assert EXPERIMENTS[name].question in (tmp_path / 'page' / 'results.md').read_text()


def test_the_page_is_what_the_results_say(tmp_path):
    report(evidence.RESULTS, tmp_path / 'results.md')
    assert (tmp_path / 'results.md').read_text() == evidence.PAGE.read_text()
    for name in ROWS:
        assert not any(result['quick'] for result in load(evidence.RESULTS, name))
