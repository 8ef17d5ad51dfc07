"""Corpora and streams: what is read, in which order, and what is refused."""

import bz2
import gzip
import hashlib
import http.server
import lzma
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


PACKERS = {'gz': gzip.compress, 'xz': lzma.compress, 'bz2': bz2.compress}


@pytest.mark.parametrize('ending', PACKERS)
@pytest.mark.parametrize('spelled', [str.lower, str.upper, str.title])
def test_a_packed_file_is_unpacked_however_its_ending_is_spelled(ending, spelled, tmp_path):
    path = tmp_path / f'text.{spelled(ending)}'
    packed = PACKERS[ending](TEXT)
    path.write_bytes(packed)
    assert read_bytes(path) == TEXT
    for damaged in (packed[:-10], packed[:20], b'not packed', b''):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'is cut short or damaged|cannot be read: Invalid data|is empty'):
            read_bytes(path)


@pytest.mark.parametrize('ending', ['.zst', '.7z', '.tgz', '.TAR', '.lzma', '.tar.gz', '.TAR.bz2', '.tar.unknown'])
def test_what_cannot_be_unpacked_is_not_read_as_text(ending, tmp_path):
    path = tmp_path / f'text{ending}'
    path.write_bytes(TEXT)
    with pytest.raises(ValueError, match=rf'is packed as {ending.lower()}: unpack it, or pack it as \.gz, \.bz2'):
        load_corpus(path)


def test_damaged_files_are_refused(tmp_path):
    whole = gzip.compress(torch.randint(0, 256, (4096,), dtype=torch.uint8).numpy().tobytes())
    (tmp_path / 'short.gz').write_bytes(whole[:-100])
    (tmp_path / 'wrong.gz').write_bytes(b'no gzip')
    (tmp_path / 'wrong.zip').write_bytes(b'no zip')
    (tmp_path / 'empty').write_bytes(b'')
    with zipfile.ZipFile(tmp_path / 'two.zip', 'w') as archive:
        archive.writestr('a', TEXT)
        archive.writestr('b', TEXT)
    with zipfile.ZipFile(tmp_path / 'locked.zip', 'w') as archive:
        archive.writestr('a', TEXT)
    locked = bytearray((tmp_path / 'locked.zip').read_bytes())
    for record, flags in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        locked[locked.index(record) + flags] |= 1  # encrypted
    (tmp_path / 'locked.zip').write_bytes(locked)
    for name, message in {
        'short.gz': 'cut short',
        'wrong.gz': 'damaged',
        'wrong.zip': 'damaged',
        'empty': 'is empty',
        'two.zip': 'holds 2 files',
        'locked.zip': 'cannot be unpacked .* encrypted',
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
        zipfile.ZipFile(archive.with_name('empty.zip'), 'w').close()
        with pytest.raises(ValueError, match=r'did not send a \.zip with a file'):
            download_enwik8(tmp_path / 'data', url.replace('enwik8', 'empty'), 'another')
        assert not list((tmp_path / 'data').iterdir())
        whole = archive.read_bytes()
        with zipfile.ZipFile(archive.with_name('damaged.zip'), 'w', zipfile.ZIP_DEFLATED) as file:
            file.writestr('enwik8', TEXT)
        damaged = bytearray(archive.with_name('damaged.zip').read_bytes())
        damaged[40:60] = bytes(255 - byte for byte in damaged[40:60])
        archive.with_name('damaged.zip').write_bytes(damaged)
        with pytest.raises(ValueError, match=r'did not send a \.zip with a file'):
            download_enwik8(tmp_path / 'data', url.replace('enwik8', 'damaged'), 'another')
        assert not list((tmp_path / 'data').iterdir())
        assert archive.read_bytes() == whole
        (tmp_path / 'data' / 'enwik8').mkdir()  # a folder of this name is not the file
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


DOCUMENTS = [torch.arange(30, dtype=torch.uint8), torch.arange(30, 41, dtype=torch.uint8)]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'batch_size': 0}, 'batch_size is 0: give a whole number from 1 on'),
        ({'batch_size': -1}, 'batch_size is -1: give a whole number from 1 on'),
        ({'batch_size': 1.5}, r'batch_size is 1\.5: give a whole number from 1 on'),
        ({'length': 0}, 'length is 0: give a whole number from 1 on'),
        ({'length': -1}, 'length is -1: give a whole number from 1 on'),
        ({'length': 'x'}, "length is 'x': give a whole number from 1 on"),
        ({'documents': []}, '0 tokens are less than one batch of 2 x 5'),
        ({'documents': [DOCUMENTS[0].float()]}, r'a document is tensor\(.* give tensors \(n,\) of bytes or token ids'),
        ({'documents': [DOCUMENTS[0].view(3, 10)]}, r'a document is tensor\(.* give tensors'),
        ({'documents': [torch.tensor([3, -100, 5] * 9)]}, 'a document holds the id -100: give token ids from 0 on'),
        ({'documents': ['a text']}, r'a document is a text: give tensors \(n,\) of bytes or token ids'),
        ({'documents': [DOCUMENTS[0][:1]] * 50}, '50 documents of one token or none: there is nothing to predict'),
    ],
)
def test_streams_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        Streams(**{'documents': DOCUMENTS, 'batch_size': 2, 'length': 4, **options}, loop=True)


@pytest.mark.parametrize('dtype', [torch.int16, torch.int32, torch.int64, torch.uint16])
def test_streams_of_token_ids_are_those_of_bytes(dtype):
    want = list(Streams(DOCUMENTS, 2, 4, loop=False))
    found = list(Streams([document.to(dtype) for document in DOCUMENTS], 2, 4, loop=False))
    assert len(found) == len(want)
    assert all(torch.equal(a, b) for pair in zip(found, want, strict=True) for a, b in zip(*pair, strict=True))
    large = next(Streams([torch.tensor([7, 30_000, 2] * 4, dtype=dtype)], 1, 4, loop=False))
    assert large.tokens.tolist() == [[7, 30_000, 2, 7, 30_000]]


@pytest.mark.parametrize(
    'state',
    [
        {}, {'position': 3}, {'position': [(0, 0)]}, {'position': [(0, 0), (0, 0), (0, 0)]},
        {'position': [(0, 0), (5, 0)]}, {'position': [(0, 400), (0, 0)]}, {'position': [(0, -4), (0, 0)]},
        {'position': [(0, 1.5), (0, 0)]}, {'position': [('a', 0), (0, 0)]}, {'position': [(0,), (0,)]}, 3, None,
    ],
)  # fmt: skip
def test_streams_do_not_go_on_from_a_state_of_other_streams(state):
    streams = Streams(DOCUMENTS, 2, 4, loop=True)
    next(streams)
    before = streams.state_dict()
    with pytest.raises(ValueError, match='is no state of these streams: it is of other documents or rows'):
        streams.load_state_dict(state)
    assert streams.state_dict() == before


def test_every_place_in_streams_is_one_to_go_on_from():
    for loop in (False, True):
        streams, again = (Streams(DOCUMENTS, 3, 4, loop=loop) for _ in range(2))
        for _ in range(12):
            again.load_state_dict(streams.state_dict())
            piece, same = next(streams, None), next(again, None)
            assert (piece is None) == (same is None)
            assert piece is None or all(map(torch.equal, piece, same))


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
