"""How much faster a training step is as one CUDA graph (`graphs.TrainingStep`) than as it is written. Needs a GPU.

    python -m benchmarks.training_step --device cuda

Models of dim 128 and dim 512 with four layers, 16 texts of 256 tokens, segments of 64, float32. The two ways take
turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.interleave import write_results
from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer
from segment_recurrence_pytorch import SegmentWrapper
from segment_recurrence_pytorch.data import Piece
from segment_recurrence_pytorch.graphs import TrainingStep

SEGMENT, ROWS, LENGTH, ROUNDS, STEPS = 64, 16, 256, 5, 4


def stepping(name: str, dim: int, graph: bool) -> TrainingStep:
    """Returns the training step of a model.

    Args:
        name: 'rmt' or 'infini'.
        dim: width of the model.
        graph: whether it is a CUDA graph.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(num_tokens=256, dim=dim, depth=4, heads=4, dim_head=dim // 4)
    model: RecurrentMemoryTransformer | InfiniTransformer
    if name == 'rmt':
        model = RecurrentMemoryTransformer(**sizes, seq_len=SEGMENT, num_memory_tokens=8)
    else:
        model = InfiniTransformer(**sizes)
    wrapper = SegmentWrapper(model, segment_length=SEGMENT).cuda()
    step = TrainingStep(wrapper, model.param_groups(1e-3, 0.01), betas=(0.9, 0.95), schedule=lambda _: 1.0)
    if not graph:
        step.graphed = None
    return step


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cuda'], required=True)
    parser.parse_args()
    piece = Piece(torch.randint(256, (ROWS, LENGTH + 1)).cuda(), torch.zeros(ROWS, dtype=torch.bool))
    rows = []
    for name in ('rmt', 'infini'):
        for dim in (128, 512):
            ways = {'as written': stepping(name, dim, False), 'as a graph': stepping(name, dim, True)}
            states: dict[str, Any] = dict.fromkeys(ways)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in tqdm(range(ROUNDS + 1), desc=f'{name}, dim {dim}', disable=None):
                for way, step in ways.items():
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    for _ in range(STEPS):
                        _, states[way] = step.read(piece, states[way], True)
                    torch.cuda.synchronize()
                    if turn:  # in the first one the graph is recorded
                        seconds[way].append((time.perf_counter() - began) / STEPS)
            medians = {way: statistics.median(each) for way, each in seconds.items()}
            rows.append({
                'model': name, 'dim': dim,
                'milliseconds': {way: round(1e3 * median, 2) for way, median in medians.items()},
                'times_faster': round(medians['as written'] / medians['as a graph'], 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
    about = {'device': torch.cuda.get_device_name(), 'torch': torch.__version__, 'segment': SEGMENT, 'rows': ROWS,
             'length': LENGTH}  # fmt: skip
    write_results(__file__, {**about, 'models': rows})


if __name__ == '__main__':
    main()
