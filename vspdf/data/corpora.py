"""Corpora: text as a list of documents, from files, folders, data sets and the Python that runs this."""

from __future__ import annotations

import ast
import logging
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vspdf.config.resolved import ResolvedData
from vspdf.data.reading import ending, text_lines
from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.files import at_home, parse_json

log = logging.getLogger("vspdf")

TEXT_ENDINGS = (".txt", ".text", ".md", ".rst", ".tex", ".py")  # read from a folder, beside JSON lines
JSON_LINES_ENDINGS = (".jsonl", ".ndjson")
_EXPECTED = '"stdlib", "stdlib-all", "stdlib-docs", a text file, a folder, FILE.jsonl or "hf:DATASET[:CONFIG]"'


class Document(NamedTuple):
    """`name` is the same wherever the corpus lies."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents, read anew on each iteration, always in the same order; none is blank."""

    name: str
    read: Callable[[], Iterator[Document]]
    python: str | None = None  # version whose standard library this is

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.read() if document.text and not document.text.isspace())


def load_documents(config: ResolvedData, cut: bool = True) -> Corpus:
    """The corpus that `config` names. Nothing is read yet, but what is missing is found out.

    A file of text is cut at blank lines into about a hundred documents; in a folder each file is a document, in JSON
    lines and Hugging Face datasets each row. Several corpora with " + " between them are one after the other.

    Parameters
    ----------
    config : ResolvedData
    cut : bool
        False: a file of text is one document.

    Raises
    ------
    UserError
        If the corpus does not exist or is empty; while iterating, if a file is no UTF-8 or a line lacks the field.
    """
    name = config.corpus
    if " + " in name and not at_home(name).exists():
        parts = [load_documents(replace(config, corpus=part.strip()), cut) for part in name.split(" + ")]
        python = platform.python_version() if any(part.python for part in parts) else None
        return Corpus(name, lambda: chain.from_iterable(parts), python)
    if not name.strip():  # as a path it would be the folder that one is in
        raise UserError(
            f"data.corpus '{config.corpus}' names no corpus (or a part of it does not): expected {_EXPECTED}."
        )
    if name in _OF_PYTHON:
        return Corpus(name, _OF_PYTHON[name], platform.python_version())
    if name.startswith("hf:"):
        return Corpus(name, _hugging_face(name, config.text_field))
    path = at_home(name)
    if path.is_dir():
        files = _text_files(path)
        return Corpus(name, lambda: _folder(path, files, config.text_field))
    if not path.is_file():
        raise UserError(f"Corpus '{name}' not found: expected {_EXPECTED}.{near_path(path, [*_OF_PYTHON])}")
    if ending(path) in JSON_LINES_ENDINGS:
        return Corpus(name, lambda: _json_lines(path, config.text_field))
    return Corpus(name, lambda: _sections(path) if cut else iter([Document(path.name, _read_text(path))]))


def _sources(everything: bool) -> list[Path]:
    """Modules of the standard library, top-level ones alone or all of them.

    What a build generates or a site adds (`_sysconfigdata_*`, `sitecustomize`) is left out.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found = folder.rglob("*.py") if everything else folder.glob("*.py")
    ours = {*sys.stdlib_module_names, *({"test"} if everything else ())}
    files = sorted(file for file in found if file.relative_to(folder).parts[0].removesuffix(".py") in ours)
    if not files:
        raise UserError(f"this Python has no sources in '{folder}': expected *.py files; give a text file as corpus.")
    return files


def _standard_library(everything: bool) -> Iterator[Document]:
    folder = Path(sysconfig.get_path("stdlib"))
    for file in _sources(everything):
        try:
            yield Document(file.relative_to(folder).as_posix(), _read_text(file))
        except UserError:
            if not everything:  # its tests have files that are no UTF-8 on purpose
                raise


@cache
def _documentation() -> tuple[Document, ...]:
    """English: the docstrings of each module but tests, in its order, and the help topics of the interpreter."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in _sources(everything=True):
        name = file.relative_to(folder)
        if {"test", "tests", "idle_test"} & {*name.parts}:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old spellings in other people's sources
            tree = ast.parse(file.read_bytes())
        nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        if texts:
            found.append(Document(name.as_posix(), "\n\n".join(texts) + "\n"))
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("this Python has no pydoc_data.topics, a part of corpus 'stdlib-docs'.") from None
    return (*found, *(Document(f"topic {name}", text) for name, text in sorted(topics.items())))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_OF_PYTHON: dict[str, Callable[[], Iterator[Document]]] = {
    "stdlib": lambda: _standard_library(everything=False),
    "stdlib-all": lambda: _standard_library(everything=True),
    "stdlib-docs": lambda: iter(_documentation()),
}


def _text_files(folder: Path) -> list[Path]:
    visible = sorted(file.relative_to(folder) for file in _visible(folder))
    endings = TEXT_ENDINGS + JSON_LINES_ENDINGS
    chosen = [file for file in visible if ending(file) in endings]
    others = [file.suffix or "no ending" for file in visible if ending(file) not in endings]
    kinds = ", ".join(sorted(set(others)))
    if not chosen:
        found = f"; found {kinds}" if others else ""
        raise UserError(f"Corpus folder '{folder}' has no text: expected files in {', '.join(endings)}{found}.")
    if others:
        log.warning("Corpus folder '%s': %d other files ignored (%s).", folder, len(others), kinds)
    return chosen


def _visible(folder: Path) -> Iterator[Path]:
    """Files below a folder that are not hidden, each folder once: links are followed where they lead out of it."""

    def refuse(error: OSError) -> None:
        raise UserError(f"Corpus folder '{error.filename}' cannot be read: {error.strerror}.")

    root, seen = Path(folder).resolve(), set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(parent)
        real = here.resolve()
        if real in seen or (here.is_symlink() and here != folder and real.is_relative_to(root)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in files if not name.startswith("."))


def _folder(folder: Path, files: list[Path], text_field: str) -> Iterator[Document]:
    for file in files:
        if ending(file) in JSON_LINES_ENDINGS:
            for line, text in _json_lines(folder / file, text_field):
                yield Document(f"{file.as_posix()} {line}", text)
        else:
            yield Document(file.as_posix(), _read_text(folder / file))


def _sections(path: Path) -> Iterator[Document]:
    """One file as documents of about a hundredth of it, cut after blank lines, or between lines where none is near."""
    enough = min(max(path.stat().st_size // 100, 256), 64 * 1024)
    section: list[str] = []
    size = count = 0
    for _, line in _lines(path, limit=max(2 * enough, 16 * 1024)):  # the limit is for files without line ends
        if not line.isspace() and (size >= 2 * enough or (size >= enough and section[-1].isspace())):
            yield Document(f"section {count}", "".join(section))
            section, size, count = [], 0, count + 1
        section.append(line)
        size += len(line)
    yield Document(f"section {count}", "".join(section))


def _json_lines(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if line.isspace():
            continue
        where = f"'{path}' line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f'{where} is no object: expected {{"{text_field}": "..."}}.')
        yield Document(f"line {number}", _field(row, text_field, where))


def _hugging_face(name: str, text_field: str) -> Callable[[], Iterator[Document]]:
    _, dataset, *config = name.split(":", 2)
    try:
        load_dataset = import_module("datasets").load_dataset
    except ImportError:
        raise UserError(f"Corpus '{name}' needs a package: `pip install datasets`, or give a file instead.") from None
    try:
        rows = load_dataset(dataset, *config, split="train")
    except Exception as error:  # the library's errors have no common base
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"Cannot load corpus '{name}' ({why}): expected a dataset that can be reached or was downloaded before; "
            "or give a file instead."
        ) from None

    def read() -> Iterator[Document]:
        for number, row in enumerate(rows):
            yield Document(f"row {number}", _field(row, text_field, f"'{name}' row {number}"))

    return read


def _field(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where} has no field '{field}' (data.text_field).{did_you_mean(field, map(str, row))}")
    if not isinstance(row[field], str):
        raise UserError(f"{where}: field '{field}' is {type(row[field]).__name__}, expected text (data.text_field).")
    try:
        row[field].encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: field '{field}' holds half a surrogate pair, expected valid Unicode.") from None
    return row[field]


def _read_text(path: Path) -> str:
    return "".join(line for _, line in _lines(path))


def _lines(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends as they are; pieces of at most `limit` characters where lines are longer."""
    number = 1
    try:
        with text_lines(path) as (file, end):
            while line := file.readline(limit):
                yield number, line
                number += line.endswith(end)
    except UnicodeDecodeError as error:  # the decoder reads ahead: the line is not known exactly
        byte = error.object[error.start]
        raise UserError(f"'{path}' is not UTF-8 (byte 0x{byte:02x}, line {number} or later): expected text.") from None
