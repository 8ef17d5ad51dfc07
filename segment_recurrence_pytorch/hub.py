"""Models as folders and on the Hugging Face Hub. `SegmentModel` has the methods; this is what they do.

    config.json          the arguments of the constructor
    model.safetensors    the weights
    README.md            the model card

The format is that of `huggingface_hub.PyTorchModelHubMixin`, which can load such a folder, and whose folders can be
loaded here. The folder of a training run is such a folder too. The package huggingface_hub (extra `hub`) is imported
only to download or to upload.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model

from segment_recurrence_pytorch.checkpoint import check_made_by, replacing, save_weights
from segment_recurrence_pytorch.checks import check_has_weights, needs_extra
from segment_recurrence_pytorch.metrics import read_metrics
from segment_recurrence_pytorch.model import SegmentModel, class_name, plain_arguments

CONFIG, WEIGHTS, CARD = 'config.json', 'model.safetensors', 'README.md'
# the dtypes that a model can have, by their names in safetensors
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
M = TypeVar('M', bound=SegmentModel)


def save_pretrained(model: SegmentModel, folder: str | Path, *, run: str | Path | None = None) -> None:
    """See `SegmentModel.save_pretrained`."""
    folder = Path(folder)
    check_has_weights(model)
    config = _config(model)
    card = _card(model, folder if run is None else Path(run), needed=run is not None)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'{folder} is a file: give the name of a folder')
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    with replacing(folder / CONFIG) as part:
        part.write_text(config, encoding='utf-8')
    if not (folder / CARD).exists():
        with replacing(folder / CARD) as part:
            part.write_text(card, encoding='utf-8')


def from_pretrained(
    cls: type[M], name_or_folder: str | Path, *, device: Any, arguments: dict[str, Any], **download: Any
) -> M:
    """See `SegmentModel.from_pretrained`."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        config, weights = folder / CONFIG, folder / WEIGHTS
    else:
        config, weights = (_downloaded(str(name_or_folder), file, download) for file in (CONFIG, WEIGHTS))
    saved = _read_config(config)
    dtypes, made_by = _look_into(weights)
    now = {'class': cls.__name__, 'arguments': saved}
    if made_by is not None and not (isinstance(made_by, dict) and made_by.get('class') == cls.__name__):
        check_made_by(weights, made_by, now)
    taken, known = _arguments_of(cls)
    if unknown := sorted(set(saved) - known):
        raise ValueError(
            f'{config} has the argument {unknown[0]!r}, which {cls.__name__} does not take: it was made by another '
            'class, or by a newer version of it'
        )
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f'from_pretrained was given {unknown[0]!r}, which {cls.__name__} does not take')
    if made_by is not None:
        try:
            check_made_by(weights, made_by, now)
        except ValueError as error:
            raise ValueError(f'{config} does not belong to its weights: {error}') from error
    saved = {name: value for name, value in saved.items() if name in taken}
    try:
        model = _made(cls, saved, arguments)
    except Exception as error:  # whatever a constructor says to values of other types or outside their range
        raise ValueError(f'{config} does not make a {cls.__name__}: {error}') from error
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
    model.to(device=device)
    try:
        load_model(model, str(weights), device=str(model.device))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f'{weights} does not hold the weights of this {cls.__name__}. If the model was changed after it was made, '
            f'make and change a new one in the same way, and load the file with `checkpoint.load_weights`. {error}'
        ) from error
    return model.eval()


def _made(cls: type[M], saved: dict[str, Any], arguments: dict[str, Any]) -> M:
    """Returns a model of the saved arguments, and of others that replace them.

    A class may give its base class an argument itself: `super().__init__(memory_rule='linear', **options)`. Then the
    argument is recorded, and cannot be given again.
    """
    fixed: dict[str, Any] = {}
    while True:
        try:
            model = cls(**{**saved, **arguments})
            break
        except TypeError as error:
            twice = re.search(r"got multiple values for (?:keyword )?argument '(\w+)'", str(error))
            if twice is None or twice[1] not in saved or twice[1] in arguments:
                raise
            fixed[twice[1]] = saved.pop(twice[1])
    now = plain_arguments(model)
    for name, value in fixed.items():
        if now.get(name) != value:
            raise ValueError(f'it was saved with {name}={value!r}, and now fixes {now.get(name)!r}')
    return model


def push_to_hub(
    model: SegmentModel,
    repo_id: str,
    *,
    run: str | Path | None,
    commit_message: str,
    private: bool | None,
    token: str | None,
    branch: str | None,
    create_pr: bool | None,
) -> str:
    """See `SegmentModel.push_to_hub`."""
    api = _hub('push_to_hub').HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, run=run)  # before anything is made on the hub
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            repo_type='model',
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )


def _hub(what: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise needs_extra(what, 'hub', error) from error
    return huggingface_hub


def _downloaded(name: str, file: str, download: dict[str, Any]) -> Path:
    hub = _hub(f'{name} is no folder here, and loading from the hub')
    try:
        return Path(hub.hf_hub_download(repo_id=name, filename=file, **download))
    except (OSError, ValueError) as error:  # all errors of huggingface_hub are of these kinds
        raise ValueError(f'{name} is no folder here, and its {file} cannot be loaded from the hub: {error}') from error


def _config(model: SegmentModel) -> str:
    """Returns the content of config.json. Raises ValueError if a model could not be made of it again."""
    if unnamed := set(model.arguments) - _arguments_of(type(model))[1]:
        raise ValueError(
            f'the constructor of {class_name(model)} takes {min(unnamed)} by its position alone, and {CONFIG} holds '
            'arguments by their names: let it take all of them by name'
        )
    for name, value in model.arguments.items():
        try:
            if _has_other_keys(value):
                raise TypeError('keys of dicts become texts there')
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'the argument {name} of {class_name(model)} is a {type(value).__name__}, which {CONFIG} cannot hold '
                f'({error}): save the weights alone, with `checkpoint.save_weights`'
            ) from error
    return json.dumps(model.arguments, indent=2, sort_keys=True)


def _has_other_keys(value: Any) -> bool:
    """Returns whether a dict, or one inside a list or dict, has keys that are no texts."""
    if isinstance(value, dict):
        return any(not isinstance(name, str) or _has_other_keys(each) for name, each in value.items())
    return isinstance(value, (list, tuple)) and any(map(_has_other_keys, value))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} is damaged: it holds a {type(config).__name__}, and no arguments')
    return config


def _look_into(path: Path) -> tuple[dict[str, torch.dtype], Any]:
    """Returns the dtypes of the weights in a file by their names, and what the file says of the model that made it, or
    None."""
    try:
        with safe_open(str(path), framework='pt') as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no mapping
            made_by = json.loads((file.metadata() or {}).get('model', 'null'))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f'{path} is damaged, or holds no weights: {error}') from error
    return {name: DTYPES[kind] for name, kind in kinds.items() if kind in DTYPES}, made_by


def _arguments_of(cls: type) -> tuple[set[str], set[str]]:
    """Returns the names of the arguments that a class takes, and of those that its base classes take, too: a class may
    itself give some arguments to its base class, and `SegmentModel.arguments` has them all."""
    taken: set[str] = set()
    known: set[str] = set()
    passes_on = True
    for base in cls.__mro__:
        if '__init__' in vars(base):
            parameters = list(inspect.signature(vars(base)['__init__']).parameters.values())[1:]
            named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
            known |= named
            taken |= named if passes_on else set()
            passes_on &= any(each.kind == each.VAR_KEYWORD for each in parameters)
    return taken, known


def _card(model: SegmentModel, run: Path, *, needed: bool) -> str:
    """Returns the model card, with the settings and the validation of a training run if its folder holds them."""
    name, module = class_name(model), type(model).__module__
    package = module.partition('.')[0]
    place = package if hasattr(sys.modules.get(package), name) else module
    arguments = {key: value.get('model_type', '') if isinstance(value, dict) else value
                 for key, value in model.arguments.items()}  # fmt: skip
    about: dict[str, Any] = {}
    if needed or (run / 'run.json').exists():
        try:
            about = json.loads((run / 'run.json').read_text(encoding='utf-8'))
            settings, training = about['run'], about['training']
            data = settings['data'] and Path(settings['data']).name  # a path tells about the machine, and not the model
            about = {**settings, **training, 'data': data or about['corpus'], 'sha256': about['sha256']}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{run / "run.json"} does not tell how a run was made: {error!r}') from error
    lines = read_metrics(run / 'metrics.jsonl') if about else []
    results = {'steps': max(line['step'] for line in lines)} if lines else {}
    for line in lines:
        scores = line.get('valid')
        for what, value in scores.items() if isinstance(scores, dict) else ():
            results[f'bits per byte of the validation, state {what}'] = value
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        '---\nlibrary_name: segment-recurrence-pytorch\ntags:\n- model_hub_mixin\n- pytorch_model_hub_mixin\n---\n',
        f'# {name}\n',
        f'A segment-recurrent transformer: it reads a text of any length segment by segment, and carries a state from '
        f'each segment to the next. It has {parameters:,} parameters.\n',
        f"```python\nfrom {place} import {name}\n\nmodel = {name}.from_pretrained('NAME')\n```\n",
        *_table('Arguments', arguments),
        *_table('Training', about),
        *_table('Results', results),
    ]
    return '\n'.join(parts)


def _table(title: str, values: dict[str, Any]) -> list[str]:
    if not values:
        return []
    rows = [f'| {name} | {f"{value:.4g}" if isinstance(value, float) else value} |' for name, value in values.items()]
    return [f'## {title}\n', '\n'.join(['| | |', '|---|---|', *rows]) + '\n']
