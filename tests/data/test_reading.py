"""Files of text: gzip, other kinds of files, line ends."""

import gzip

import pytest

from vspdf.config.resolve import resolve_data
from vspdf.config.settings import DataConfig
from vspdf.data import tasks
from vspdf.data.corpora import load_documents
from vspdf.data.reading import ending, whole_text
from vspdf.errors import UserError

ROWS = b'{"context": "a", "completion": "b", "text": "one"}\n{"context": "c", "completion": "d", "text": "two"}\n'


def documents(path):
    return [text for _, text in load_documents(resolve_data(DataConfig(corpus=str(path))))]


def test_gzip_is_read_as_what_is_inside(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(ROWS))
    assert documents(path) == documents(tmp_path) == ["one", "two"]
    assert tasks.read(path) == [("a", ("b",)), ("c", ("d",))]
    path = tmp_path / "text.txt"
    path.write_bytes(gzip.compress("na\xefve\n".encode()))
    assert documents(path) == ["na\xefve\n"] and tasks.read_lines(path) == ["na\xefve"]


@pytest.mark.parametrize("name, expected", [("a.TXT", ".txt"), ("a.jsonl.gz", ".jsonl"), (".gz", ""), ("a.gz", "")])
def test_the_ending_is_that_of_what_is_inside(tmp_path, name, expected):
    assert ending(tmp_path / name) == expected


OTHERS = {
    "zstd": (b"\x28\xb5\x2f\xfd rest", "is zstd: unpack it with `zstd -d`, or use gzip"),
    "bzip2": (b"BZh91AY", "is bzip2: unpack it with `bunzip2`"),
    "xz": (b"\xfd7zXZ\0", "is xz: unpack it with `unxz`"),
    "zip": (b"PK\x03\x04", "is a ZIP archive: unpack it"),
    "Parquet": (b"PAR1", "is Parquet: write its rows as JSONL"),
    "UTF-16": ("a".encode("utf-16"), "is UTF-16, not UTF-8: save it as UTF-8"),
    "UTF-32": ("a".encode("utf-32"), "is UTF-32, not UTF-8: save it as UTF-8"),
    "half a gzip file": (gzip.compress(ROWS)[:-9], "is no whole gzip file"),
    "a bent gzip file": (gzip.compress(ROWS)[:20] + b"xxx" + gzip.compress(ROWS)[23:], "is no whole gzip file"),
    "zeros without end": (gzip.compress(bytes(70 << 20)), "unpacks to more than 200 times its .* bytes: refused"),
}


@pytest.mark.parametrize("content, message", OTHERS.values(), ids=OTHERS)
def test_what_is_no_text_is_said_to_be(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for read in (documents, tasks.read, tasks.read_lines):
        with pytest.raises(UserError, match=message):
            read(path)


def test_a_text_that_begins_as_bzip2_would_is_a_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("BZhang wrote this.\n")
    assert tasks.read_lines(path) == ["BZhang wrote this."]


def test_a_bare_cr_ends_lines_where_nothing_else_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS.replace(b"\n", b"\r"))
    assert documents(path) == ["one", "two"]
    assert tasks.read(path) == [("a", ("b",)), ("c", ("d",))]
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\rtwo\r")
    assert tasks.read_lines(path) == ["one", "two"] and documents(path) == ["one\rtwo\r"]
    path.write_bytes(b"\r\n".join([b"one\rstill one", b"two", b""]))
    assert tasks.read_lines(path) == ["one\rstill one", "two"]
    path = tmp_path / "a.csv"
    path.write_bytes(b'mr,ref\r"name[a]",b\r"name[c]",d\r')
    assert tasks.read(path) == [("name : a", ("b",)), ("name : c", ("d",))]


def test_no_utf8_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8 \(line 2\)"):
        whole_text(tmp_path / "a.txt")
