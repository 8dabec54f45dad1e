"""Data-to-text files: DART, WebNLG, E2E and plain pairs become contexts with their references.

A context is what the model is given, ``subject : relation : object | ...`` for triples; a reference is a text it may
answer with. The order of a file is kept, so that line N of a model's answers belongs to example N.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

from vspdf.data.reading import ending, line_end, whole_text
from vspdf.data.rows import pair, said_in
from vspdf.data.rows import text as text_of
from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.files import at_home, parse_json

log = logging.getLogger("vspdf")

FORMATS = ("auto", "dart", "webnlg", "e2e", "jsonl", "lines")


class Example(NamedTuple):
    """One input of a task and the texts that would answer it; either may be empty."""

    context: str
    references: tuple[str, ...]


def read(path: str | Path, format: str = "auto", *, lower_relations: bool = False) -> list[Example]:
    """Examples of a task file, in its order.

    Parameters
    ----------
    path : path
    format : str
        "dart" and "webnlg" are XML or JSON with sets of triples, "e2e" is CSV with the columns mr and ref or lines of
        ``context||reference``, "jsonl" has an object a line with `context` and `completion` (a text, or a list of
        them), or what others call these (see `vspdf.data.rows.pair`), "lines" one context a line. "auto" goes by the
        name's ending and, for text, by ``||`` in its first line that is not blank. Any of them may be gzipped.
        Where the pairs of one context follow each other, they are one example.
    lower_relations : bool
        Lower-case the relations of triples, as the preparation script of the LoRA paper does for DART; in a context
        that is text already, what `lowered` takes for them. Conversations stay as they were said.

    Raises
    ------
    UserError
        If the file is missing, is no such file, or holds something that is no triple; the message says where.
    """
    path = at_home(path)
    if format not in FORMATS:
        raise UserError(f"format '{format}' is not known.{did_you_mean(format, FORMATS)}")
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: expected a task file (XML, JSON, JSONL, CSV or text).")
    if not path.is_file():
        raise UserError(f"task file '{path}' not found.{near_path(path)}")
    text = whole_text(path)
    if format == "auto":
        format = _guess(path, text)
    if format in ("dart", "webnlg"):
        entries = _xml(path, text) if text.lstrip().startswith("<") else _json(path, text)
        examples = [
            Example(_linearised(triples, lower_relations, where), tuple(references))
            for where, triples, references in entries
        ]
    elif format == "e2e":
        examples = _grouped(_e2e_csv(path, text) if ending(path) == ".csv" else _pairs_of_lines(path, text))
    elif format == "jsonl":
        examples = _grouped(_json_lines(path, text))
    else:
        examples = [Example(line, ()) for line in lines_of(text)]
    if not examples:
        raise UserError(f"'{path}' holds no example (read as {format}).")
    if lower_relations and format in ("jsonl", "lines"):
        return [
            example if said_in(example.context) else example._replace(context=lowered(example.context))
            for example in examples
        ]
    return examples


def lowered(context: str) -> str:
    """A context ``s : r : o | s : r : o`` with its relations in lower case; all else as it is."""
    parts = [part.split(" : ") for part in context.split(" | ")]
    return " | ".join(
        " : ".join([fields[0], fields[1].lower(), fields[2]] if len(fields) == 3 else fields) for fields in parts
    )


def lines_of(text: str) -> list[str]:
    r"""Splits text at \n or \r\n, as line-based tools count lines; at bare \r where it has no \n at all."""
    end = line_end(text)
    lines = text.split(end)
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file; see `lines_of`."""
    path = at_home(path)
    if path.is_dir():
        raise UserError(f"'{path}' is a folder: expected a file of one text a line.")
    if not path.is_file():
        raise UserError(f"'{path}' not found.{near_path(path)}")
    return lines_of(whole_text(path))


_BY_ENDING = {".xml": "dart", ".json": "dart", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "e2e"}


def is_task_file(path: str | Path) -> bool:
    """Whether a file holds examples, no text a line: by its name's ending, or ``||`` in every line that is not blank.

    Code has ``||`` in some lines; a file of such lines stays one of texts.
    """
    if ending(Path(path)) in _BY_ENDING:
        return True
    lines = [line for line in read_lines(path) if line.strip()]
    return bool(lines) and all("||" in line for line in lines)


def _guess(path: Path, text: str) -> str:
    if found := _BY_ENDING.get(ending(path)):
        return found
    return "e2e" if "||" in text.lstrip().partition(line_end(text))[0] else "lines"


def _linearised(triples: Iterable[Any], lower_relations: bool, where: str) -> str:
    parts = []
    for triple in triples:
        if not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(part, str) for part in triple):
            raise UserError(f"{where}: {triple!r} is no triple, expected subject, relation, object.")
        subject, relation, object_ = (part.strip() for part in triple)
        parts.append(f"{subject} : {relation.lower() if lower_relations else relation} : {object_}")
    return " | ".join(parts)


def _grouped(pairs: Iterable[tuple[str, tuple[str, ...]]]) -> list[Example]:
    return [
        Example(context, tuple(reference for _, references in group for reference in references))
        for (context, _), group in groupby(pairs, key=lambda pair: (pair[0], said_in(pair[0])))
    ]


Kind = TypeVar("Kind")
Entry = tuple[str, list[Any], list[str]]  # where it stands, triples, references


def _xml(path: Path, text: str) -> Iterator[Entry]:
    """WebNLG's benchmark form, which DART's test set shares."""
    try:
        root = ElementTree.fromstring(text.lstrip())
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two: of its declared encoding
        raise UserError(f"'{path}' is not valid XML: {error}.") from None
    lexes = [
        (entry, [(lex.get("comment") or "", (lex.findtext("text") or lex.text or "").strip())
                 for lex in entry.findall("lex")])
        for entry in root.iter("entry")
    ]  # fmt: skip
    for number, (entry, texts) in enumerate(_accepted(path, lexes), 1):
        where = f"'{path}' entry {entry.get('eid') or number}"
        sets = entry.findall("modifiedtripleset") or entry.findall("originaltripleset")[:1]
        triples = [item for group in sets for item in group if item.tag in ("mtriple", "otriple")]
        yield where, [(item.text or "").split(" | ") for item in triples], texts


def _json(path: Path, text: str) -> Iterator[Entry]:
    """DART's list of triple sets with annotations, or the JSON form of WebNLG."""
    body = parse_json(text, f"'{path}'")
    if isinstance(body, list) and all(isinstance(row, dict) and "tripleset" in row for row in body):
        for number, row in enumerate(body, 1):
            where = f"'{path}' item {number}"
            annotations = row.get("annotations") or []
            if not isinstance(row["tripleset"], list) or not isinstance(annotations, list):
                raise UserError(f"{where}: expected lists as tripleset and annotations.")
            yield where, row["tripleset"], [text_of(note, "text", where) for note in annotations]
        return
    if isinstance(body, dict) and isinstance(body.get("entries"), list):
        rows = [
            row
            for number, item in enumerate(body["entries"], 1)
            for row in _as(dict, item, f"'{path}' entry {number}", "an object by number").values()
        ]
        lexes = []
        for number, row in enumerate(rows, 1):
            where = f"'{path}' entry {number}"
            found = _as(list, _as(dict, row, where, "an object").get("lexicalisations", []), where, "lexicalisations")
            texts = [text_of(lex, "lex", where).strip() for lex in found]
            lexes.append((row, [(lex.get("comment", ""), text) for lex, text in zip(found, texts, strict=True)]))
        keys = ("subject", "property", "object")
        for number, (row, texts) in enumerate(_accepted(path, lexes), 1):
            where = f"'{path}' entry {number}"
            triples = _as(list, row.get("modifiedtripleset", []), where, "a list as modifiedtripleset")
            yield where, [[text_of(triple, key, where) for key in keys] for triple in triples], texts
        return
    raise UserError(
        f"'{path}' is neither DART (a list of objects with tripleset and annotations) nor WebNLG (entries): "
        "other pairs go into JSONL with context and completion."
    )


def _accepted(path: Path, lexes: list[tuple[Any, list[tuple[str, str]]]]) -> Iterator[tuple[Any, list[str]]]:
    """Texts by entry. Where annotators marked texts "good" (WebNLG), the others are left out."""
    marked = any(comment == "good" for _, texts in lexes for comment, _ in texts)
    left_out = sum(marked and comment != "good" for _, texts in lexes for comment, _ in texts)
    if left_out:
        log.warning("%s: %d references that are not marked good are left out.", path, left_out)
    for entry, texts in lexes:
        yield entry, [text for comment, text in texts if not marked or comment == "good"]


def _as(kind: type[Kind], value: Any, where: str, expected: str) -> Kind:
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected {expected}, not {type(value).__name__}.")
    return value


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            where = f"'{path}' line {number}"
            yield pair(parse_json(line, where), where)


def _pairs_of_lines(path: Path, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            context, bars, reference = line.partition("||")
            if not bars:
                raise UserError(f"'{path}' line {number}: expected context||reference.")
            yield context.strip(), (reference.strip(),) if reference.strip() else ()


def _e2e_csv(path: Path, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """``name[Blue Spice], area[riverside]`` becomes ``name : Blue Spice | area : riverside``."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if "mr" not in columns:
            raise UserError(
                f"'{path}': expected a CSV with the columns mr and ref, found {', '.join(columns) or 'none'}."
            )
        for row in reader:
            reference = (row.get("ref") or "").strip()
            slots = _slots(row["mr"] or "", f"'{path}' line {reader.line_num}")
            yield " | ".join(f"{key} : {value}" for key, value in slots), (reference,) if reference else ()
    except csv.Error as error:
        raise UserError(f"'{path}' is no CSV after line {reader.line_num} ({error}).") from None


def _slots(meaning: str, where: str) -> list[tuple[str, str]]:
    """``name[Blue Spice], area[riverside]`` as pairs."""
    *slots, rest = meaning.split("]")
    found = []
    for slot in slots:
        before, bracket, value = slot.partition("[")
        skipped, _, key = before.rpartition(",")
        if not bracket or not key.strip() or skipped.strip():
            raise UserError(f"{where}: mr must be like 'name[Blue Spice], area[riverside]'.")
        found.append((key.strip(), value.strip()))
    if rest.strip(" ,\t"):
        raise UserError(f"{where}: mr must be like 'name[Blue Spice], area[riverside]'.")
    return found
