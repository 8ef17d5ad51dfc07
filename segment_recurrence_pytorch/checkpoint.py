"""Saves and loads weights, training states and cursors.

A file is written under another name, synced to the disk, and then moved to its place, so a file is never half written,
even if the machine loses power. It says which model made it, and can only be loaded into such a model. The folder of a
whole training run is in `run_folder`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from segment_recurrence_pytorch.checks import check_faults, check_has_weights
from segment_recurrence_pytorch.cursor import Cursor
from segment_recurrence_pytorch.model import SegmentModel, class_name, digest_of_weights, plain_arguments, whole
from segment_recurrence_pytorch.state import from_list, leaves, to_list

OTHERS_SAMPLE = 4096  # values of each weight that tell whether trained weights stand beside the same frozen ones


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to. If the `with` block ends without an error, that file replaces `path`.

    A link stays a link: the file that it points to is replaced. What is replaced keeps its permissions.

    Args:
        path: the file to write or to replace.

    Yields:
        The temporary path, in the same folder.

    Raises:
        ValueError: if the folder of `path` does not exist, if `path` is a folder itself or a device, or if its name is
            not UTF-8.
        OSError: if the file cannot be written, for example because the disk is full. `path` then stays as it was.
    """
    path = Path(path)
    check_name(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f'{path} cannot be written: it is a folder, give the name of a file in it')
    if path.exists() and not path.is_file():
        raise ValueError(f'{path} cannot be written: it is no ordinary file, and would be replaced by one')
    if not path.parent.is_dir():
        raise ValueError(f'{path} cannot be written: the folder {path.parent} is not there, make it first')
    # a name of its own for each thread and machine that may write the same file
    part = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.part')
    try:
        part.touch()
        # what stands there has, or what the umask makes of a new file: safetensors makes files for their owner alone
        mode = (path if path.exists() else part).stat().st_mode
        yield part
        part.chmod(mode)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except SafetensorError as error:
        raise OSError(f'{path} cannot be written: {error}') from error
    finally:
        part.unlink(missing_ok=True)


def check_name(path: Path) -> None:
    """Raises ValueError if a path is not UTF-8: safetensors would write such a file, and not read it again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors='backslashreplace').decode()
        raise ValueError(f'{shown} cannot be written: its name is not UTF-8, give another one') from None


def sync(path: str | Path) -> None:
    """Waits until the content of a file, or the list of the files in a folder, is on the disk.

    Args:
        path: the file or folder.

    Raises:
        OSError: if it cannot be written.
    """
    if os.name == 'nt':  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def save_weights(model: nn.Module, path: str | Path, *, trained_only: bool = False) -> None:
    """Writes a model's weights as safetensors.

    If the model is a `SegmentModel` or a wrapper of one, the file also holds the name of its class and its arguments.

    If the parameters are sharded (`distributed.shard`), they are gathered one after the other. All ranks have to make
    the call. The first rank writes the file, which is that of a model that is not sharded; the others do not wait.

    Args:
        model: the model.
        path: the file to write.
        trained_only: whether to write only the parameters that are trained (requires_grad=True), for example memory
            tokens, gates and adapters of a model whose other weights are frozen, with the buffers of their modules. The
            file then also holds the sha256 of the names, shapes and some values of the other weights, beside which it
            can be loaded again. Default: False.

    Raises:
        ValueError: if the folder does not exist, if the model is on the meta device, if no parameter is trained, or if
            a weight has a dtype that safetensors lacks, such as complex128.
        OSError: if the file cannot be written, for example because the disk is full. `path` then stays as it was.
    """
    check_has_weights(model)
    made_by, mesh = _made_by(model), _mesh_of(model)
    metadata = {} if made_by is None else {'model': json.dumps(made_by)}
    own = model.state_dict(keep_vars=True)
    written = own
    if trained_only:
        written = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not written:
            raise ValueError('trained_only=True, but every parameter is frozen: unfreeze one, or leave it out')
        # what a module counts in training, as BatchNorm does
        trained = {name.rpartition('.')[0] for name in written}
        buffers = dict(model.named_buffers())
        written |= {name: own[name] for name in buffers.keys() & own if name.rpartition('.')[0] in trained}
        metadata['others'] = _digest_of_others(own, set(written))
    elif mesh is None:
        with replacing(path) as part:
            try:
                save_model(model, str(part), metadata=metadata or None)
            except KeyError as error:
                raise ValueError(f'a weight is {error}, which safetensors cannot store: keep its real parts') from error
        return
    is_first = mesh is None or not any(mesh.get_coordinate() or ())
    weights: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in sorted(written.items()):
        kept = names.setdefault(id(tensor), name)
        if kept != name:  # tied weights are stored once, as `save_model` does
            metadata[name] = kept
            continue
        gathered = whole(tensor.detach())
        if is_first:
            weights[name] = gathered.cpu().contiguous()
    if is_first:
        with replacing(path) as part:
            save_file(weights, str(part), metadata=metadata)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads the weights that `save_weights` wrote.

    A file that does not say which model made it is accepted if the names and shapes of its weights fit.

    Args:
        model: the model that gets the weights.
        path: the file.

    Raises:
        ValueError: if the file is damaged, or was made by a model of another class, of other shapes or with other
            arguments (but for `SegmentModel.free_arguments`), if it holds only trained weights and the model's other
            weights are not those that stood beside them, or if the parameters are sharded. The model then keeps the
            weights that it had.
    """
    if _mesh_of(model) is not None:
        raise ValueError('the parameters of the model are sharded: load the weights first, then call `shard`')
    name, own = type(model).__name__, model.state_dict(keep_vars=True)
    if next(iter(own.values()), torch.empty(0)).is_meta:
        raise ValueError('the model is on the meta device, which holds no weights: call to_empty(device=...) first')
    try:
        with safe_open(str(path), framework='pt') as file:
            metadata = file.metadata() or {}
            _check_made_by_model(path, json.loads(metadata.get('model', 'null')), model)
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  no mapping
            _check_names(path, name, shapes, own, partial='others' in metadata)
            if metadata.get('others', '') not in ('', _digest_of_others(own, set(shapes))):
                raise ValueError(
                    f'{path} holds trained weights alone, and was made beside other frozen weights than this {name} '
                    'has: load them into a model with the same frozen weights, in the same dtype'
                )
            model.load_state_dict({key: file.get_tensor(key) for key in shapes}, strict=False)
    except (RuntimeError, SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} does not hold the weights of this {name}: {error}') from error


def _check_names(
    path: str | Path, name: str, shapes: dict[str, tuple[int, ...]], own: dict[str, Tensor], partial: bool
) -> None:
    """Raises ValueError unless a file holds the weights of a model, by their names and shapes.

    Args:
        path: the file, for the message.
        name: the name of the model's class, for the message.
        shapes: the shapes of the tensors in the file.
        own: the weights of the model.
        partial: whether weights may be missing.
    """
    faults = [f'it also holds {key}' for key in shapes if key not in own]
    held = {own[key].data_ptr() for key in shapes if key in own}  # a tied weight is in the file under one of its names
    if not partial:
        faults += [f'{key} is missing' for key in own if key not in shapes and own[key].data_ptr() not in held]
    faults += [
        f'{key} has shape {shape}, not {tuple(own[key].shape)}'
        for key, shape in shapes.items()
        if key in own and tuple(own[key].shape) != shape
    ]
    if faults:
        more = f', and {len(faults) - 3} more' if len(faults) > 3 else ''
        raise ValueError(f'{path} does not hold the weights of this {name}: {", ".join(faults[:3])}{more}')


def _digest_of_others(own: dict[str, Tensor], names: set[str]) -> str:
    """Returns the sha256 of a sample of the weights of a model that a file does not hold, without other names of those
    that it holds.

    Args:
        own: the weights of the model, as `state_dict(keep_vars=True)` returns them.
        names: the names of the weights in the file.
    """
    held = {id(own[name]) for name in names}
    others = {name: tensor for name, tensor in own.items() if id(tensor) not in held}
    return digest_of_weights(others, OTHERS_SAMPLE)


def save_cursor(cursor: Cursor, path: str | Path, model: SegmentModel) -> None:
    """Writes a cursor as safetensors, with the fingerprint of the model that read its text and the sha256 of its own
    tensors.

    Args:
        cursor: the cursor.
        path: the file to write.
        model: the model that read the text.

    Raises:
        ValueError: if the cursor does not fit the model, or if the folder does not exist.
        OSError: if the file cannot be written, for example because the disk is full. `path` then stays as it was.
    """
    _check_model(model)
    cursor = _checked(cursor, model)
    parts = {str(i): part for i, part in enumerate(to_list(cursor)) if part is not None}
    # safetensors has no complex numbers of float64
    parts = {name: torch.view_as_real(part) if part.is_complex() else part for name, part in parts.items()}
    # copies, since safetensors refuses tensors that share memory, as two layers of one state may
    parts = {name: part.detach().cpu().clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    metadata = {'fingerprint': json.dumps(model.fingerprint()), 'sha256': digest_of_weights(parts)}
    with replacing(path) as part_path:
        save_file(parts, str(part_path), metadata=metadata)


def load_cursor(path: str | Path, model: SegmentModel) -> Cursor:
    """Returns the cursor that `save_cursor` wrote, on the device of the model.

    Args:
        path: the file.
        model: the model that will go on from the cursor.

    Raises:
        ValueError: if the file is damaged, or was made by a model of another class, with other arguments (but for
            `SegmentModel.free_arguments`) or with other weights.
    """
    _check_model(model)
    try:
        with safe_open(str(path), framework='pt') as file:
            saved, digest = json.loads(file.metadata()['fingerprint']), file.metadata().get('sha256')
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        parts = {int(name): part.to(model.device) for name, part in named.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no cursor: {error}') from error
    now = model.fingerprint()
    check_made_by(path, saved, now, model)
    if saved.get('sha256') != now['sha256']:
        raise ValueError(f'{path} was made with other weights than this model has: read the text again')
    if digest is not None and digest_of_weights(named) != digest:  # files of earlier versions have none
        raise ValueError(f'{path} is damaged: its tensors do not have the sha256 that it says')
    like = Cursor(model.initial_state(1), torch.empty(0), torch.empty(0))
    needed = to_list(like)
    for i, part in enumerate(needed):
        if i in parts and part is not None and part.is_complex() and parts[i].shape[-1:] == (2,):
            parts[i] = torch.view_as_complex(parts[i])
    if any(part is not None and i not in parts for i, part in enumerate(needed)):
        raise ValueError(f'{path} holds no cursor: parts are missing')
    try:
        return _checked(from_list([parts.get(i) for i in range(len(needed))], like), model)
    except ValueError as error:
        raise ValueError(f'{path} holds no cursor of this model: {error}') from error


def check_made_by(path: str | Path, saved: Any, now: dict[str, Any], model: SegmentModel | None = None) -> None:
    """Raises ValueError if a file was made by a model of another class, or with other arguments.

    Args:
        path: the file.
        saved: what the file says of the model that made it: its class and its arguments.
        now: the class and the arguments of the present model.
        model: the present model, which converts the arguments of files of earlier versions (`as_arguments`), and says
            which of them may differ (`free_arguments`). Default: None, they are compared as they are.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get('arguments'), dict) or 'class' not in saved:
        raise ValueError(f'{path} does not say which model made it: its fingerprint is {str(saved)[:80]}')
    if saved['class'] != now['class']:
        raise ValueError(f'{path} was made by a {saved["class"]}, not {now["class"]}: load it into such a model')
    theirs = saved['arguments'] if model is None else model.as_arguments(saved['arguments'])
    theirs, ours = _entries(theirs), _entries(now['arguments'])
    free = frozenset() if model is None else model.free_arguments
    for name in sorted((set(theirs) | set(ours)) - free):
        have, want = theirs.get(name), ours.get(name)
        if have != want:
            raise ValueError(f'{path} was made with {name}={have!r}, this model has {want!r}')


def _entries(arguments: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns arguments with the entries of dicts inside them as arguments of their own, with names like a.b."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        inner = isinstance(value, dict) and value
        found |= _entries(value, f'{prefix}{name}.') if inner else {f'{prefix}{name}': value}
    return found


def _segment_model(module: nn.Module) -> SegmentModel | None:
    """Returns the `SegmentModel` that a module is, or that it wraps. None if there is none."""
    model = module if isinstance(module, SegmentModel) else getattr(module, 'model', None)
    return model if isinstance(model, SegmentModel) else None


def _mesh_of(module: nn.Module) -> Any:
    """Returns the ranks over which the parameters of a model, or of a wrapper of one, are sharded. None: they are
    not."""
    model = _segment_model(module)
    return None if model is None else model.mesh


def _made_by(module: nn.Module) -> dict[str, Any] | None:
    """Returns what a file of weights says about its model. None if the module is neither a `SegmentModel` nor a wrapper
    of one."""
    model = _segment_model(module)
    return None if model is None else {'class': class_name(model), 'arguments': plain_arguments(model)}


def _check_made_by_model(path: str | Path, saved: Any, module: nn.Module) -> None:
    """Raises ValueError if a file of weights says that another model made it."""
    model, now = _segment_model(module), _made_by(module)
    if saved is not None and model is not None and now is not None:
        check_made_by(path, saved, now, model)


def _check_model(model: Any) -> None:
    """Raises ValueError if the object is not a `SegmentModel`, or if it has no weights."""
    if not isinstance(model, SegmentModel):
        raise ValueError(f'the model is a {type(model).__name__}: give a SegmentModel; a wrapper has it as .model')
    check_has_weights(model)


def _checked(cursor: Cursor, model: SegmentModel) -> Cursor:
    """Returns the cursor with its state in the form that the model takes. Raises ValueError if it does not fit the
    model."""
    if not isinstance(cursor, Cursor):
        raise ValueError(f'the cursor is a {type(cursor).__name__}: give what `read`, `generate` or a stream returned')
    tokens, lengths = cursor.tokens, cursor.lengths
    for name, tensor, dimensions in (('tokens', tokens, 2), ('lengths', lengths, 1)):
        if not isinstance(tensor, Tensor) or tensor.ndim != dimensions or tensor.dtype != torch.long:
            found = f'{tensor.dtype} of shape {tuple(tensor.shape)}' if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f'the {name} of the cursor are {found}: they must be int64 with {dimensions} dimensions')
    rows, width = tokens.shape
    if len(lengths) != rows:
        raise ValueError(f'the cursor has {len(lengths)} lengths for {rows} rows of tokens')
    state = model.initial_state(rows) if cursor.state is None else model.as_state(cursor.state, rows)
    model.check_state(state, rows)
    valid = torch.arange(width, device=lengths.device) < lengths[:, None]
    check_faults(
        [
            (f'a length of the cursor is outside [0, {width}]', ((lengths < 0) | (lengths > width)).any()),
            (
                f'a token of the cursor is outside [0, {model.num_tokens})',
                (((tokens < 0) | (tokens >= model.num_tokens)) & valid).any(),
            ),
            *(model.state_faults(state) if leaves(state) else []),
        ]
    )
    return cursor._replace(state=state)


def save_training_state(state: dict[str, Any], path: str | Path) -> None:
    """Writes what a training run needs to go on, such as optimizer state, counters, random states and positions in the
    data.

    Args:
        state: a dict of tensors and plain values. Give the state of a model as the list that `state.to_list` makes.
        path: the file to write.

    Raises:
        ValueError: if the folder does not exist, or if it holds what `load_training_state` could not read.
        OSError: if the file cannot be written, for example because the disk is full. `path` then stays as it was.
    """
    with replacing(path) as part:
        try:
            with open(part, 'wb') as file:
                torch.save(state, file)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ValueError(f'the training state cannot be written, give tensors and plain values: {error}') from error
        except RuntimeError as error:  # torch's writer meets a full disk twice: the first error is the reason
            raise OSError(f'{path} cannot be written: {error.__context__ or error}') from error
        try:
            torch.load(part, map_location='cpu', weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                'the training state holds an object that loading refuses, since it might run code: give tensors and '
                f'plain values, and the state of a model by `state.to_list` ({_refused(error)})'
            ) from error


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Returns what `save_training_state` wrote, on the CPU.

    Args:
        path: the file.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # the unpickler can raise any error for a file of another kind
        raise ValueError(f'{path} is no training state that can be resumed: {_refused(error)}') from error


def _refused(error: Exception) -> str:
    """Returns what an error of loading says, without PyTorch's advice to load whatever a file may hold."""
    if name := re.search(r'GLOBAL ([\w.]+)', str(error)):
        return f'it holds a {name[1]}'
    return 'it is no file of tensors and plain values' if 'weights' in str(error).lower() else str(error)
