"""Small models, in float64 where a claim is exact; one thread; tests marked cuda skip where there is no device."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from infini_transformer_pytorch import InfiniTransformer
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

# a shell that starts the tests in the background, or by nohup, lets them ignore these signals, which some tests send
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, 'SIGHUP'):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# what takes longest begins first, so that no worker ends alone with it
LONGEST = ('test_cuda_path', 'test_distributed', 'test_kill', 'test_train_ranks')
# `make test-long`: more cases, many processes in every number of them, and kills of real processes
LONG = os.environ.get('LONG_TESTS') == '1'


def long_unless(few, names):
    """Parameters of a test: those that are not among the few are only run by `make test-long`."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.long) for name in names]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not LONG:
        long = [item for item in items if item.get_closest_marker('long')]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker('long')]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('cuda'):
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    """A folder with a corpus `text`, and the runs of four steps of the training script; and what they printed."""
    from tests import script

    folder, printed = tmp_path_factory.mktemp('made'), {}
    (folder / 'text').write_bytes((script.ROOT / 'tests' / 'test_rmt.py').read_bytes())
    with pytest.MonkeyPatch.context() as patch, script.tiny():
        patch.chdir(folder)
        patch.setattr(script.train_enwik8, 'import_plots', script.IMPORT_PLOTS)
        for name in script.MODELS:
            done = script.train('--steps', 4, '--model', name, name=name)
            assert done.code == 0, done
            printed[name] = done.out
    return folder, printed


@pytest.fixture
def at_work(made, tmp_path, monkeypatch):
    """The same folder, copied, as working directory: a test may change it."""
    from tests import script

    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with script.tiny():
        yield tmp_path


def ids(*shape) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, 20, shape)


def make_rmt(**options) -> RecurrentMemoryTransformer:
    """A small model in float64, see `random_weights`."""
    sizes = dict(dim=16, num_tokens=20, depth=2, num_memory_tokens=3, seq_len=6, heads=2, dim_head=8)
    return random_weights(RecurrentMemoryTransformer(**{**sizes, **options}).double())


@torch.no_grad()
def random_weights(model):
    """Weights of the size that trained ones have: at the start blocks do little, and memories are small."""
    for name, parameter in model.named_parameters():
        if name.endswith('norm.weight'):
            parameter.uniform_(0.5, 1.5)
        elif name.startswith('layers') and parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(std=0.5)
    return model


def make_infini(**options) -> InfiniTransformer:
    """A small model in float64, see `random_weights`."""
    sizes = dict(dim=16, num_tokens=20, depth=2, heads=2, dim_head=4)
    return random_weights(InfiniTransformer(**{**sizes, **options}).double())


# every option that changes what a segment computes, each at least once beside the plain model
RMT_OPTIONS = {
    'plain': {},
    'causal': {'memory_mask': 'causal'},
    'mixed': {'memory_mask': 'mixed'},
    'learned': {'write_init': 'learned'},
    'sum': {'write_init': 'sum'},
    'previous': {'write_init': 'previous'},
    'rotary': {'rotary_pos_emb': True, 'abs_pos_emb': False},
    'gqa': {'heads': 4, 'kv_heads': 2, 'qk_norm': True},
    'tied': {'tie_embeddings': True},
    'no memory': {'num_memory_tokens': 0},
    'encoder': {'causal': False},
    'xl': {'use_xl_memories': True},
    'xl causal': {'use_xl_memories': True, 'memory_mask': 'causal', 'xl_mem_len': 4},
    'xl mixed': {'use_xl_memories': True, 'memory_mask': 'mixed', 'rotary_pos_emb': True},
    'xl long': {'use_xl_memories': True, 'xl_mem_len': 14, 'rotary_pos_emb': True},
    'xl enhanced': {'use_xl_memories': True, 'enhanced_xl_recurrence': True, 'depth': 3},
    'xl only': {'use_xl_memories': True, 'num_memory_tokens': 0, 'xl_mem_len': 9},
    'xl encoder': {'use_xl_memories': True, 'causal': False},
    'axial': {'axial_mem_len': 3},
    'axial, xl': {'axial_mem_len': 1, 'heads': 4, 'kv_heads': 2, 'use_xl_memories': True, 'write_init': 'previous'},
    'deep': {'depth': 3, 'ff_mult': 2},
}
INFINI_OPTIONS = {
    'default': {},
    'linear': {'memory_rule': 'linear'},
    'linear, strength': {'memory_rule': 'linear', 'learned_delta_update': True},
    'linear, decay': {'memory_rule': 'linear', 'memory_decay': True},
    'delta': {'use_mem_delta_rule': True},
    'delta, strength, decay': {'memory_rule': 'delta', 'learned_delta_update': True, 'memory_decay': True},
    'delta, published strength': {
        'memory_rule': 'delta', 'learned_delta_update': True, 'strength_in_normaliser': False
    },
    'delta, gqa': {'memory_rule': 'delta', 'heads': 4, 'kv_heads': 2, 'qk_norm': True, 'learned_delta_update': True},
    'deltanet': {'memory_rule': 'deltanet', 'memory_decay': False},
    'deltanet, decay, gqa': {'memory_rule': 'deltanet', 'memory_decay': True, 'heads': 4, 'kv_heads': 2},
    'talking heads': {'mem_transform': 'talking_heads', 'memory_rule': 'linear', 'heads': 4, 'kv_heads': 2},
    'kv proj': {'mem_transform': 'kv_proj', 'use_mem_delta_rule': True},
    'above': {'mem_read_from': 'above', 'memory_rule': 'linear', 'depth': 3, 'tie_embeddings': True},
    'deltanet, above': {'mem_read_from': 'above', 'memory_rule': 'deltanet', 'mem_transform': 'kv_proj'},
}  # fmt: skip
DROPOUT = {'attn_dropout': 0.2, 'ff_dropout': 0.3}


def close(actual, expected, tolerance=1e-9):
    """Same values to an absolute and relative tolerance, same dtype and shape."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_gradients(have, want, tolerance=1e-9):
    """Two dicts of gradients by the names of parameters."""
    for name, gradient in want.items():
        torch.testing.assert_close(
            have[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f'{n}: {m}'
        )
