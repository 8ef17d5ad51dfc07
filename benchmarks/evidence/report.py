"""Makes docs/results.md and its plots, from the JSON of `benchmarks.evidence` and texts in Markdown beside it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import text
from benchmarks.evidence.experiments import EXPERIMENTS, Experiment, stored
from benchmarks.evidence.rows import CHECKS, MILLION, ROWS, TITLES, LanguageRow, TaskRow
from benchmarks.evidence.summary import Texts, about_runs, gains_on_text, of_seeds, summary
from benchmarks.evidence.tables import asked_gain, asked_of, interval, mean_and_worst, prose, table, targets
from segment_recurrence_pytorch.tasks import AssociativeRetrieval

EVALUATION = 60  # CPU seconds that were asked for


def report(folder: Path, page: Path) -> None:
    """Writes the page, and a plot for each task row that has results.

    Args:
        folder: the folder of the results.
        page: the page to write. Plots go into its folder.
    """
    results = {name: load(folder, name) for name in ROWS}
    page.parent.mkdir(parents=True, exist_ok=True)
    texts, earlier = text_runs(folder.parent / 'text')
    parts = [prose('introduction'), *summary(results, texts, earlier), prose('reading')]
    head = ['claim', 'at', 'measured (worst seed)', 'asked for', 'seeds']
    parts += ['## Every target\n', table(head, targets(results)), *start_section(folder.parent / 'search', results)]
    for name, row in ROWS.items():
        if not results[name]:
            continue
        parts.append(f'## {row.claim}\n\n`python -m benchmarks.evidence {name}`. Published: {row.published}.\n')
        if isinstance(row, TaskRow):
            parts.append(task_table(row, results[name]))
            if len(results[name][0]['curve']) > 1:
                plot_curves({name: results[name]}, page.parent / f'{name}.png')
                parts.append(f'![{row.claim}]({name}.png)\n')
        elif isinstance(row, LanguageRow):
            parts.append(language_table(row, results[name]))
        if remark := prose(f'remarks/{name}'):
            parts.append(remark)
    parts += text_section(texts, earlier, page.parent)
    parts += million_section(folder.parent / 'million_evaluation.json')
    if retrofits := retrofit_section(folder.parent / 'retrofit'):
        parts.append(retrofits)
    if sections := [part for experiment in EXPERIMENTS.values() for part in experiment_section(experiment, folder)]:
        parts += [f'## Experiments\n\n{prose("rule")}', *sections]
    missing = [f'- {row.claim} (`{name}`)' for name, row in ROWS.items() if not results[name]]
    missing += [f'- {experiment.question} (`{name}`): {", ".join(lacking)}'
                for name, experiment in EXPERIMENTS.items() if (lacking := experiment.lacking(folder))]  # fmt: skip
    if missing:
        parts.append('## Without results yet\n\n' + '\n'.join(missing) + '\n')
    page.write_text('\n'.join(parts))
    long = {name: found for name, found in results.items() if found and isinstance(ROWS[name], TaskRow)
            and max(map(int, found[0]['curve'])) > 1000}  # fmt: skip
    if long:
        plot_curves(long, page.parent / 'memory.png', 'A value marked in the first 32 tokens, asked for at the end')
    print(f'wrote {page}')


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the results of a row, in the order of their seeds.

    Args:
        folder: the folder of the results.
        name: name of the row.
    """
    found = [json.loads(path.read_text()) for path in folder.glob(f'{name}-*.json')]
    return sorted((result for result in found if result['row'] == name), key=lambda result: result['seed'])


def task_table(row: TaskRow, results: list[dict[str, Any]]) -> str:
    """Returns the table of a task row, with a line for each length."""
    task, trained = row.task(), longest_in_training(results)
    lines = []
    for length in results[0]['curve']:
        shares = [result['curve'][length] for result in results if length in result['curve']]
        longer = '' if int(length) <= trained else ' (longer than trained)'
        cells = [f'{int(length):,}{longer}', f'{int(length) * task.segment_length:,}']
        cells += [mean_and_worst(row, int(length), shares), f'{task.without_memory:.3f}']
        if isinstance(task, AssociativeRetrieval):
            cells.append(f'{task.without_keys(int(length)):.3f}')
        if row.paper:
            cells.append(f'{row.paper[int(length)]:.2f}' if int(length) in row.paper else '')
        lines.append([*cells, asked_of(row, int(length), mean(shares))])
    machines = dict.fromkeys(result['machine'] for result in results if result['machine'].startswith('NVIDIA'))
    seconds = ', '.join(str(result['train_cpu_seconds']) for result in results)
    where = f'on {" and ".join(machines)}' if machines else f'in {seconds} CPU seconds'
    million = f', {row.million_sequences} at a million tokens' if max(row.lengths) >= MILLION else ''
    about = f'{len(results)} seed{"s" * (len(results) != 1)}, {row.steps:,} steps {where}; '
    about += f'{row.sequences} sequences a length{million}.'
    last = f'{row.stages[-1]}'
    reached = ', '.join(f'{result["reached"].get(last, "none")}' for result in results)
    about += f' The last stage of the curriculum, {last} segments, was reached at step {reached}.'
    guessing = ['without memory', *(['values without their keys'] if isinstance(task, AssociativeRetrieval) else [])]
    guessing += ['published'] if row.paper else []
    return table(['segments', 'tokens', 'accuracy', *guessing, 'asked for'], lines) + f'\n{about}\n'


def language_table(row: LanguageRow, results: list[dict[str, Any]]) -> str:
    """Returns the table of a byte row, with a line for each seed."""
    lines = []
    for result in results:
        cells = (f'{result["bits"][name]:.4f}' for name in ('with memory', 'without'))
        lines.append([f'{result["seed"]}', *cells, f'{result["gain"]:+.4f}'])
    gains = [result['gain'] for result in results]
    lines.append(['mean', '', '', f'{interval(gains)}, {asked_gain(row, gains)}'])
    corpora = ', '.join(dict.fromkeys(result['corpus'] for result in results))
    how = ', compiled' if any(result.get('compiled') for result in results) else ''
    size = f'{row.batch_size} x {row.segment_length * row.segments} bytes'
    about = f'Bytes of {corpora}; {row.steps} steps of {size}{how}.'
    return table(['seed', 'with memory', 'twin without', 'gain in bits per byte'], lines) + f'\n{about}\n'


def start_section(folder: Path, results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Returns the section on the initial weights on text: the byte rows against runs with earlier initial weights.

    Args:
        folder: the folder of the runs with the earlier weights, and of the text of the section.
        results: the results of each row, by its name.
    """
    path, lines = folder / 'runs.jsonl', []
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    earlier = {
        (spec['model'], spec['trial'], spec['steps'], spec['seed']): run['bits']
        for run in runs
        if (spec := run['spec'])['start'] == 'library' and spec['seed'] in CHECKS and 'options' not in spec
    }
    for name, row in ROWS.items():
        if isinstance(row, LanguageRow):
            own = {result['seed']: result['bits']['with memory'] for result in results[name]}
            keys = [(row.model, f'bytes-{row.segment_length}', row.steps, seed) for seed in own]
            pairs = [(own[key[-1]], earlier[key]) for key in keys if key in earlier]
            if pairs:
                bits = [f'{mean(each):.3f}' for each in zip(*pairs, strict=True)]
                cells = [TITLES[row.model], f'{row.segment_length}', f'{row.steps:,}', *bits]
                gain = interval([before - now for now, before in pairs])
                # more seeds are to come: nothing is decided yet, so nothing is bold
                gain = gain if len(pairs) == len(CHECKS) else gain.replace('*', '')
                lines.append([*cells, gain, f'{len(pairs)}'])
    if not lines:
        return []
    head = ['model', 'segments of', 'steps', 'with the defaults', 'with the earlier weights', 'gain', 'seeds']
    return [(folder / 'starts.md').read_text(), table(head, lines)]


def million_section(path: Path) -> list[str]:
    """Returns the section on the time of an evaluation of a million tokens, from the JSON at a path."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    ways = ['eager', 'compiled', 'products']
    lines = [
        [TITLES[model], *(f'{seconds[way]:.0f}' for way in ways)] for model, seconds in found['cpu_seconds'].items()
    ]
    return [
        f'## The time of an evaluation of {found["sequences"]} sequences of a million tokens\n',
        f'`{found["command"]}`: CPU seconds on {found["machine"]} with one thread, of the models of `rmt_memorize` and '
        f'`infini_passkey`; {EVALUATION} were asked for. What compiling takes does not count. The last column is the '
        'time of the matrix products and of the attention alone, with the same tensors.\n',
        table(['model', 'as written', 'compiled', 'products alone'], lines),
    ]


def retrofit_section(folder: Path) -> str:
    """Returns the section on pretrained language models, from the JSON of `benchmarks.retrofit` and texts beside it. It
    is empty if there are no results."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    order = ('unmodified', 'rmt', 'infini')
    results = [json.loads(path.read_text()) for path in folder.glob('*.json')]
    for result in sorted(results, key=lambda each: (each['base'], order.index(each['method']), each['seed'])):
        found.setdefault((result['base'], result['method']), []).append(result)
    if not found:
        return ''
    texts, tasks = [], []
    for (base, method), runs in found.items():
        twins = {run['seed']: run for run in found.get((base, order[0]), [])}
        cells = [base, method]
        for at in runs[0]['bytes']:
            differences = [run['bytes'][at] - twins[run['seed']]['bytes'][at] for run in runs if run['seed'] in twins]
            own = f'{mean([run["bytes"][at] for run in runs]):.3f}'
            cells.append(own if method == order[0] else f'{own}, {interval(differences)}')
        texts.append([*cells, f'{len(runs)}'])
        curves = [run['memorize']['curve'] for run in runs]
        shares = [[curve[length] for curve in curves] for length in curves[0]]
        tasks.append([base, method, *(f'{mean(each):.3f} ({min(each):.3f})' for each in shares), f'{len(runs)}'])
    one = results[0]
    alone = one['memorize']['without_memory']
    steps = [f'after {step} steps' for step in list(one['bytes'])[1:]]
    parts = [
        '## A memory for a pretrained language model\n\n`python -m benchmarks.retrofit`\n',
        (folder / 'introduction.md').read_text(),
        table(['base', 'retrofit', 'before', *steps, 'seeds'], texts),
        f'Accuracy on Memorize at so many segments, the worst seed in brackets; without memory {alone:.3f} from two '
        'segments on:\n',
        table(['base', 'retrofit', *(f'{int(length):,}' for length in one['memorize']['curve']), 'seeds'], tasks),
        (folder / 'remarks.md').read_text(),
    ]
    return '\n'.join(parts)


def text_runs(folder: Path) -> tuple[Texts, Texts]:
    """Returns the runs of `benchmarks.text`, by the length of a segment and the name of the arm: those with the initial
    weights of the library as it is, and those with others, of an earlier version.

    Args:
        folder: the folder of the results, with a folder `earlier` in it.
    """
    present: Texts = {}
    earlier: Texts = {}
    for arm, length, seed in sorted(text.RUNS, key=lambda each: each[1]):
        name = f'{arm}-{length}-{seed}.json'
        for path in filter(Path.exists, (folder / name, folder / 'earlier' / name)):
            run = json.loads(path.read_text())
            runs = present if run.get('start') == text.start_of(arm, length) else earlier
            runs.setdefault((length, arm), []).append(run)
    return present, earlier


def text_section(runs: Texts, earlier: Texts, plots: Path) -> list[str]:
    """Returns the section on what a memory is worth on text, and draws its plot; nothing if there are no runs.

    Args:
        runs: those with the present initial weights, see `text_runs`.
        earlier: those with earlier ones, which have a table of their own.
        plots: the folder of the plot.
    """
    if not runs and not earlier:
        return []
    one = next(iter((runs or earlier).values()))[0]
    plot_text(runs or earlier, plots / 'text.png')
    about = f'{one["steps"]:,} steps of {text.ROWS * text.LENGTH:,} bytes. Bits per byte of held-out text; the gain '
    about += f'over segments alone is paired by seed. {about_runs(runs)}'
    older = 'Runs with the initial weights of an earlier version of the library, and its learning rate of embeddings, '
    older += f'paired with each other. {changes(runs, earlier)}\n'
    return [
        '## What a memory buys on text\n\n`python -m benchmarks.text`. [Rules](../benchmarks/results/text/rules.md), '
        f'written before the first run. {about}\n',
        *text_tables(runs),
        '![Bits per byte against bytes read](text.png)\n',
        *([older, *text_tables(earlier)] if earlier else []),
    ]


def changes(runs: Texts, earlier: Texts) -> str:
    """Returns a sentence on how many bits per byte the present runs need more than those of before, by seed."""
    told = []
    for (length, arm), found in runs.items():
        before = {run['seed']: run['bits'] for run in earlier.get((length, arm), [])}
        if more := [run['bits'] - before[run['seed']] for run in found if run['seed'] in before]:
            told.append(f'{text.LABELS[arm]}, {length}: {interval(more)} ({of_seeds(more)})')
    return f'What the present ones need more: {"; ".join(told)}. Why is not known.' if told else ''


def text_tables(runs: Texts) -> list[str]:
    """Returns the tables of the runs of `benchmarks.text`: bits per byte with what is gained, and by position."""
    lines, positions = [], []
    for (length, arm), found in runs.items():
        gains = gains_on_text(runs, length, arm)
        gain = interval(gains) if gains else ''
        bits = mean([run['bits'] for run in found])
        lines.append(
            [f'{length}', text.LABELS[arm], f'{found[0]["parameters"]:,}', f'{bits:.3f}', gain, f'{len(found)}']
        )
        columns = zip(*(run['by_position'] for run in found), strict=True)
        positions.append([f'{length}', text.LABELS[arm], *(f'{mean(each):.3f}' for each in columns)])
    borders = ['0', *map(str, text.BORDERS)]
    ranges = [f'{first} to {int(last) - 1}' for first, last in pairwise(borders)] + [f'from {borders[-1]} on']
    head = ['segments of', 'model', 'parameters', 'bits per byte', 'gain', 'seeds']
    by_position = 'By the position of a byte in its document:\n'
    return [table(head, lines), by_position, table(['segments of', 'model', *ranges], positions)] if runs else []


def plot_text(runs: Texts, path: Path) -> None:
    """Plots bits per byte against the bytes that were read, with a line for each model: the mean over its seeds.

    Args:
        runs: the runs, by the length of a segment and the name of the arm.
        path: the file of the plot.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    for (length, arm), found in runs.items():
        steps = list(found[0]['curve'])
        curve = [mean([run['curve'][step] for run in found]) for step in steps]
        megabytes = [int(step) * text.ROWS * text.LENGTH / 1e6 for step in steps]
        style = {64: ':', 128: '-'}.get(length, '--')
        label = f'{text.LABELS[arm]}, {length}' if arm != 'full' else text.LABELS[arm]
        axes.plot(megabytes, curve, style, color=f'C{list(text.LABELS).index(arm)}', label=label)
    axes.set(xlabel='bytes read, in millions', ylabel='bits per byte of a quarter of the held-out text')
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def experiment_section(experiment: Experiment, folder: Path) -> list[str]:
    """Returns the section of an experiment: its question, a table for each row with results, and the decision."""
    tables = []
    for row in experiment.rows:
        runs = stored(experiment.file(folder, row))
        if {run['arm'] for run in runs} - {next(iter(experiment.arms))}:  # the first one alone is no comparison
            tables.append(arm_table(row, {arm: [run for run in runs if run['arm'] == arm] for arm in experiment.arms}))
    if not tables:
        return []
    head = f'### {experiment.question}\n\n`python -m benchmarks.evidence {experiment.name}`\n'
    decision = prose(f'decisions/{experiment.name}') or 'Not made yet.\n'
    return [head, *tables, f'**Decision.** {decision}']


def arm_table(row: TaskRow | LanguageRow, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the table of a row in an experiment, with a line for each arm.

    The line has the scores of the arm, and the difference of its mean score to that of the first arm, paired by seed.

    Args:
        row: the row.
        runs: the runs of each arm, by its name.
    """
    first = next(iter(runs.values()))
    default = {run['seed']: score(run) for run in first}
    columns = list(first[0].get('curve', {})) if first else []
    if isinstance(row, TaskRow):
        task = row.task()
        stages = ' to '.join(map(str, dict.fromkeys((row.stages[0], row.stages[-1]))))
        about = f'{type(task).__name__}, {row.steps:,} steps, a curriculum of {stages} segments of '
        about += f'{task.segment_length} tokens; accuracy at so many segments, without memory {task.without_memory:.3f}'
        if isinstance(task, AssociativeRetrieval):
            alone = ', '.join(f'{task.without_keys(int(column)):.3f}' for column in columns)
            about += f', by values without their keys {alone}'
        head = [*(f'{int(column):,}' for column in columns), 'mean (worst)']
    else:
        about = f'{row.steps:,} steps, segments of {row.segment_length}, {row.segments} a step; '
        about += 'bits per byte, lower is better'
        head = ['bits (worst)']
    lines = []
    for arm, found in runs.items():
        if not found:
            continue
        means = [mean([run['curve'][column] for run in found]) for column in columns]
        scores = [score(run) for run in found]
        worst = min(scores) if columns else max(scores)
        pairs = [score(run) - default[run['seed']] for run in found if run['seed'] in default]
        cells = [arm, *(f'{each:.3f}' for each in means), f'{mean(scores):.3f} ({worst:.3f})']
        cells += ['' if arm == next(iter(runs)) else interval(pairs), f'{len(found)}']
        lines.append(cells)
    return f'{TITLES[row.model]}, {about}.\n\n' + table([row.name, *head, 'difference', 'seeds'], lines)


def score(run: dict[str, Any]) -> float:
    """Returns the score of a run: the mean accuracy over its lengths, or its bits per byte."""
    return mean(list(run['curve'].values())) if 'curve' in run else run['bits']['with memory']


def longest_in_training(results: list[dict[str, Any]]) -> int:
    """Returns the largest number of segments that the curriculum reached on any seed."""
    return max(entry['segments'] for result in results for entry in result['history'])


def plot_curves(rows: dict[str, list[dict[str, Any]]], path: Path, title: str = '') -> None:
    """Plots accuracy against length, with a line for each row: the mean over the seeds, and each seed as a point.

    Args:
        rows: the results of each row, by its name.
        path: the file of the plot.
        title: title of the plot. Default: '', none.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
    trained = 0
    for color, (name, results) in enumerate(rows.items()):
        row = ROWS[name]
        assert isinstance(row, TaskRow)
        task = row.task()
        trained = max(trained, longest_in_training(results) * task.segment_length)
        chance = task.without_memory
        tokens = [int(length) * task.segment_length for length in results[0]['curve']]
        shares = [[result['curve'][length] for result in results] for length in results[0]['curve']]
        # each line is thinner than the one before, so that lines at the same place can all be seen
        width = max(1.5, 5 - color) if len(rows) > 1 else 1.5
        axes.plot(tokens, list(map(mean, shares)), color=f'C{color}', linewidth=width, label=row.label or name)
        for at, each in zip(tokens, shares, strict=True):
            axes.plot([at] * len(each), each, '.', color=f'C{color}', alpha=0.5)
    axes.axvline(trained, color='gray', linestyle=':', label=f'longest in training: {trained} tokens')
    axes.axhline(chance, color='gray', linestyle='--', label='without memory')
    axes.set(xscale='log', xlabel='tokens', ylabel='accuracy', ylim=(-0.02, 1.05), title=title)
    if tokens[-1] < 1000:  # powers of ten would be too few ticks here
        axes.set_xticks(tokens, [f'{count}' for count in tokens])
        axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
