"""Readers of data-to-text files, and what they make of odd ones."""

import json
from pathlib import Path

import pytest

from vspdf.data import tasks
from vspdf.data.rows import said_in
from vspdf.data.tasks import Example
from vspdf.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

DART_JSON = [
    {
        "tripleset": [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "Mars Hill"]],
        "subtree_was_extended": True,
        "annotations": [{"source": "a", "text": "It joined in 1973."}, {"source": "b", "text": "Joined: 1973."}],
    },
    {"tripleset": [], "annotations": [{"source": "a", "text": "Of nothing."}]},
    {"tripleset": [["A", "B", "C"]], "annotations": []},
]
DART_XML = """<?xml version='1.0' encoding='utf-8'?>
<benchmark><entries>
  <entry category="MISC" eid="Id1" size="2">
    <modifiedtripleset>
      <mtriple>Hawaii Five-O | NOTES | Episode: The Flight</mtriple><mtriple>[TABLECONTEXT] | [TITLE] | Jeff</mtriple>
    </modifiedtripleset>
    <lex comment="WikiSQL" lid="Id1">Jeff played &amp; won</lex><lex comment="e2e" lid="Id2">Jeff won</lex>
  </entry>
  <entry eid="Id2"><modifiedtripleset/><lex>Of nothing.</lex></entry>
  <entry eid="Id3"><modifiedtripleset><mtriple>A | B | C</mtriple></modifiedtripleset></entry>
</entries></benchmark>"""
WEBNLG_XML = """<benchmark><entries>
  <entry category="Food" eid="Id1">
    <originaltripleset><otriple>Bacon | wrong | x</otriple></originaltripleset>
    <modifiedtripleset><mtriple>Bacon_sandwich | country | UK</mtriple></modifiedtripleset>
    <lex comment="good" lid="Id1">Bacon from the UK.</lex><lex comment="toFix" lid="Id2">Bcon.</lex>
  </entry>
</entries></benchmark>"""
WEBNLG_JSON = {
    "entries": [
        {
            "1": {
                "category": "Food",
                "modifiedtripleset": [{"subject": "Bacon_sandwich", "property": "country", "object": "UK"}],
                "lexicalisations": [{"comment": "good", "lex": "Bacon from the UK."}, {"comment": "bad", "lex": "B"}],
            }
        }
    ]
}


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_dart_json(tmp_path):
    examples = tasks.read(write(tmp_path, "dev.json", DART_JSON))
    context = "Mars Hill College : JOINED : 1973 | Mars Hill College : LOCATION : Mars Hill"
    assert examples == [
        Example(context, ("It joined in 1973.", "Joined: 1973.")),
        Example("", ("Of nothing.",)),
        Example("A : B : C", ()),
    ]
    lower = tasks.read(tmp_path / "dev.json", lower_relations=True)
    assert lower[0].context == "Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill"


def test_dart_xml(tmp_path):
    assert tasks.read(write(tmp_path, "test.xml", DART_XML)) == [
        Example(
            "Hawaii Five-O : NOTES : Episode: The Flight | [TABLECONTEXT] : [TITLE] : Jeff",
            ("Jeff played & won", "Jeff won"),
        ),
        Example("", ("Of nothing.",)),
        Example("A : B : C", ()),
    ]


@pytest.mark.parametrize(
    ("name", "content"), [("w.xml", WEBNLG_XML), ("w.json", WEBNLG_JSON)], ids=["webnlg xml", "webnlg json"]
)
def test_webnlg_leaves_out_what_is_not_good(tmp_path, name, content, caplog):
    expected = [Example("Bacon_sandwich : country : UK", ("Bacon from the UK.",))]
    assert tasks.read(write(tmp_path, name, content), "webnlg") == expected
    assert "1 references that are not marked good are left out" in caplog.text


E2E_CSV = """mr,ref
"name[Blue Spice], eatType[coffee shop]","A shop, Blue Spice."
"name[Blue Spice], eatType[coffee shop]",B
"name[X]",C
"""
E2E_TEXT = """name : Blue Spice | eatType : coffee shop||A shop, Blue Spice.
name : Blue Spice | eatType : coffee shop||B
name : X||C
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", E2E_CSV),
        ("t.txt", E2E_TEXT),
        ("t.txt", " \n\n" + E2E_TEXT),
        ("t.txt", "\r" + E2E_TEXT.replace("\n", "\r")),
    ],
    ids=["csv", "text", "text after blank lines", "text after a blank line, ends \\r"],
)
def test_e2e_gathers_the_references_of_one_meaning(tmp_path, name, content):
    assert tasks.read(write(tmp_path, name, content)) == [
        Example("name : Blue Spice | eatType : coffee shop", ("A shop, Blue Spice.", "B")),
        Example("name : X", ("C",)),
    ]


def test_jsonl_and_lines(tmp_path):
    rows = [
        {"context": "a", "completion": "x"},
        {"context": "a", "completion": ["y", "z"]},
        {"context": "b"},
        {"context": "a", "completion": "later"},
    ]
    path = write(tmp_path, "pairs.jsonl", "\n\n".join(map(json.dumps, rows)))
    expected = [Example("a", ("x", "y", "z")), Example("b", ()), Example("a", ("later",))]
    assert tasks.read(path) == expected
    path = write(tmp_path, "prompts.txt", "one\n\nthree\u2028still three\x0b\n")
    assert [example.context for example in tasks.read(path)] == ["one", "", "three\u2028still three\x0b"]


def test_conversations_of_one_text_stay_two(tmp_path):
    other = (("system", "A"), ("user", "B\nC"))
    said = [(("system", "A\nB"), ("user", "C")), other, other]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in (*one, ("assistant", str(i)))]}
        for i, one in enumerate(said)
    ]
    examples = tasks.read(write(tmp_path, "two.jsonl", "\n".join(map(json.dumps, rows))))
    assert examples == [Example("A\nB\nC", ("0",)), Example("A\nB\nC", ("1", "2"))]
    assert [said_in(example.context) for example in examples] == said[:2]


@pytest.mark.parametrize(
    ("name", "content", "format", "message"),
    [
        ("a.json", "[{", "auto", "is no JSON"),
        ("a.json", '{"rows": []}', "auto", "neither DART .* nor WebNLG"),
        ("a.json", '[{"tripleset": [["a", "b"]], "annotations": []}]', "auto", "item 1: .* is no triple"),
        ("a.json", '[{"tripleset": [], "annotations": [{"txt": "b"}]}]', "auto", "item 1: .* with 'text'.*'txt'"),
        ("a.json", "[]", "auto", "holds no example"),
        ("a.xml", "<benchmark><entry>", "auto", "not valid XML"),
        ("a.xml", DART_XML.replace("A | B | C", "A | B"), "auto", "entry Id3: .* is no triple"),
        ("a.jsonl", '{"context": "a"}\nnot json', "auto", "line 2 is no JSON"),
        ("a.jsonl", '{"contxt": "a"}', "auto", "line 1: expected an object with 'context'. Did you mean 'contxt'"),
        ("a.jsonl", '{"context": "a", "completion": 3}', "auto", "'completion' must be a text"),
        ("a.csv", "x,ref\n1,2\n", "auto", "columns mr and ref, found x, ref"),
        ("a.csv", 'mr,ref\n"name[a],b\n', "auto", "is no CSV after line 1"),
        ("a.csv", "mr,ref\nname,b\n", "auto", r"line 2: mr must be like 'name\[Blue Spice\]"),
        ("a.csv", 'mr,ref\n"name[a], and[b] more",x\n', "auto", "line 2: mr must be like"),
        ("a.csv", 'mr,ref\n"' + "a" * 100_000 + '",x\n', "auto", "line 2: mr must be like"),
        ("a.csv", 'mr,ref\n"' + "a[" * 50_000 + '",x\n', "auto", "line 2: mr must be like"),
        ("a.csv", 'mr,ref\n"' + "a" * 200_000 + '",x\n', "auto", "is no CSV after line 1 .field larger than"),
        ("a.json", "[" * 100_000, "auto", "nests too deep"),
        ("a.json", '[{"tripleset": [3]}]', "auto", "item 1: 3 is no triple"),
        ("a.json", '[{"tripleset": ["abc"]}]', "auto", "item 1: 'abc' is no triple"),
        ("a.json", '{"entries": [3]}', "auto", "entry 1: expected an object by number, not int"),
        ("a.json", '{"entries": [{"1": 3}]}', "auto", "entry 1: expected an object, not int"),
        ("a.json", '{"entries": [{"1": {"lexicalisations": 3}}]}', "auto", "entry 1: expected lexicalisations, not"),
        ("a.json", '{"entries": [{"1": {"lexicalisations": [3]}}]}', "auto", "entry 1: expected an object with 'lex'"),
        ("a.json", '{"entries": [{"1": {"modifiedtripleset": 3}}]}', "auto", "expected a list as modifiedtripleset"),
        ("a.jsonl", '{"context": "\\ud800"}', "auto", "line 1 holds half a surrogate pair"),
        ("a.jsonl", '{"context": ' + "9" * 5000 + "}", "auto", "line 1 holds a number of too many digits"),
        ("a.jsonl", "3", "auto", "line 1: expected an object with 'context' and 'completion', not 3"),
        ("a.xml", "<!DOCTYPE x [" + '<!ENTITY a "' + "ha" * 1000 + '">' + "".join(
            f'<!ENTITY {b} "{f"&{a};" * 50}">' for a, b in zip("abcd", "bcde", strict=True)) + "]><x>&e;</x>",
         "auto", "not valid XML: limit on input amplification"),
        ("a.txt", "no bars\n", "e2e", r"line 1: expected context\|\|reference"),
        ("a.txt", "", "auto", "holds no example"),
        ("a.txt", "x", "darts", "format 'darts' is not known. Did you mean 'dart'"),
    ],
)  # fmt: skip
def test_what_is_no_task_file(tmp_path, name, content, format, message):
    with pytest.raises(UserError, match=message):
        tasks.read(write(tmp_path, name, content), format)


def test_missing_file_and_bad_bytes(tmp_path):
    write(tmp_path, "dart-test.xml", DART_XML)
    with pytest.raises(UserError, match=r"not found. Did you mean '.*dart-test.xml'"):
        tasks.read(tmp_path / "dart-tset.xml")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 \\(line 2\\)"):
        tasks.read(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="is a folder"):
        tasks.read(tmp_path)


TASKS = {
    "d.json": json.dumps(DART_JSON),
    "w.json": json.dumps(WEBNLG_JSON),
    "d.xml": DART_XML,
    "e.csv": E2E_CSV,
    "e.txt": E2E_TEXT,
    "p.jsonl": '{"context": "a", "completion": ["b", "c"]}\n' * 3,
    "m.jsonl": json.dumps({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}) + "\n",
}


@pytest.mark.parametrize("name", TASKS)
def test_bent_files_are_read_or_refused(tmp_path, name, bent):
    """Values turned into others anywhere in the tree, and bytes flipped, dropped and put: one line, or examples."""
    refused = 0
    for _ in range(150):
        try:
            (tmp_path / name).write_bytes(bent(TASKS[name]))
            tasks.read(tmp_path / name)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused


@pytest.mark.skipif(not (SHARED / "dart").is_dir(), reason="needs the published DART files")
def test_the_published_files_align():
    """Line i of the .lex files is the i-th entry of the test set, tokenised and lower-cased, and so is its absence."""
    examples = tasks.read(SHARED / "dart" / "dart-v1.1.1-full-test.xml")
    signs = lambda text: "".join(c for c in text.lower() if c.isascii() and c.isalnum())  # noqa: E731
    for i in range(3):
        lines = tasks.read_lines(SHARED / "dart" / f"all-delex-reference{i}.lex")
        texts = [example.references[i] if len(example.references) > i else "" for example in examples]
        assert [signs(line) for line in lines] == [signs(text) for text in texts]
    dev = tasks.read(SHARED / "dart" / "dart-v1.1.1-full-dev.json")
    assert (len(examples), len(dev), sum(len(example.references) for example in dev)) == (5097, 2768, 6980)
    assert len(tasks.read(SHARED / "e2e" / "test.txt")) == 630
