"""What users import, what a wheel holds, and what importing does not do."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ('recurrent_memory_transformer_pytorch', 'infini_transformer_pytorch', 'segment_recurrence_pytorch')


@pytest.mark.parametrize('package', PACKAGES)
def test_public_names_are_strings_and_exist(package):
    module = importlib.import_module(package)
    assert all(isinstance(name, str) for name in module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    assert module.__version__ == '0.1.0'
    exec(f'from {package} import *', {})


def test_importing_does_nothing():
    """No output, no global setting, no device query; flash-attn and the training extras are not touched."""
    code = """
import sys, torch
torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import recurrent_memory_transformer_pytorch, infini_transformer_pytorch
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
heavy = {'flash_attn', 'safetensors', 'matplotlib', 'huggingface_hub', 'onnx', 'onnxscript', 'triton'}
loaded = (heavy | {'transformers', 'peft', 'lm_eval'}) & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_wheel_and_sdist_hold_what_they_should(tmp_path):
    copy = tmp_path / 'project'
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked or [str(path.relative_to(ROOT)) for path in ROOT.rglob('*') if path.is_file()]:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(next(name for name in files if name.endswith('/METADATA'))).decode()
        wheel.extractall(tmp_path / 'installed')
    for package in PACKAGES:
        assert f'{package}/py.typed' in files
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob('*.py')}
        assert modules <= files
    assert not any(name.startswith(('tests', 'benchmarks', 'train_enwik8')) for name in files)
    assert any(name.endswith('/LICENSE') for name in files)
    core = {line.split(':')[1].strip() for line in metadata.splitlines() if line.startswith('Requires-Dist')}
    core = {re.split(r'[<>=!~ ]', line)[0] for line in core if 'extra ==' not in line}
    # numpy, without which safetensors cannot save tensors of PyTorch
    assert core == {'torch', 'einops', 'beartype', 'numpy', 'safetensors', 'tqdm', 'typing_extensions'}
    for line in ('Version: 0.1.0', 'License-Expression: MIT', 'Requires-Dist: torch>=2.10', 'Provides-Extra: flash'):
        assert line in metadata
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as sdist:
        names = {name.split('/', 1)[-1] for name in sdist.getnames()}
    assert {'README.md', 'LICENSE', 'pyproject.toml', 'setup.py', 'segment_recurrence_pytorch/py.typed'} <= names
    # the wheel alone is enough, from another folder
    done = subprocess.run(
        [sys.executable, '-c', 'import recurrent_memory_transformer_pytorch as r; print(r.__file__)'],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path / 'installed')}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip().startswith(str(tmp_path / 'installed')), done.stderr


def test_what_is_imported_is_installed_with_the_package():
    """Whatever a module imports on its own import is a core dependency, but for modules with an extra of their own."""
    project = (ROOT / 'pyproject.toml').read_text()
    lists = dict(re.findall(r'^(dependencies|train|hf|eval|triton) = (\[.*\])$', project, re.MULTILINE))
    needs = {name: {re.split('>=', need)[0] for need in json.loads(listed)} for name, listed in lists.items()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob('*.py'):
            allowed = set(needs['dependencies'])
            for part, extra in (('plots.py', 'train'), ('huggingface', 'hf'), ('evaluation.py', 'eval'),
                                ('triton.py', 'triton')):  # fmt: skip
                allowed |= needs[extra] if part in path.relative_to(ROOT).as_posix() else set()
            names = set()
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import):
                    names |= {alias.name.split('.')[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.split('.')[0])
            others = names - set(sys.stdlib_module_names) - set(PACKAGES)
            assert others <= allowed, path


@pytest.mark.parametrize('package', PACKAGES)
def test_public_things_have_docstrings(package):
    for path in (ROOT / package).rglob('*.py'):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(inner for outer in classes for inner in outer.body)]:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith('_'):
                inherited = isinstance(node, ast.FunctionDef) and node.name in ('forward', 'setup_context', 'backward')
                is_setter = any(isinstance(d, ast.Attribute) and d.attr == 'setter' for d in node.decorator_list)
                assert inherited or is_setter or ast.get_docstring(node), f'{path}: {node.name}'
