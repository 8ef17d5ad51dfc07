"""Bytes to train on: enwik8 where there is one, else the Python standard library's own source, which is always there.

Documents stay whole: a stream reads them in order, and tells where a text starts, so that a state is carried
through a document and never across its end.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import sysconfig
import urllib.request
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from segment_recurrence_pytorch.checkpoint import replacing
from segment_recurrence_pytorch.loss import IGNORE

ENWIK8_URL = 'http://mattmahoney.net/dc/enwik8.zip'
ENWIK8_SHA1 = '57b8363b814821dc9d47aa4d41f58733519076b2'  # of the 100,000,000 bytes inside
# generated tables, a tenth of the bytes and little to learn
LEFT_OUT_FOLDERS = {'encodings', 'site-packages', 'test', 'tests', 'idle_test', '__pycache__'}


class Corpus(NamedTuple):
    """Documents (uint8, 1-D) for training, validation and test; sha256 of all of them in order."""

    name: str
    sha256: str
    train: list[Tensor]
    valid: list[Tensor]
    test: list[Tensor]


def load_corpus(path: str | Path | None = None, *, folder: str | Path = 'data', download: bool = False) -> Corpus:
    """The file at `path` (raw, .gz or .zip), else enwik8 in `folder`, else (download=True) enwik8 from its home,
    else Python's standard library. One file is split 90 / 5 / 5 by position, many files by a hash of their names.
    ValueError for a file that is missing, empty or damaged."""
    if path is not None:
        return _split_file(read_bytes(path), str(path))
    for name in ('enwik8', 'enwik8.gz', 'enwik8.zip'):
        if (Path(folder) / name).exists():
            return _split_file(read_bytes(Path(folder) / name), f'enwik8 ({Path(folder) / name})')
    if download:
        return _split_file(download_enwik8(folder), 'enwik8 (downloaded)')
    return python_source()


def read_bytes(path: str | Path) -> bytes:
    """The content of a raw, .gz or .zip (one member) file. ValueError if there is none, or it is damaged."""
    path = Path(path)
    try:
        if path.suffix == '.gz':
            content = gzip.decompress(path.read_bytes())
        elif path.suffix == '.zip':
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) != 1:
                    raise ValueError(f'{path} holds {len(members)} files: give a .zip with one')
                content = archive.read(members[0])
        else:
            content = path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f'{path} is cut short or damaged ({error}): fetch it again') from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror or error}') from error
    if not content:
        raise ValueError(f'{path} is empty')
    return content


def download_enwik8(folder: str | Path, url: str = ENWIK8_URL, sha1: str = ENWIK8_SHA1) -> bytes:
    """Fetches enwik8.zip into `folder` with a progress bar; kept only if its checksum is right."""
    target = Path(folder) / 'enwik8.zip'
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'{folder} cannot be made ({error.strerror})') from error
    with replacing(target) as part:
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, open(part, 'wb') as file:
                total = int(reply.headers.get('Content-Length') or 0) or None
                with tqdm(total=total, unit='B', unit_scale=True, desc='enwik8', disable=None) as bar:
                    while block := reply.read(1 << 20):
                        bar.update(file.write(block))
        except OSError as error:
            raise ValueError(f'{url} cannot be fetched ({error}): put enwik8 into {folder}/, or use --data') from error
        try:
            with zipfile.ZipFile(part) as archive:
                content = archive.read(archive.namelist()[0])
        except zipfile.BadZipFile as error:
            raise ValueError(f'{url} did not send a .zip ({error}): not kept') from error
        found = hashlib.sha1(content).hexdigest()
        if found != sha1:
            raise ValueError(f'{url} has sha1 {found}, not {sha1}: not kept')
    return content


def python_source(root: str | Path | None = None) -> Corpus:
    """The .py files of Python's standard library, without tests and encoding tables; about 12 MB."""
    top = Path(root or sysconfig.get_paths()['stdlib'])
    parts: dict[str, list[bytes]] = {'train': [], 'valid': [], 'test': []}
    digest = hashlib.sha256()
    for base, folders, files in os.walk(top):
        folders[:] = sorted(set(folders) - LEFT_OUT_FOLDERS)
        for name in sorted(file for file in files if file.endswith('.py')):
            file = Path(base) / name
            relative = file.relative_to(top).as_posix()
            content = file.read_bytes()
            digest.update(content)
            share = int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 100
            parts['train' if share < 90 else 'valid' if share < 95 else 'test'].append(content)
    documents = {part: [_as_tensor(content) for content in contents if content] for part, contents in parts.items()}
    if not all(documents.values()):
        raise ValueError(f'{top} holds too few .py files to split: give a corpus with --data')
    return Corpus(f'the standard library of Python {platform.python_version()}', digest.hexdigest(), **documents)


def _split_file(content: bytes, name: str) -> Corpus:
    first, second = int(len(content) * 0.90), int(len(content) * 0.95)
    pieces = content[:first], content[first:second], content[second:]
    if not all(pieces):
        raise ValueError(f'{name} has {len(content)} bytes: too few to split into training, validation and test')
    train, valid, test = ([_as_tensor(piece)] for piece in pieces)
    return Corpus(name, hashlib.sha256(content).hexdigest(), train, valid, test)


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class Piece(NamedTuple):
    """tokens (b, length + 1) int64, IGNORE where a row has no more text; starts (b,): a new text begins here."""

    tokens: Tensor
    starts: Tensor


class Streams:
    """`batch_size` rows that each read their share of the documents in order, `length` tokens a step.

    The last token of a piece is the first of the next: it is a target, then an input. The documents, one behind
    the other, are cut into equal shares, one a row. loop=False: a row that is at its end yields only IGNORE, and
    iteration stops when all rows are.
    """

    def __init__(self, documents: list[Tensor], batch_size: int, length: int, *, loop: bool):
        total = sum(len(document) for document in documents)
        if total < batch_size * (length + 1):
            raise ValueError(
                f'{total} bytes are less than one batch of {batch_size} x {length + 1}: '
                'give a larger corpus, or a smaller batch'
            )
        self.length, self.loop = length, loop
        borders = [total * row // batch_size for row in range(batch_size + 1)]
        self.rows = [_share(documents, start, stop) for start, stop in pairwise(borders)]
        self.position = [(0, 0)] * batch_size  # fragment of the row, offset in it

    def __iter__(self) -> Streams:
        return self

    def __next__(self) -> Piece:
        if not self.loop and all(index == len(row) for row, (index, _) in zip(self.rows, self.position, strict=True)):
            raise StopIteration
        tokens = torch.full((len(self.rows), self.length + 1), IGNORE, dtype=torch.long)
        starts = torch.zeros(len(self.rows), dtype=torch.bool)
        for i, (row, (index, offset)) in enumerate(zip(self.rows, self.position, strict=True)):
            if index == len(row):
                continue
            text = row[index][offset : offset + self.length + 1]
            tokens[i, : len(text)] = text
            starts[i] = offset == 0
            offset += self.length
            if offset + 1 >= len(row[index]):
                index, offset = index + 1, 0
                if index == len(row) and self.loop:
                    index = 0
            self.position[i] = (index, offset)
        return Piece(tokens, starts)

    def state_dict(self) -> dict[str, Any]:
        """Where each row is."""
        return {'position': list(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken, on the same documents and batch size."""
        self.position = [tuple(position) for position in state['position']]


def _share(documents: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """The fragments of documents between two positions in their concatenation; those with something to predict."""
    fragments, begin = [], 0
    for document in documents:
        piece = document[max(0, start - begin) : max(0, stop - begin)]
        if len(piece) > 1:
            fragments.append(piece)
        begin += len(document)
    return fragments


def baselines(train: list[Tensor], valid: list[Tensor]) -> dict[str, float]:
    """Bits per byte of the validation bytes: with the byte frequencies of the training bytes (unigram), and
    compressed by zlib and xz on their own."""
    counts = torch.stack([torch.bincount(document, minlength=256) for document in train]).sum(0) + 1
    bits = -(counts.double() / counts.sum()).log2()
    content = torch.cat(valid)
    raw = content.numpy().tobytes()
    return {
        'unigram': bits[content.long()].mean().item(),
        'zlib': 8 * len(zlib.compress(raw, 9)) / len(raw),
        'xz': 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
