"""Bytes to train on: enwik8 if it is there, else the source of Python's standard library, which every user has.

Each row of a batch goes through its share of the documents in order, and is told where a document begins. A state can
therefore be carried through a document, and never across its end. A document that crosses the border of two shares is
cut there, and the part behind the border is read as a document of its own.

Letters: b rows of the batch, n bytes.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import http.client
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
from segment_recurrence_pytorch.checks import can_hold_ids, check_whole, is_whole
from segment_recurrence_pytorch.loss import IGNORE

ENWIK8_URL = 'http://mattmahoney.net/dc/enwik8.zip'
ENWIK8_SHA1 = '57b8363b814821dc9d47aa4d41f58733519076b2'  # of the 100,000,000 bytes in the .zip
PYTHON_SOURCE = 'the standard library of Python'  # so begins the name of this corpus
# endings of packed files, which are refused: their raw bytes are no text
PACKED = ('.7z', '.br', '.lz4', '.lzma', '.rar', '.tar', '.tbz2', '.tgz', '.txz', '.z', '.zst')
# 'encodings' holds generated tables: a tenth of the bytes, with little to learn from them
LEFT_OUT_FOLDERS = {'encodings', 'site-packages', 'test', 'tests', 'idle_test', '__pycache__'}
# what reading a packed file raises that is cut short or damaged
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error)


class Corpus(NamedTuple):
    """Bytes to train on.

    Attributes:
        name: a description for people.
        sha256: the sha256 of all bytes in order.
        train: training documents, uint8 tensors (n_i,).
        valid: validation documents, uint8 tensors (n_i,).
        test: test documents, uint8 tensors (n_i,).
    """

    name: str
    sha256: str
    train: list[Tensor]
    valid: list[Tensor]
    test: list[Tensor]


def load_corpus(path: str | Path | None = None, *, folder: str | Path = 'data', download: bool = False) -> Corpus:
    """Returns a corpus from the first of these sources that exists.

    The sources are the file `path`, enwik8 in a folder, enwik8 from its web page if download is True, and the source of
    Python's standard library. A single file is split by position into 90 % training, 5 % validation and 5 % test. The
    standard library is split in about the same shares, by a hash of the names of its files.

    Args:
        path: a file that `read_bytes` can unpack. If it is given, no other source is tried. Default: None.
        folder: a folder that may hold enwik8, enwik8.gz or enwik8.zip. Default: 'data'.
        download: whether to download enwik8 into the folder if it is not there. Default: False.

    Raises:
        ValueError: if a file is missing, empty or damaged, or if the download fails.
    """
    if path is not None:
        return _split_file(read_bytes(path), str(path))
    for name in ('enwik8', 'enwik8.gz', 'enwik8.zip'):
        if (Path(folder) / name).is_file():
            return _split_file(read_bytes(Path(folder) / name), f'enwik8 ({Path(folder) / name})')
    if download:
        return _split_file(download_enwik8(folder), 'enwik8 (downloaded)')
    return python_source()


def read_bytes(path: str | Path) -> bytes:
    """Returns the content of a file. Files whose names end in .gz, .bz2, .xz or .zip are unpacked.

    Args:
        path: the file. A .zip must hold exactly one file.

    Raises:
        ValueError: if the file is missing, empty, damaged, or packed in another way.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if path.with_suffix('').suffix.lower() == '.tar':
        ending = f'.tar{ending}'
    if ending in PACKED or ending.startswith('.tar'):
        raise ValueError(f'{path} is packed as {ending}: unpack it, or pack it as .gz, .bz2, .xz or .zip')
    try:
        if ending == '.gz':
            content = gzip.decompress(path.read_bytes())
        elif ending == '.bz2':
            with bz2.open(path) as file:  # bz2.decompress raises ValueError, not EOFError, if a file is cut short
                content = file.read()
        elif ending == '.xz':
            content = lzma.decompress(path.read_bytes())
        elif ending == '.zip':
            content = _unzipped(path)
        else:
            content = path.read_bytes()
    except RuntimeError as error:  # zipfile: encrypted, or packed in a way that it does not know
        raise ValueError(f'{path} cannot be unpacked ({error}): unpack it, or pack it anew') from error
    except DAMAGED as error:
        raise ValueError(f'{path} is cut short or damaged ({error}): remove it, and fetch it again') from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror or error}') from error
    if not content:
        raise ValueError(f'{path} is empty')
    return content


def _unzipped(path: Path) -> bytes:
    """Returns the content of the one file of a .zip."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f'{path} holds {len(members)} files: give a .zip with one')
        return archive.read(members[0])


def download_enwik8(folder: str | Path, url: str = ENWIK8_URL, sha1: str = ENWIK8_SHA1) -> bytes:
    """Downloads enwik8.zip into a folder, with a progress bar, and returns the bytes of enwik8.

    Args:
        folder: the folder. It is made if it does not exist.
        url: where to download it. Default: its official address.
        sha1: the expected sha1 of the bytes. A file with another one is not kept. Default: that of enwik8.

    Raises:
        ValueError: if the download fails, or if the file is not the expected one.
    """
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
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f'{url} cannot be fetched ({error}): put enwik8 into {folder}/, or use --data') from error
        try:
            content = _unzipped(part)
        except (ValueError, RuntimeError, *DAMAGED) as error:
            raise ValueError(f'{url} did not send a .zip with a file ({error}): not kept') from error
        found = hashlib.sha1(content).hexdigest()
        if found != sha1:
            raise ValueError(f'{url} has sha1 {found}, not {sha1}: not kept')
    return content


def python_source(root: str | Path | None = None) -> Corpus:
    """Returns the .py files of Python's standard library as a corpus, about 12 MB. Tests and encoding tables are left
    out.

    Args:
        root: another folder with .py files. Default: None, the standard library.

    Raises:
        ValueError: if there are too few files to split.
    """
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
    return Corpus(f'{PYTHON_SOURCE} {platform.python_version()}', digest.hexdigest(), **documents)


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
    """The next piece of each row's text, which `Streams` yields.

    Attributes:
        tokens: (b, length + 1) int64. The last token of a piece is the first token of the next one. A piece holds
            tokens of one document; after the end of the document it is filled up with `loss.IGNORE`.
        starts: (b,) bool, True where a document, or the part of one with which a row's share begins, begins with this
            piece.
    """

    tokens: Tensor
    starts: Tensor


def segments_as_rows(tokens: Tensor, segment_length: int) -> Tensor:
    """Returns the segments of pieces, each as a row of its own with the token after it, which is only a target,
    (b segments, segment_length + 1).

    Args:
        tokens: (b, length + 1).
        segment_length: number of tokens of a segment.

    Raises:
        ValueError: if length is not a multiple of segment_length.
    """
    if (tokens.shape[1] - 1) % segment_length:
        raise ValueError(
            f'a piece of {tokens.shape[1] - 1} tokens (and one that is only a target) has no whole number of segments '
            f'of {segment_length}, each of which becomes a text of its own: give a multiple of {segment_length}'
        )
    return tokens.unfold(1, segment_length + 1, segment_length).flatten(0, 1)


class Streams:
    """An iterator over pieces of documents: each row of a batch goes through its own share of the documents, in order.

    All documents, one after the other, are cut into shares of equal length, one for each row. A piece is one token
    longer than what the model reads of it, since its last token is only a target. The next piece starts with that
    token.

    Args:
        documents: tensors (n_i,) of bytes (uint8), or of the token ids of a tokenizer in any integer dtype.
        batch_size: number of rows b.
        length: number of tokens that the model reads of a piece.
        loop: whether a row starts again at the end of its share. If False, a row that has ended yields only
            `loss.IGNORE`, and the iterator ends when all rows have ended.

    Raises:
        ValueError: if a value is outside its range, or if there are too few tokens for one piece in each row.
    """

    def __init__(self, documents: list[Tensor], batch_size: int, length: int, *, loop: bool):
        check_whole(batch_size=batch_size, length=length)
        for document in documents:
            if not isinstance(document, Tensor) or not can_hold_ids(document.dtype) or document.ndim != 1:
                raise ValueError(f'a document is {str(document)[:80]}: give tensors (n,) of bytes or token ids')
            if document.dtype.is_signed and len(document) and document.min() < 0:
                raise ValueError(f'a document holds the id {int(document.min())}: give token ids from 0 on')
        total = sum(len(document) for document in documents)
        if total < batch_size * (length + 1):
            raise ValueError(
                f'{total} tokens are less than one batch of {batch_size} x {length + 1}: '
                'give a larger corpus, or a smaller batch'
            )
        self.length = length
        self.loop = loop
        borders = [total * row // batch_size for row in range(batch_size + 1)]
        self.rows = [_share(documents, start, stop) for start, stop in pairwise(borders)]
        if not any(self.rows):
            raise ValueError(f'{len(documents)} documents of one token or none: there is nothing to predict in them')
        self.position = [(0, 0)] * batch_size  # of each row: index of its document, offset in that document

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
        """Returns the position of each row, for `load_state_dict`."""
        return {'position': list(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to the positions that `state_dict` returned. The documents and the batch size must be the same.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if the state belongs to other documents or another batch size. The positions then stay as they
                are.
        """
        given = state.get('position') if isinstance(state, dict) else None
        position = [tuple(each) for each in given] if isinstance(given, (list, tuple)) else []
        if len(position) != len(self.rows) or not all(map(_is_place, position, self.rows)):
            raise ValueError(f'{str(state)[:80]} is no state of these streams: it is of other documents or rows')
        self.position = position


def _is_place(place: tuple[Any, ...], row: list[Tensor]) -> bool:
    """Returns whether (index of a document in the row, offset in it) is a position where a piece can begin, or the end
    of the row."""
    if len(place) != 2 or not all(is_whole(number) and number >= 0 for number in place):
        return False
    index, offset = place
    return offset + 1 < len(row[index]) if index < len(row) else (index, offset) == (len(row), 0)


def _share(documents: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """Returns one row's share of the documents, as parts of documents.

    The share goes from position `start` to `stop` of all documents put together. Parts of a single token are left out,
    since they hold nothing to predict.
    """
    fragments, begin = [], 0
    for document in documents:
        piece = document[max(0, start - begin) : max(0, stop - begin)]
        if len(piece) > 1:
            fragments.append(piece)
        begin += len(document)
    return fragments


def baselines(train: list[Tensor], valid: list[Tensor]) -> dict[str, float]:
    """Returns simple scores to compare a model with, in bits per byte of the validation bytes.

    'unigram' predicts each byte by its frequency in the training bytes. 'zlib' and 'xz' compress the validation bytes
    alone.

    Args:
        train: training documents, uint8 tensors (n_i,).
        valid: validation documents, uint8 tensors (n_i,).
    """
    counts = torch.stack([torch.bincount(document, minlength=256) for document in train]).sum(0) + 1
    bits = -(counts.double() / counts.sum()).log2()
    content = torch.cat(valid)
    raw = content.numpy().tobytes()
    return {
        'unigram': bits[content.long()].mean().item(),
        'zlib': 8 * len(zlib.compress(raw, 9)) / len(raw),
        'xz': 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
