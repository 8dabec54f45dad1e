import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vspdf.data.tokenizer import END_OF_DOCUMENT, Tokenizer, tokenizer_maker
from vspdf.errors import UserError

GPT2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "gpt2-bpe"
SOURCE = inspect.getsource(logging)
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's vocab.json and merges.txt are not here")

HARD = [
    "",
    " ",
    "\n\n\t  x\r\n",
    "naïve café — 世界 \U0001f600\U0001f468‍\U0001f469‍\U0001f467",
    "e\u0301 \u00e9 \ufb01 \u212b",  # what a normaliser would alter
    "\x00\x7f\x80\xa0\xad\u2028",
    f"a {END_OF_DOCUMENT} inside a text",
    "don't  I'll   12345 ____",
    SOURCE,
]


@pytest.fixture(scope="module", params=["bytes", "bpe:500", "saved bpe", "gpt2", "gpt2's tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    if "gpt2" in request.param and not GPT2.is_dir():
        pytest.skip("GPT-2's vocab.json and merges.txt are not here")
    if request.param == "bytes":
        return Tokenizer.bytewise()
    if request.param == "gpt2":
        return Tokenizer.gpt2(GPT2)
    if request.param == "gpt2's tokenizer.json":
        return Tokenizer.load(GPT2 / "tokenizer.json")
    trained = Tokenizer.train([SOURCE], 500)
    if request.param == "bpe:500":
        return trained
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(path)
    return Tokenizer.load(path)


def assert_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.end_of_document not in ids


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text[:20]))
def test_hard_text_survives(tokenizer, text):
    assert_lossless(tokenizer, text)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_survives(tokenizer, text):
    assert_lossless(tokenizer, text)


def test_a_batch_is_its_texts(tokenizer):
    for text, ids in zip(HARD, tokenizer.encode_batch(HARD), strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist()


def test_end_of_document_vanishes_in_text(tokenizer):
    ids = [*tokenizer.encode("one"), tokenizer.end_of_document, *tokenizer.encode("two"), tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "onetwo"
    assert tokenizer.bytes_per_token[tokenizer.end_of_document] == 0


def test_half_a_character_is_marked(tokenizer):
    ids = Tokenizer.bytewise().encode("é")[:1]
    assert Tokenizer.bytewise().decode(ids) == "\ufffd"


def test_bytes_are_bytes():
    tokenizer = Tokenizer.bytewise()
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.encode("é\n\x00").tolist() == [0xC3, 0xA9, 10, 0]


def test_saved_bytes_are_the_same_tokenizer(tmp_path):
    Tokenizer.bytewise().save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded._bytewise
    # The library itself, which other programs will use to read the file, agrees with the short cut.
    assert loaded._model.encode(HARD[3]).ids == list(HARD[3].encode())


def test_bpe_has_the_asked_size_and_is_deterministic():
    script = (
        "import inspect, logging\nfrom vspdf.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train([inspect.getsource(logging)], 700).to_json())"
    )
    here = Tokenizer.train([SOURCE], 700)
    assert here.vocab_size == 700
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(there.stdout) == json.loads(here.to_json())


@needs_gpt2
def test_gpt2_is_hugging_faces():
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt"))
    ours = Tokenizer.gpt2(GPT2)
    assert (ours.vocab_size, ours.end_of_document) == (len(theirs), theirs.eos_token_id) == (50257, 50256)
    for text in HARD:
        if END_OF_DOCUMENT not in text:  # ours takes its name in a text for text
            assert ours.encode(text).tolist() == theirs(text)["input_ids"]


def refused(spec: str) -> str:
    with pytest.raises(UserError) as error:
        tokenizer_maker(spec)[1]([SOURCE[:2000]])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("byte", ["'byte'", "Did you mean 'bytes'?"]),
        ("gpt3:folder", ["Did you mean 'gpt2'?"]),
        ("bpe", ["vocabulary size", "bpe:8192"]),
        ("bpe:8k", ["'bpe:8k'", "bpe:8192"]),
        ("bpe:100", ["bpe:100", "at least 257"]),
        ("bpe:99999", ["bpe:99999", "yields", "expected no more"]),
        ("gpt2", ["gpt2:FOLDER"]),
        ("gpt2:/nowhere", ["/nowhere/vocab.json", "merges.txt"]),
        ("/nowhere/tokenizer.json", ["/nowhere/tokenizer.json", "not found"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unfit_names_are_refused(spec, parts):
    message = refused(spec)
    for part in parts:
        assert part in message


def test_near_files_are_offered(tmp_path):
    Tokenizer.bytewise().save(tmp_path / "tokenizer.json")
    assert f"Did you mean '{tmp_path / 'tokenizer.json'}'?" in refused(str(tmp_path / "tokeniser.json"))
    assert f"Did you mean '{tmp_path / 'tokenizer.json'}'?" in refused(str(tmp_path))
    (tmp_path / "vocabs.json").write_text("{}")
    assert f"Did you mean '{tmp_path / 'vocabs.json'}'?" in refused(f"gpt2:{tmp_path}")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", ')
    assert "expected a tokenizer.json" in refused(str(path))
    (tmp_path / "vocab.json").write_text("not json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert "expected GPT-2's vocab.json and merges.txt" in refused(f"gpt2:{tmp_path}")


def edited(tmp_path: Path, change) -> str:
    content = json.loads(Tokenizer.train([SOURCE], 300).to_json())
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_tokenizers_that_alter_text_are_refused(tmp_path):
    assert "keep text exactly" in refused(edited(tmp_path, lambda c: c.update(normalizer={"type": "NFKC"})))
    assert "keep text exactly" in refused(edited(tmp_path, lambda c: c.update(normalizer={"type": "Lowercase"})))
    assert "keep text exactly" in refused(edited(tmp_path, lambda c: c["pre_tokenizer"].update(add_prefix_space=True)))


def test_habits_of_a_tokenizer_json_are_dropped(tmp_path):
    def change(content):
        content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
        ids = {"pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_DOCUMENT, "pad_to_multiple_of": None}
        content["padding"] = {"strategy": {"Fixed": 9000}, "direction": "Right", **ids}
        end = {"id": END_OF_DOCUMENT, "ids": [0], "tokens": [END_OF_DOCUMENT]}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END_OF_DOCUMENT: end},
        }

    loaded = Tokenizer.load(edited(tmp_path, change))
    for text in HARD:
        assert_lossless(loaded, text)


def test_added_tokens_that_are_text_count_their_bytes(tmp_path):
    def change(content):
        common = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"] += [{"id": 300, "content": "  ", **common}, {"id": 301, "content": "世界", **common}]

    loaded = Tokenizer.load(edited(tmp_path, change))
    assert loaded.encode("a  世界").tolist()[1:] == [300, 301]
    for text in HARD:
        assert_lossless(loaded, text)


def test_a_tokenizer_without_end_of_document_is_refused(tmp_path):
    def rename(content):
        content["added_tokens"] = []
        content["model"]["vocab"]["end"] = content["model"]["vocab"].pop(END_OF_DOCUMENT)

    assert "no end-of-document token" in refused(edited(tmp_path, rename))


def test_keys_differ_with_the_files(tmp_path):
    Tokenizer.bytewise().save(tmp_path / "a.json")
    Tokenizer.train([SOURCE], 300).save(tmp_path / "b.json")
    shutil.copy(tmp_path / "a.json", tmp_path / "c.json")
    a, b, c = (tokenizer_maker(str(tmp_path / f"{name}.json"))[0] for name in "abc")
    assert a == c != b


def test_bent_files_are_read_or_refused(tmp_path, bent, capfd):
    whole = Tokenizer.bytewise().to_json()
    path, refused = tmp_path / "tokenizer.json", 0
    for _ in range(60):
        path.write_bytes(bent(whole))
        try:
            Tokenizer.load(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused


def test_numbers_with_gaps_take_no_memory(tmp_path):
    body = json.loads(Tokenizer.bytewise().to_json())
    body["model"]["vocab"]["a"] = 10**9
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="numbers its 257 tokens up to 1,000,000,000: expected numbers without gaps"):
        Tokenizer.load(tmp_path / "tokenizer.json")
