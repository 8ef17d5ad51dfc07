"""Corpora and streams: what is read, in which order, and what is refused."""

import gzip
import hashlib
import http.server
import threading
import zipfile

import pytest
import torch

from segment_recurrence_pytorch.data import (
    Streams,
    baselines,
    download_enwik8,
    load_corpus,
    python_source,
    read_bytes,
)
from segment_recurrence_pytorch.loss import IGNORE

TEXT = bytes(range(256)) * 8


def test_raw_gz_and_zip_hold_the_same_bytes(tmp_path):
    (tmp_path / 'raw').write_bytes(TEXT)
    (tmp_path / 'text.gz').write_bytes(gzip.compress(TEXT))
    with zipfile.ZipFile(tmp_path / 'text.zip', 'w') as archive:
        archive.writestr('text', TEXT)
    for name in ('raw', 'text.gz', 'text.zip'):
        corpus = load_corpus(tmp_path / name)
        assert corpus.sha256 == hashlib.sha256(TEXT).hexdigest()
        parts = corpus.train + corpus.valid + corpus.test
        assert bytes(torch.cat(parts).tolist()) == TEXT
        assert [len(part) for part in parts] == [1843, 102, 103]


def test_damaged_files_are_refused(tmp_path):
    whole = gzip.compress(torch.randint(0, 256, (4096,), dtype=torch.uint8).numpy().tobytes())
    (tmp_path / 'short.gz').write_bytes(whole[:-100])
    (tmp_path / 'wrong.gz').write_bytes(b'no gzip')
    (tmp_path / 'wrong.zip').write_bytes(b'no zip')
    (tmp_path / 'empty').write_bytes(b'')
    with zipfile.ZipFile(tmp_path / 'two.zip', 'w') as archive:
        archive.writestr('a', TEXT)
        archive.writestr('b', TEXT)
    for name, message in {
        'short.gz': 'cut short',
        'wrong.gz': 'damaged',
        'wrong.zip': 'damaged',
        'empty': 'is empty',
        'two.zip': 'holds 2 files',
        'absent': 'cannot be read',
    }.items():
        with pytest.raises(ValueError, match=message):
            read_bytes(tmp_path / name)
    (tmp_path / 'tiny').write_bytes(b'abc')
    with pytest.raises(ValueError, match='too few'):
        load_corpus(tmp_path / 'tiny')
    with pytest.raises(ValueError, match='less than one batch of 4 x 101'):
        Streams([torch.zeros(400, dtype=torch.uint8)], 4, 100, loop=True)


def test_enwik8_is_found_and_a_download_is_checked(tmp_path):
    archive = tmp_path / 'served' / 'enwik8.zip'
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr('enwik8', TEXT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(archive.parent))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/enwik8.zip'
        with pytest.raises(ValueError, match='not kept'):
            download_enwik8(tmp_path / 'data', url, 'another')
        assert not list((tmp_path / 'data').iterdir())
        with pytest.raises(ValueError, match='cannot be fetched'):
            download_enwik8(tmp_path / 'data', url + 'x', 'another')
        assert not list((tmp_path / 'data').iterdir())
        assert download_enwik8(tmp_path / 'data', url, hashlib.sha1(TEXT).hexdigest()) == TEXT
        server.shutdown()
    corpus = load_corpus(folder=tmp_path / 'data')
    assert 'enwik8' in corpus.name
    assert corpus.sha256 == hashlib.sha256(TEXT).hexdigest()


def test_the_standard_library_is_a_corpus():
    corpus = python_source()
    assert sum(map(len, corpus.train)) > 5_000_000
    assert corpus.sha256 == python_source().sha256
    bits = baselines(corpus.train, corpus.valid)
    assert bits['unigram'] > bits['zlib'] > bits['xz'] > 1


def test_streams_read_every_byte_in_order_and_tell_where_texts_start():
    documents = [torch.arange(length, dtype=torch.uint8) + 10 * i for i, length in enumerate((23, 2, 40, 1, 9))]
    streams = Streams(documents, 3, 5, loop=False)
    rows = [[] for _ in range(3)]  # the fragments that each row was given
    for tokens, starts in streams:
        assert tokens.shape == (3, 6)
        for row, (text, start) in enumerate(zip(tokens, starts, strict=True)):
            text = text[text != IGNORE].tolist()
            if not text:
                assert not start
                continue
            if start:
                rows[row].append(text)
            else:
                assert text[0] == rows[row][-1][-1]  # the last target is the next input
                rows[row][-1] += text[1:]
    whole = torch.cat(documents).tolist()
    # three equal shares of 75 bytes, cut at the ends of documents; a fragment of one byte has nothing to predict
    assert rows == [[whole[:23], whole[23:25]], [whole[25:50]], [whole[50:65], whole[66:75]]]


def test_streams_loop_and_go_on_where_they_were():
    documents = [torch.arange(30, dtype=torch.uint8), torch.arange(30, 41, dtype=torch.uint8)]
    streams = Streams(documents, 2, 4, loop=True)
    for _ in range(3):
        next(streams)
    saved = streams.state_dict()
    expected = [next(streams) for _ in range(20)]
    again = Streams(documents, 2, 4, loop=True)
    again.load_state_dict(saved)
    for piece in expected:
        assert all(map(torch.equal, next(again), piece))
    assert sum(bool(piece.starts[0]) for piece in expected) >= 3
