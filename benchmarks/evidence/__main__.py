"""What the memories really learn: trains the rows and experiments of docs/results.md.

    python -m benchmarks.evidence                      # lists rows and experiments, and which of them have results
    python -m benchmarks.evidence rmt_memorize         # trains a row on its seeds, writes JSON, the plot and the page
    python -m benchmarks.evidence rmt_memorize --seed 2
    python -m benchmarks.evidence rules                # trains the runs of an experiment that have no result yet
    python -m benchmarks.evidence --all --missing --processes 2     # all runs that have no result yet, two at once
    python -m benchmarks.evidence --all --quick        # everything at reduced size, into a scratch folder
    python -m benchmarks.evidence --report             # makes the page and the plots from the JSON, as `make evidence`

A row stands for one claim of the page: a model that is trained on a task or on bytes, with several seeds. An experiment
answers a question: it trains variants of a row, called its arms, with the same seeds, and compares them. Each process
uses one CPU thread, or a GPU with `--device cuda`, where many small models can be trained at once (`--processes 15`).
Settings were chosen with seeds from 400 on, rows use 0 to 2 (500 to 504 where the defaults are checked), experiments 10
to 14. The defaults were changed after rows on the former had been seen: prose/introduction.md says when.

    rows.py          the rows: what is trained, and what result is asked for
    experiments.py   the experiments: which options are compared, on which rows
    extras.py        variants of RMT that only an experiment uses
    training.py      trains and evaluates one run
    results.py       trains what is asked for, and stores it as JSON, each run with the configuration that made it
    report.py        makes the page and the plots from that JSON, and from texts in Markdown beside it
    summary.py       the first screen of the page
    tables.py        targets, means and intervals, as the page writes them
    adopt.py         adds a new option of the library, whose default changes nothing, to the stored configurations
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import check_plots
from benchmarks.at_once import add_processes
from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.report import load, report
from benchmarks.evidence.results import PAGE, RESULTS, Job, jobs_of, run
from benchmarks.evidence.rows import ROWS


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.evidence',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('names', nargs='*', metavar='NAME', help='names of rows and experiments')
    parser.add_argument('--all', action='store_true', help='every row and every experiment')
    parser.add_argument('--seed', type=int, help='only this seed of the rows')
    parser.add_argument('--quick', action='store_true', help='three steps a run, into a scratch folder')
    parser.add_argument('--missing', action='store_true', help='of rows, too, only the runs that have no result yet')
    parser.add_argument('--report', action='store_true', help='the page and the plots from the JSON that is there')
    parser.add_argument('--device', default='cpu', help='where to train (default: %(default)s)')
    add_processes(parser)
    parser.add_argument('--out', type=Path, help='folder of the JSON')
    arguments = parser.parse_args()
    check_plots()
    folder = arguments.out or (Path(tempfile.mkdtemp()) if arguments.quick else RESULTS)
    names = [*ROWS, *EXPERIMENTS] if arguments.all else arguments.names
    unknown = [name for name in names if name not in ROWS and name not in EXPERIMENTS]
    if unknown:
        sys.exit(f'nothing called {", ".join(unknown)}: choose from {", ".join([*ROWS, *EXPERIMENTS])}')
    if arguments.seed is not None and set(names) & set(EXPERIMENTS):
        parser.error('--seed is for rows: an experiment has seeds of its own')
    jobs = [job for name in names for job in jobs_of(name, arguments.quick)]
    if arguments.seed is not None:
        jobs = [Job(name=name, seed=arguments.seed) for name in names]
    if arguments.missing:
        jobs = [job for job in jobs if job.result(folder) is None]
    failed = run(jobs, folder, arguments.quick, arguments.device, arguments.processes)
    if names or arguments.report:
        report(folder, PAGE if folder == RESULTS else folder / 'results.md')
        if failed:
            sys.exit(f'{len(failed)} runs failed')
        return
    for name, row in ROWS.items():
        seeds = [result['seed'] for result in load(RESULTS, name)]
        print(f'{name:28} {row.claim:70} seeds {seeds or "not run"}')
    for name, experiment in EXPERIMENTS.items():
        print(f'{name:28} {experiment.question:70} {", ".join(experiment.lacking(RESULTS)) or "all runs"}')


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
