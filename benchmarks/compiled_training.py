"""What `train_enwik8.py --compile` gains: a training step with compiled reading, against the step as it is written.

    python -m benchmarks.compiled_training

The models of the script's preset 'small', as it trains them: 16 rows of four segments a step, forward, backward and
AdamW, float32, one CPU thread. The first two steps compile, since the first one has no state to read. The JSON tells
after how many steps of a training that has paid.
"""

from __future__ import annotations

import os
import sys

from benchmarks.interleave import Worker, interleaved_medians, quick_parser, write_results

PRESET, TURNS = 'small', 15


def worker(name: str) -> None:
    """Serves training steps.

    Args:
        name: the model, 'compiled' or 'eager', and 'quick' for one layer and two segments, such as 'rmt eager full'.
    """
    model_name, way, size = name.split()
    if size == 'full':
        os.environ['TORCHINDUCTOR_FORCE_DISABLE_CACHES'] = '1'  # a first training has none
    import torch

    from benchmarks.interleave import serve
    from segment_recurrence_pytorch.data import Piece
    from segment_recurrence_pytorch.trainer import BETAS, CLIP, WEIGHT_DECAY, compiled_advance, reading_by
    from segment_recurrence_pytorch.training import train_loss
    from train_enwik8 import PRESETS, build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, segments = (PRESETS[PRESET]['training'][key] for key in ('batch_size', 'segments'))
    if size == 'quick':
        PRESETS[PRESET][model_name]['depth'], segments = 1, 2
    wrapper = build({'model': model_name, 'preset': PRESET}, torch.device('cpu'), None)
    model = wrapper.model
    advance = compiled_advance(model) if way == 'compiled' else None
    optimizer = torch.optim.AdamW(model.param_groups(1e-3, WEIGHT_DECAY), betas=BETAS)
    tokens = torch.randint(256, (rows, segments * wrapper.segment_length + 1))
    piece, state = Piece(tokens, torch.zeros(rows, dtype=torch.bool)), None

    def step():
        nonlocal state
        with reading_by(model, advance):
            loss, _, state = train_loss(wrapper, piece, state, True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    serve(step, torch_version=torch.__version__)


def main(quick: bool) -> None:
    """Times the steps in turn and writes the JSON.

    Args:
        quick: whether one step of one small model is enough, and nothing is written.
    """
    found, size = {}, 'quick' if quick else 'full'
    for model in ('rmt',) if quick else ('rmt', 'infini'):
        ways = ('eager', 'compiled')
        workers = {way: Worker(sys.executable, __file__, f'{model} {way} {size}', ours=True) for way in ways}
        version = workers['eager'].about['torch_version']
        first = sum(workers['compiled'].step() for _ in range(2))
        medians = interleaved_medians(workers, *(1, 1) if quick else (TURNS, 2))
        saved = medians['eager'] - medians['compiled']
        found[model] = {
            'times_faster': round(medians['eager'] / medians['compiled'], 2),
            'pays_after_steps': round(first / saved) if saved > 0 else None,
        }
        print(model, found[model], flush=True)
    write_results(__file__, {'torch': version, 'preset': PRESET, 'turns': TURNS, 'models': found}, quick)


if __name__ == '__main__':
    parser = quick_parser(__doc__)
    parser.add_argument('--worker')
    arguments = parser.parse_args()
    worker(arguments.worker) if arguments.worker else main(arguments.quick)
