"""The measured numbers of the documentation: where each comes from, and how it gets into a page.

A page holds a number between two comments, which no reader sees:

    RMT still recalls <!--=million_rmt-->.98<!--/--> of the values.

`NUMBERS` has a function for each name, which returns the text from the JSON that a benchmark has written.

    python docs/measured.py            # writes the numbers of all pages, and of the README, again
    python docs/measured.py --check    # says which are not those of the JSON; the tests do the same

A number that is not measured yet is 'not measured'.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
sys.path.insert(0, str(ROOT))

from benchmarks.crossings import FULL, QUESTIONS, curve, lines_of, standard, summary  # noqa: E402
from benchmarks.evidence.experiments import EXPERIMENTS, SEEDS, stored  # noqa: E402
from benchmarks.evidence.report import interval, score, text_runs  # noqa: E402
from benchmarks.evidence.rows import ROWS, TITLES, LanguageRow, TaskRow  # noqa: E402
from benchmarks.evidence.summary import gains_on_text as gains_of_runs  # noqa: E402
from benchmarks.intervals import bounds  # noqa: E402
from segment_recurrence_pytorch.tasks import AssociativeRetrieval  # noqa: E402

MARK = re.compile(r'(<!--=(\w+)-->)(.*?)(<!--/-->)', re.DOTALL)
NUMBERS: dict[str, Callable[[], str]] = {}


def number(function: Callable[[], str]) -> Callable[[], str]:
    """Registers the text that a function returns under the function's name."""
    NUMBERS[function.__name__] = function
    return function


def short(value: float, digits: int = 2) -> str:
    """Returns a number as this project writes it: .98 instead of 0.98."""
    return re.sub(r'^(-?)0\.', r'\1.', f'{value:.{digits}f}')


def read(name: str) -> Any:
    """Returns the content of a JSON file in benchmarks/results."""
    return json.loads((RESULTS / f'{name}.json').read_text())


def row(name: str) -> list[dict[str, Any]]:
    """Returns the results of a row of docs/results.md, a dict for each seed."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / 'evidence').glob(f'{name}-*.json'))]
    return [result for result in found if result['row'] == name]


def table(head: str, lines: list[list[Any]]) -> str:
    """Returns a table in Markdown, with an empty line before and after it."""
    columns = head.count('|') + 1
    rows = [f'| {head} |', '|' + '---|' * columns, *(f'| {" | ".join(map(str, line))} |' for line in lines)]
    return '\n\n' + '\n'.join(rows) + '\n\n'


def seeds(count: int) -> str:
    """Returns '1 seed', or '3 seeds'."""
    return f'{count} seed' + 's' * (count != 1)


# what the memories learn


def steps_to_learn(model: str) -> str:
    """Returns the range of steps after which a model remembers over 5 segments."""
    steps = [result['reached'].get('5') for result in row(f'{model}_defaults')]
    if not steps or None in steps:
        return 'not all runs reached it' if steps else 'not measured'
    return f'{min(steps)} to {max(steps)} steps ({seeds(len(steps))})'


def share_at(name: str, segments: int) -> str:
    """Returns the mean accuracy of a row at a number of segments."""
    found = [result['curve'].get(str(segments)) for result in row(name)]
    if not found or None in found:
        return 'not measured'
    average, worst = short(mean(found)), short(min(found))
    return f'{average} ({seeds(len(found))}{f", the worst {worst}" * (worst != average)})'


# the numbers that are the mean accuracy of a row at a number of segments
SHARES = {
    'million_rmt': ('rmt_memorize', 31250),
    'million_infini': ('infini_passkey', 31250),
    'million_linear': ('infini_passkey_linear', 31250),
    'million_virtual': ('infini_passkey_repetition', 31250),
    'far_linear': ('infini_passkey_linear', 1024),
    'pairs_armt': ('armt_associative', 5),
    'pairs_rmt': ('rmt_associative', 5),
    'pairs_infini': ('infini_associative', 6),
    'pairs_one_rate': ('infini_associative_one_rate', 6),
    'copy_rmt': ('rmt_copy', 6),
}
NUMBERS |= {name: partial(share_at, *place) for name, place in SHARES.items()}


def without_keys(name: str, segments: int) -> str:
    """Returns the accuracy on pairs of a memory that holds values without their keys."""
    task = ROWS[name].task()
    return short(task.without_keys(segments))


NUMBERS |= {
    'keyless_rmt': partial(without_keys, 'rmt_associative', 5),
    'keyless_infini': partial(without_keys, 'infini_associative', 6),
}


@number
def learned_rmt() -> str:
    return steps_to_learn('rmt')


@number
def learned_infini() -> str:
    return steps_to_learn('infini')


def gain(model: str, length: int, suffix: str = '') -> str:
    """Returns the mean gain over a twin without memory on text, its bounds where there are several seeds, and their
    number. `suffix` is the end of the name of the row. Default: '', 800 steps."""
    gains = [result['gain'] for result in row(f'{model}_bytes_{length}{suffix}')]
    if len(gains) < 2:
        return f'{mean(gains):+.3f} bits per byte ({seeds(len(gains))})' if gains else 'not measured'
    low, high = bounds(gains)
    return f'{mean(gains):+.3f} [{low:+.3f}, {high:+.3f}] bits per byte ({seeds(len(gains))})'


@number
def gain_infini_64() -> str:
    return gain('infini', 64)


@number
def gains_on_text() -> str:
    names = {'rmt': 'RMT', 'infini': 'Infini-Transformer'}
    what = [('rmt', 16), ('infini', 16), ('rmt', 64), ('infini', 64), ('infini', 128)]
    lines = []
    for model, length in what:
        # runs of one row may be days apart: what some of its seeds say stands in docs/results.md alone
        later = gain(model, length, '_3000')
        later = later if seeds(5) in later else 'not on five seeds yet'
        lines.append([names[model], length, gain(model, length), later])
    return table('model | bytes of a segment | gain after 800 steps | gain after 3,000 steps', lines)


@number
def retrofits() -> str:
    runs = [json.loads(path.read_text()) for path in (RESULTS / 'retrofit').glob('*-?.json')]
    plain = {(run['base'], run['seed']): run for run in runs if run['method'] == 'unmodified'}
    lines = []
    for base, method, name in (('llama', 'rmt', 'Llama, memory tokens'), ('llama', 'infini', 'Llama, Infini-attention'),
                               ('gpt2', 'rmt', 'GPT-2, memory tokens')):  # fmt: skip
        found = [run for run in runs if (run['base'], run['method']) == (base, method)]
        change = [run['bytes']['300'] - plain[base, run['seed']]['bytes']['300'] for run in found]
        cells = [short(mean(run['memorize']['curve'][length] for run in found)) for length in ('5', '64')]
        lines.append([name, *cells, interval(change), len(found)])
    guess = [short(mean(run['memorize']['curve'][length] for run in plain.values())) for length in ('5', '64')]
    lines.append(['unmodified', *guess, '', len(plain) // 2])
    bits = 'change in bits per byte against the unmodified model (below 0: better)'
    return table(f'model | remembered after 5 segments | after 64 | {bits} | seeds', lines)


@number
def shifted_positions() -> str:
    """What GPT-2 paid on text while memory rows shifted it to other positions."""
    lines = (RESULTS / 'retrofit' / 'shifted_positions.jsonl').read_text().splitlines()
    change = []
    for run in map(json.loads, lines):
        plain = json.loads((RESULTS / 'retrofit' / f'gpt2-unmodified-{run["seed"]}.json').read_text())
        change.append(run['bytes']['300'] - plain['bytes']['300'])
    return f'{interval(change)} ({len(change)} seeds)'


# what other options learn

LEARNED = {'memorize': 'a fact', 'passkey': 'a fact', 'copy': 'a copy', 'reverse': 'a copy, backwards',
           'pairs': 'pairs'}  # fmt: skip


def learned(row: TaskRow | LanguageRow) -> str:
    """Returns what a row of an experiment learns, by which model, with how many memory tokens if its name says so."""
    name, _, tokens = row.name.partition('_m')
    what, unit = ('text', 'bits per byte') if isinstance(row, LanguageRow) else (LEARNED[name], 'accuracy')
    more = f', {tokens} memory tokens' if tokens else ''
    return f'{what}, {TITLES[row.model]}{more}: {unit}'


# how a table names the arms of an experiment whose own names are short
SHOWN = {
    'gate': {'3': 'gate 3, rate 3', **{name: f'gate {name}' for name in ('0', '6', '10')},
             **{f'3, {times} times': f'rate {times}' for times in (1, 10, 30)}},
    'backprop': {'all': 'all segments', **{number: f'blocks of {number}' for number in ('1', '2', '4')}},
    'write_init': {name: f"`'{name}'`" for name in ('scaled', 'learned', 'sum', 'previous')},
    'memory_mask': {name: f"`'{name}'`" for name in ('block', 'causal', 'mixed')},
    'axial': {'the last 8 memories': '8', 'the last one (control)': '1 (control)', 'off': '`axial_mem_len=0`'},
    'enhanced': {'same layer': 'neither', 'talking heads': "`'talking_heads'`", 'kv projection': "`'kv_proj'`",
                 'layer above': "`'above'`"},
}  # fmt: skip
SHOWN['backprop_bytes'] = SHOWN['backprop']


def guessing(row: TaskRow | LanguageRow) -> str:
    """Returns the accuracy on the task of a row without a memory, and on pairs that of values without their keys."""
    if isinstance(row, LanguageRow):
        return ''
    task = row.task()
    if isinstance(task, AssociativeRetrieval):
        return f'{mean(task.without_keys(length) for length in row.lengths):.3f}'
    return f'{task.without_memory:.3f}'


def compared(*names: str) -> str:
    """Returns a table of experiments with the same arms: the score without a memory, the mean score of the default, and
    the difference of each other arm to it, for each row of which all runs are there."""
    lines, arms = [], list(EXPERIMENTS[names[0]].arms)
    for name in names:
        experiment = EXPERIMENTS[name]
        for row in experiment.rows:
            runs = {(run['arm'], run['seed']): score(run) for run in stored(experiment.file(RESULTS / 'evidence', row))}
            if any((arm, seed) not in runs for arm in experiment.arms for seed in SEEDS):
                continue
            default = [runs[arms[0], seed] for seed in SEEDS]
            cells = {
                arm: interval([runs[arm, seed] - have for seed, have in zip(SEEDS, default, strict=True)])
                for arm in experiment.arms
            }
            other = [cells.get(arm, '') for arm in arms[1:]]
            lines.append([learned(row), guessing(row), f'{mean(default):.3f}', *other])
    default, *rest = [SHOWN.get(names[0], {}).get(arm, arm) for arm in arms]
    heads = ['task', 'guessing', f'{default}: score', *(f'{arm}: change' for arm in rest)]
    return table(' | '.join(heads), lines) if lines else 'not measured'


NUMBERS |= {
    'depths': partial(compared, 'backprop_bytes', 'backprop'),
    'axial': partial(compared, 'axial'),
    'write_inits': partial(compared, 'write_init'),
    'memory_masks': partial(compared, 'memory_mask'),
    'rules': partial(compared, 'rules'),
    'gates': partial(compared, 'gate'),
    'enhanced': partial(compared, 'enhanced'),
}


@number
def strength_far() -> str:
    """What a learned strength keeps of a fact in the longest texts, with the linear rule."""
    experiment = EXPERIMENTS['rules']
    (row,) = [row for row in experiment.rows if row.name == 'passkey']
    runs, length = stored(experiment.file(RESULTS / 'evidence', row)), max(row.lengths)
    found = [
        short(mean(run['curve'][str(length)] for run in runs if run['arm'] == arm))
        for arm in ('linear, strength', 'linear')
    ]
    return f'{found[0]} with it and {found[1]} without it, after {length * row.task().segment_length:,} tokens'


# how fast it is


@number
def gradient_reach() -> str:
    norms = read('gradient_reach')['gradient_norm']
    return table('`write_init` | gradient through 32 segments, through one = 1',
                 [[f"`'{name}'`", f'{of["32"] / of["1"]:.2f}'] for name, of in norms.items()])  # fmt: skip


@number
def speed_rmt() -> str:
    times = read('rmt_training')['times_ours']
    names = {'ours': 'this library',
             'published, 4 streams (its default)': 'published, its default of four residual streams',
             'published, 4 streams, use_flash_attn': 'the same, `use_flash_attn=True`',
             'published, 1 stream': 'published, one residual stream',
             'published, 1 stream, use_flash_attn': 'the same, `use_flash_attn=True`'}  # fmt: skip
    return table(
        'training step of RMT | time, ours = 1', [[names[name], f'{time:.2f}'] for name, time in times.items()]
    )


@number
def speed_infini() -> str:
    lines = [[f'{row["segment_length"]}, {row["rule"]}', f'{row["times_faster"]:.2f}', f'{row["operations"]["ours"]:,}',
              f'{row["operations"]["published"]:,}'] for row in read('infini_training')['rows']]  # fmt: skip
    return table('segment, rule | times faster | operations dispatched, ours | published', lines)


@number
def compile_gain() -> str:
    """What `--compile` gains, and after how many steps."""
    models = read('compiled_training')['models']
    gain = both(models[name]['times_faster'] for name in ('rmt', 'infini'))
    paid = [models[name]['pays_after_steps'] for name in ('rmt', 'infini')]
    steps = both('never' if count is None else f'{count:,} steps' for count in paid)
    return f'{gain} times the speed, paid after {steps}'


@number
def speed_generation() -> str:
    lines = [[f'{TITLES[row["model"]]}, {row["segment_length"]}', *(row[f'{what}_{how}'] for what in
              ('times_faster', 'times_faster_than_fastest', 'batch') for how in ('eager', 'compiled'))]
             for row in read('generation')['tokens']]  # fmt: skip
    return table(
        'model, segment | times faster than published, eager | compiled | than its fastest options, eager | compiled '
        '| batch of 16, eager | compiled',
        lines,
    )


def both(values: Any) -> str:
    """Returns the values of both models: of RMT and of the Infini-Transformer."""
    rmt, infini = values
    return f'{rmt} (RMT) and {infini} (Infini)'


@number
def far_positions() -> str:
    return both(place['time_ratio'] for place in read('generation')['positions'].values())


@number
def far_megabytes() -> str:
    return both(f'{place["megabytes_more"]} MB' for place in read('generation')['positions'].values())


@number
def ragged() -> str:
    return both(read('generation')['ragged_times_aligned'].values())


@number
def prompt_speed() -> str:
    return both(read('generation')['prompt_times_evaluation'].values())


def scan_range(name: str) -> str:
    """Returns how many times slower another scan is, over the numbers of segments that were measured."""
    times = [row['times_sequential'][name] for row in read('scan')['rows']]
    return f'{min(times):.1f} to {max(times):.1f}'


@number
def scan_chunked() -> str:
    return scan_range('chunked')


@number
def scan_associative() -> str:
    return scan_range('associative')


@number
def million_peak() -> str:
    return f'{read("infini_million")["peak_ratio_without_inputs"]}'


@number
def vocabulary() -> str:
    parts, whole = (read('vocabulary')['rows'][arm] for arm in ('parts', 'whole'))
    memory = f'{parts["peak_megabytes"] / 1000:.1f} GB instead of {whole["peak_megabytes"] / 1000:.1f} GB'
    return f'{memory}, in {parts["seconds"] / whole["seconds"]:.2f} times the time'


def pages() -> list[Path]:
    """Returns all files that may hold marked numbers."""
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def filled(text: str) -> str:
    """Returns a text with its marked numbers as they are in the JSON."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in NUMBERS:
            raise ValueError(f'no number has the name {match[2]!r}: add a function to docs/measured.py')
        return match[1] + NUMBERS[match[2]]() + match[4]

    return MARK.sub(fill, text)


@number
def speed_summary() -> str:
    """The tables of speed in short."""
    training = read('rmt_training')['times_ours']
    infini = {(row['segment_length'], row['rule']): row['times_faster'] for row in read('infini_training')['rows']}
    tokens = {(row['model'], row['segment_length']): row for row in read('generation')['tokens']}
    one, four = 'published, 1 stream, use_flash_attn', 'published, 4 streams (its default)'
    rmt = [tokens['rmt', length] for length in (256, 1024)]
    lines = [
        ['training step, RMT with replay', 256, f'{training[four]:.2f}', f'{training[one]:.2f}'],
        ['training step, Infini, delta rule', '512, 128, 32',
         ', '.join(f'{infini[length, "delta"]:.2f}' for length in (512, 128, 32)), 'it has none'],
        ['new token, RMT', '256, 1024', *(', '.join(str(row[f'times_faster{than}_eager']) for row in rmt)
                                          for than in ('', '_than_fastest'))],
        *([f'new token, Infini{", ours compiled" * (how == "compiled")}', 512,
           *(tokens['infini', 512][f'times_faster{than}_{how}'] for than in ('', '_than_fastest'))]
          for how in ('eager', 'compiled')),
    ]  # fmt: skip
    return table('what | segment | than its defaults | than its fastest options', lines)


def crossing(model: str, question: str = 'training') -> str:
    """Returns the length from which on a model takes less time than full attention: between two lengths that were
    measured, or the shortest of them."""
    line = standard(question, 'float32')._replace(model=model)
    parts = {each: both_parts(each) for each in QUESTIONS}
    found = summary(parts)['crossings'][question][f'{line}, seconds']
    if found is None:
        return 'no length that was measured'
    if found['from_the_first_length_on']:
        return f'{found["tokens"]:,} tokens or fewer'
    return f'about {round(found["tokens"], -2):,} tokens'  # between lengths that are far apart


def both_parts(question: str) -> list[dict[str, Any]]:
    """Returns the points of a question, short ones and long ones. Where a point was measured in both parts, that of the
    short one, which was measured more often, counts."""
    found = [point for part in ('full_attention_long', 'full_attention') for point in read(part)[question]]
    return list({(p['model'], p['mode'], p['dtype'], p['tokens']): p for p in found}.values())


def against_full(question: str) -> str:
    """Returns how many times faster than full attention each line is, by length."""
    points = both_parts(question)
    full = curve(points, standard(question, 'float32'))
    lines = [line for line in lines_of(points) if line.dtype == 'float32' and line != standard(question, 'float32')]
    curves = {line.short: curve(points, line) for line in lines}
    lengths = [n for n in full if all(n in seconds for seconds in curves.values())]
    cells = [[name, *(f'{full[n] / seconds[n]:.2f}' for n in lengths)] for name, seconds in curves.items()]
    return table(' | '.join(['times faster than full attention at', *(f'{n:,}' for n in lengths)]), cells)


@number
def crossing_decoding_rmt() -> str:
    return crossing('RMT', 'decoding')


@number
def crossing_decoding_infini() -> str:
    return crossing('Infini', 'decoding')


@number
def far_decoding() -> str:
    points = [point for point in read('full_attention_long')['decoding'] if point['tokens'] == 2**20]
    seconds = {point['model']: point['seconds'] for point in points}
    return ' and '.join(f'{seconds["full attention"] / seconds[name]:.0f} ({name})' for name in ('RMT', 'Infini'))


@number
def full_slopes() -> str:
    """What a token costs far away, as multiples of one at 16,384 tokens."""
    found = read('full_attention_long')['slopes']
    asked = {'reading': 'eager', 'decoding': 'eager', 'training': 'replay'}
    lines = []
    for model in ('RMT', 'Infini', 'Infini, delta rule'):
        slopes = [found[question][f'{model}, {how}, float32'] for question, how in asked.items()]
        lines.append([model, *(f'{each["times"]} (at {each["to"]:,})' for each in slopes)])
    return table('times the cost of a token at 16,384 | reading | a new token | training with replay', lines)


@number
def full_training() -> str:
    return against_full('training')


@number
def full_reading() -> str:
    return against_full('reading')


@number
def full_decoding() -> str:
    return against_full('decoding')


@number
def full_bfloat16() -> str:
    """How many times faster than in float32 each model is in bfloat16, on the CPU that measured."""
    lines, lengths = [], (4096, 16384)
    for model in (FULL, 'RMT', 'Infini'):
        cells = []
        for question in QUESTIONS:
            points = [point for point in both_parts(question) if point['model'] == model]
            [half] = [line for line in lines_of(points) if line.dtype == 'bfloat16']
            seconds = [curve(points, half._replace(dtype=dtype)) for dtype in ('float32', 'bfloat16')]
            cells.append(', '.join(f'{seconds[0][n] / seconds[1][n]:.2f}' for n in lengths))
        lines.append([model, *cells])
    return table('times faster than float32, at 4,096 and 16,384 tokens | training | reading | a new token', lines)


@number
def crossing_rmt() -> str:
    return crossing('RMT')


@number
def crossing_infini() -> str:
    return crossing('Infini')


# text


def text_gain(arm: str, length: int = 128) -> str:
    """Returns what an arm of `benchmarks.text` gains over segments alone, and over how many seeds. Until there are runs
    of both with the present initial weights, those of an earlier version count, and the text says so."""
    notes = '', ', with earlier initial weights'
    gains, note = next(
        (gains, note)
        for runs, note in zip(text_runs(RESULTS / 'text'), notes, strict=True)
        if (gains := gains_of_runs(runs, length, arm))
    )
    return f'{short(mean(gains))} bits per byte ({seeds(len(gains))}{note})'


@number
def text_xl() -> str:
    return text_gain('xl')


@number
def text_rmt() -> str:
    return text_gain('rmt')


@number
def text_infini() -> str:
    return text_gain('infini')


@number
def text_both() -> str:
    return text_gain('rmt_xl')


# on a GPU


@number
def training_step() -> str:
    """A training step as it is written, and as one CUDA graph."""
    found = read('training_step')
    lines = [
        [each['model'], each['dim'], *each['milliseconds'].values(), f'{each["times_faster"]:.1f}']
        for each in found['models']
    ]
    about = f'{found["rows"]} texts of {found["length"]} tokens, segments of {found["segment"]}, four layers, float32, '
    about += f'milliseconds on an {found["device"]} (`python -m benchmarks.training_step --device cuda`):'
    return about + table('model | dim | as written | as a CUDA graph | times faster', lines)


@number
def graph_gain() -> str:
    """How many times faster a training step is as one CUDA graph."""
    found = read('training_step')
    gain = {(each['model'], each['dim']): f'{each["times_faster"]:.1f}' for each in found['models']}
    return (
        f'{gain["rmt", 128]} (RMT) and {gain["infini", 128]} (Infini) times faster at dim 128, {gain["rmt", 512]} and '
        f'{gain["infini", 512]} at dim 512, on an {found["device"]}'
    )


@number
def scan_kernel() -> str:
    """The scan in its forms on a GPU."""
    found = read('scan_cuda')
    lines = [
        [each['segments'], f'{each["batch"]} x {each["heads"]}', each['features'], *each['milliseconds'].values()]
        for each in found['rows']
    ]
    names = ' | '.join(found['rows'][0]['milliseconds']).replace('sequential', 'PyTorch, one by one')
    head = f'segments | rows x heads | features | {names.replace("triton", "the kernel")}'
    return f'{found["device"]} (`python -m benchmarks.scan --device cuda`):' + table(head, lines)


def main(check: bool = False) -> int:
    """Writes the numbers again, or says which pages hold others."""
    stale = [page for page in pages() if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f'{page.relative_to(ROOT)}: its numbers ' + ('are not those of the JSON' if check else 'are new'))
        if not check:
            page.write_text(filled(page.read_text()))
    return int(check and bool(stale))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing')
    sys.exit(main(parser.parse_args().check))
