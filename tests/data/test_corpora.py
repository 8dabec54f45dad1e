"""Corpora as documents: the standard library, files, folders, JSON lines, data sets; what has no text is refused."""

import inspect
import json
import os
import platform
import sys
import textwrap

import pytest

from vspdf.config.resolved import ResolvedData
from vspdf.data.corpora import load_documents
from vspdf.data.text import prepare
from vspdf.errors import UserError


def texts(config: ResolvedData) -> list[str]:
    return [document.text for document in load_documents(config)]


def test_standard_library_is_its_sources(settings_for):
    names = [name for name, _ in load_documents(settings_for("stdlib"))]
    assert len(names) > 100 and names == sorted(names) and {"os.py", "logging.py"} & set(names) == {"os.py"}
    assert not any(name.startswith(("_sysconfigdata", "sitecustomize")) for name in names)
    dataset = prepare(settings_for("stdlib"), 256, 0)
    assert dataset.manifest["corpus"]["python"] == platform.python_version()
    assert dataset.manifest["corpus"]["documents"] == len(names)
    assert dataset.n_samples > 10_000
    share = dataset.manifest["validation"]["bytes"] / dataset.manifest["corpus"]["bytes"]
    assert 0.045 < share <= 0.05


def test_all_of_the_standard_library_is_more_than_its_top(settings_for):
    whole, top = ({name for name, _ in load_documents(settings_for(name))} for name in ("stdlib-all", "stdlib"))
    assert top < whole and "json/decoder.py" in whole
    assert not any("site-packages" in name or name.startswith("_sysconfigdata") for name in whole)


def test_documentation_of_the_standard_library_is_english(settings_for):
    found = dict(load_documents(settings_for("stdlib-docs")))
    assert inspect.getdoc(textwrap.dedent) in found["textwrap.py"] and "import re" not in found["textwrap.py"]
    assert "topic lambda" in found and not any("test" in name.split("/") for name in found)


def test_several_corpora_are_one_after_the_other(text_file, tmp_path, settings_for, refused):
    (tmp_path / "b.txt").write_text("bee")
    both = settings_for(f"{text_file} + {tmp_path / 'b.txt'}")
    assert texts(both) == [*texts(settings_for(text_file)), "bee"]
    assert load_documents(both).python is None and load_documents(settings_for(f"{text_file} + stdlib")).python
    assert "Corpus 'nothing.txt' not found" in refused(f"{text_file} + nothing.txt")


def test_a_file_is_cut_into_whole_paragraphs(text_file, settings_for, prose):
    sections = texts(settings_for(text_file))
    assert "".join(sections) == prose(1)
    assert 20 < len(sections) <= 60
    assert all(section.endswith("\n\n") for section in sections[:-1])


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "word " * 20_000, "line\n" * 2000, "\ufeffbegin\r\n\r\n" * 500, "é" * 60_000],
    ids=lambda t: ascii(t[:8]),
)
def test_any_file_is_cut_and_kept(text, tmp_path, settings_for):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    sections = texts(settings_for(tmp_path / "a.txt"))
    assert "".join(sections) == text.removeprefix("\ufeff") and len(sections) > 2


def test_a_folder_is_its_text_files_in_order(tmp_path, settings_for, caplog):
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.md").write_text("bee")
    (root / "a.TXT").write_text("ay")
    (root / "sub" / "c.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    (root / "empty.py").write_text("")
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    (root / ".hidden" / "d.txt").write_text("no")
    assert texts(settings_for(root)) == ["ay", "bee", "one", "two"]
    assert "1 other files ignored (.png)" in caplog.text


def test_json_lines(tmp_path, settings_for):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"é {i}\nx"}) + "\n" for i in range(5)))
    assert texts(settings_for(path, text_field="body")) == [f"é {i}\nx" for i in range(5)]


def test_hugging_face_dataset(tmp_path, settings_for, monkeypatch, prose):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": prose(i, 3)}) + "\n" for i in range(9)))
    assert texts(settings_for(f"hf:{folder}")) == [prose(i, 3) for i in range(9)]
    with pytest.raises(UserError, match="Did you mean 'text'"):
        texts(settings_for(f"hf:{folder}", text_field="texts"))


def test_unreachable_hugging_face_dataset(refused, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "Cannot load corpus 'hf:nobody/nothing'" in refused("hf:nobody/nothing")


def test_missing_datasets_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused("hf:wikitext:wikitext-2-raw-v1")


# --- Bad input


def test_missing_corpus(tmp_path, refused):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").write_text("x")
    assert f"Did you mean '{tmp_path / 'corpus' / 'train.txt'}'?" in refused(tmp_path / "corpus" / "trian.txt")
    assert f"Did you mean '{tmp_path / 'corpus' / 'train.txt'}'?" in refused(tmp_path / "corpsu" / "train.txt")
    assert "Did you mean 'stdlib'?" in refused("stdlb")
    message = refused("/nowhere/at/all")
    assert "'/nowhere/at/all' not found: expected" in message and "FILE.jsonl" in message


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "empty.jsonl", "folder"])
def test_empty_corpus(name, tmp_path, refused):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.txt").write_text("")
    else:
        path.write_text("  \n\n" * 5000 if name == "blank.txt" else "")
    assert f"Corpus '{path}' is empty" in refused(path)


def test_folder_without_text(tmp_path, refused):
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert "has no text: expected files in .txt" in refused(folder)
    (folder / "a.png").write_bytes(b"x")
    assert "found .png" in refused(folder)


def test_not_utf8(tmp_path, refused):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nna\xefve\n")
    assert f"'{path}' is not UTF-8 (byte 0xef" in refused(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("x", encoding="utf-16")
    assert "b.txt' is UTF-16, not UTF-8" in refused(tmp_path / "folder")


def test_links_out_of_a_folder_are_followed_and_each_folder_is_read_once(tmp_path, settings_for):
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path in (folder / "sub", folder / ".git", other / "deep"):
        path.mkdir(parents=True)
    for file in (folder / "a.txt", folder / "sub" / "b.txt", folder / ".git" / "no.txt", other / "deep" / "c.txt"):
        file.write_text(file.name)
    (folder / "aside").symlink_to(folder / "sub")  # what is in it already
    (folder / "linked").symlink_to(other)
    (folder / "twice").symlink_to(other / "deep")
    (other / "back").symlink_to(folder)
    names = [name for name, _ in load_documents(settings_for(folder))]
    assert names == ["a.txt", "linked/deep/c.txt", "sub/b.txt"]


def test_a_name_that_is_no_utf8(tmp_path, settings_for, prose):
    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / os.fsdecode(b"caf\xe9%d.txt" % i)).write_text(prose(i))
    assert prepare(settings_for(tmp_path / "texts"), 16, 0).n_samples > 10


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path, text_file, refused):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed' cannot be read: Permission denied" in refused(tmp_path)


def test_no_such_home(refused):
    assert "'~nobody-of-this-name/x.txt': there is no such home directory" in refused("~nobody-of-this-name/x.txt")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(text_file, refused):
    text_file.chmod(0)
    assert f"Cannot read '{text_file}' (Permission denied)" in refused(text_file)


@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"text": ', ["line 2", "no JSON"]),
        ('["text"]', ["line 2", "no object"]),
        ('{"txt": "x"}', ["line 2", "no field 'text'", "Did you mean 'txt'?"]),
        ('{"text": 3}', ["line 2", "'text' is int, expected text"]),
        ('{"text": "\\ud800"}', ["line 2", "surrogate"]),
    ],
    ids=["no json", "no object", "no field", "no text", "surrogate"],
)
def test_unfit_json_lines(line, parts, tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + line + "\n")
    message = refused(path)
    for part in [str(path), *parts]:
        assert part in message


@pytest.mark.parametrize("name", [" ", "stdlib + "])
def test_a_corpus_without_a_name_is_not_the_folder_one_is_in(name, refused):
    assert "names no corpus" in refused(name)
