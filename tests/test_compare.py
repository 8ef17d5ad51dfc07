"""Runs beside each other: `--compare` of the training script."""

import json
import re
import shutil
from pathlib import Path

import pytest

import train_enwik8
from segment_recurrence_pytorch.compare import read_ended, table
from tests.script import IMPORT_PLOTS, files, main, metrics, train


def test_a_twin_is_compared_when_it_has_been_trained(at_work):
    done = train('--steps', 4, '--memory', 'off', '--compare', 'runs/rmt', name='twin')
    assert done.code == 0, done
    bits = {name: metrics(f'runs/{name}')[-1]['valid'][kind] for name, kind in (('rmt', 'carried'), ('twin', 'reset'))}
    rows = [line.split() for line in done.out.splitlines() if line.startswith('runs/')]
    assert rows == [
        ['runs/rmt', 'rmt', 'on', '4', f'{bits["rmt"]:.3f}'],
        ['runs/twin', 'rmt', 'off', '4', f'{bits["twin"]:.3f}', f'{bits["twin"] - bits["rmt"]:+.3f}'],
    ]
    assert 'They also differ' not in done.out


def test_runs_that_have_ended_are_compared_without_training(at_work, monkeypatch):
    monkeypatch.setattr(train_enwik8, 'import_plots', IMPORT_PLOTS)
    before = files('runs')
    done = main('--compare', 'runs/rmt', 'runs/infini')
    assert done.code == 0, done
    assert [line.split()[:4] for line in done.out.splitlines()[1:3]] == [
        ['runs/rmt', 'rmt', 'on', '4'], ['runs/infini', 'infini', 'on', '4']
    ]  # fmt: skip
    plot = Path('runs/rmt/compared.png')
    assert f'plot        {plot}' in done.out
    assert plot.read_bytes().startswith(b'\x89PNG')
    after = files('runs')
    assert {path: after[path] for path in after if path not in (plot, plot.parent)} == {
        path: before[path] for path in before if path != plot.parent
    }


def test_in_what_else_runs_differ_is_said(at_work):
    shutil.copytree('runs/rmt', 'runs/other')
    about = json.loads(Path('runs/other/run.json').read_text())
    one = about['run']['precision']  # of a new run it is bfloat16 where the CPU has it
    other = next(each for each in train_enwik8.PRECISIONS if each != one)
    about['sha256'] = 'x'
    about['run'] |= {'seed': 7, 'precision': other}
    about['sizes']['dim'], about['training']['lr'] = 8, 1
    Path('runs/other/run.json').write_text(json.dumps(about))
    said = table([read_ended(Path('runs/rmt')), read_ended(Path('runs/other'))])
    assert ' '.join(said.splitlines()[0].split()) == 'run model memory steps bits per byte to the first'
    assert said.splitlines()[3:] == [
        f'They also differ in corpus and --seed (0, 7) and --precision ({one}, {other}) and the sizes of the model '
        'and how they were trained.'
    ]
    about['run']['model'] = 'infini'
    Path('runs/other/run.json').write_text(json.dumps(about))
    assert 'sizes' not in table([read_ended(Path('runs/rmt')), read_ended(Path('runs/other'))])


def test_parts_that_were_trained_otherwise_are_told(at_work):
    """A run that was prolonged had another schedule than one of the same length."""
    shutil.copytree('runs/rmt', 'runs/longer')
    assert main('--resume', 'runs/longer', '--steps', 5).code == 0
    assert main('--resume', 'runs/longer').code == 0  # without other settings: no part of its own
    assert train('--steps', 5, name='straight').code == 0
    parts = json.loads(Path('runs/longer/run.json').read_text())['parts']
    assert [(part['from'], part['steps']) for part in parts] == [(0, 4), (4, 5)]
    path = Path('runs/longer/run.json')
    about = json.loads(path.read_text())
    del about['parts']  # as an earlier version wrote it
    path.write_text(json.dumps(about))
    assert read_ended(Path('runs/longer')).about['parts'] == read_ended(Path('runs/straight')).about['parts']
    for name in ('longer', 'straight'):
        assert main('--resume', f'runs/{name}', '--steps', 6).code == 0
    assert [part['from'] for part in json.loads(path.read_text())['parts']] == [0, 5]
    assert train('--steps', 6, name='six').code == 0
    said = table([read_ended(Path(f'runs/{name}')) for name in ('six', 'longer')])
    assert 'They also differ in the steps from which on they were trained with other --steps' in said
    assert main('--resume', 'runs/six', '--precision', 'bfloat16').code == 0  # nothing is left to train
    one = json.loads(Path('runs/six/run.json').read_text())
    assert one['parts'] == [{'from': 0, **{name: one['run'][name] for name in ('steps', 'minutes', 'precision')}}]


def train_on(run):
    """The log of a run that was prolonged, and stopped after a step."""
    with open(run / 'metrics.jsonl', 'a') as log:
        log.write('{"step": 5, "bits": 2.0}\n')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda run: shutil.rmtree(run), r'there is no such folder. Give that of a run'),
        (lambda run: (run / 'run.json').write_text('{}'), r"run.json lacks 'run'"),
        (lambda run: (run / 'run.json').write_text('{'), r'Give the folder of a run'),
        (lambda run: (run / 'metrics.jsonl').unlink(), r'has no validation yet: .*--resume runs/infini'),
        (lambda run: train_on(run), r'to step 5 after its validation at step 4: .*--resume runs/infini'),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(at_work, spoil, message):
    spoil(Path('runs/infini'))
    done = train('--steps', 4, '--compare', 'runs/infini', name='new')
    assert done.code == 1
    assert re.search(message, done.err, re.IGNORECASE), done.err
    assert not Path('runs/new').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--compare', 'runs/rmt', '--sample', '--resume', 'runs/rmt'), 'give one of them'),
        (('--compare', 'runs/rmt', 'runs/infini', '--resume', 'runs/rmt'), 'leave --resume and --name out'),
        (('--compare', 'runs/rmt', 'runs/infini', '--name', 'new'), 'leave --resume and --name out'),
        (('--compare', 'runs/rmt', '--resume', 'runs/../runs/rmt'), 'names the run of --resume'),
    ],
)
def test_options_that_do_not_go_together_are_refused(at_work, arguments, message):
    done = main(*arguments)
    assert done.code == 2
    assert message in done.err


def test_runs_of_one_name_are_told_apart_in_a_plot_and_nan_does_not_end_it(at_work):
    plots = IMPORT_PLOTS()
    shutil.copytree('runs/rmt', 'other/rmt')
    runs = [read_ended(Path(folder)) for folder in ('runs/rmt', 'other/rmt', 'runs/infini')]
    axes = plots.Figure().subplots()
    plots._plot_runs(axes, runs)
    labels = [label.split(',')[0] for label in axes.get_legend_handles_labels()[1]]
    assert labels == ['runs/rmt', 'other/rmt', 'infini']
    plots.plot_losses(Path('runs/rmt'), {'validation': float('nan'), 'xz': 2.0})


@pytest.mark.parametrize('name', ['a$_{$b', '_under'])
def test_any_name_of_a_run_can_be_drawn(at_work, name):
    plots = IMPORT_PLOTS()
    shutil.copytree('runs/infini', f'runs/{name}')
    folder, axes = Path(f'runs/{name}'), plots.Figure().subplots()
    plots._plot_runs(axes, [read_ended(folder)])
    plots._add_legend(axes)
    assert name in axes.get_legend().get_texts()[0].get_text()
    plots.plot_losses(folder, {'validation': 2.0}, [read_ended(folder)])
    plots.plot_memory_shares(folder)
    plots.plot_comparison([read_ended(folder)], folder / 'compared.png')


def test_a_plot_that_fails_ends_no_run(at_work, monkeypatch):
    plots = IMPORT_PLOTS()
    monkeypatch.setattr(train_enwik8, 'import_plots', lambda: plots)
    monkeypatch.setattr(plots, '_write', lambda *_: 1 / 0)
    done = train('--steps', 1)
    assert (done.code, 'no plot     ZeroDivisionError' in done.out, 'sample' in done.out) == (0, True, True)
    assert main('--compare', 'runs/rmt', 'runs/infini').code == 0
