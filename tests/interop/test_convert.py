"""Conversion of our own runs: to Hugging Face's layout and back, their tokenizers, and what is refused."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import vspdf
from vspdf.config import loading
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
from vspdf.interop import checkpoints, hugging_face
from vspdf.model import GPT
from vspdf.runs import checkpoint
from vspdf.sparsity.layer import sparse_layers
from vspdf.train.trainer import train

TEXT = "def f(x):\n\treturn  x  # don't — 世界"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """A run with checkpoints of its sparse (12, 20) and its dense (28) steps."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["train.checkpoint_every=4", "train.keep_checkpoints=9"]
    train(loading.load(tiny_config(folder), overrides), say=lambda line: None)
    return folder / "run"


def step(run, number):
    return run / "checkpoints" / f"step-{number:08d}"


# -- to Hugging Face and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [12, 20, 28], ids=["90 % sparse", "half sparse", "dense"])
def test_hugging_face_reads_our_model_and_its_logits_are_ours(trained, tmp_path, vspdf, number, logits, some_tokens):
    status, out, err = vspdf("convert", step(trained, number), tmp_path / "hf", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["kind"] == "checkpoint" and found["to"] == "hugging-face" and found["step"] == number
    assert len(found["layers"]) == (0 if number == 28 else 8)
    ours, tokenizer, _ = checkpoints.load(step(trained, number))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(theirs, some_tokens()), logits(ours, some_tokens()), rtol=1e-5, atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = words(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist() and words.decode(ids) == TEXT
    assert words.eos_token_id == theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 256


def test_there_and_back_every_bit_is_the_same(trained, tmp_path, vspdf, logits, some_tokens):
    vspdf("convert", trained, tmp_path / "hf")
    status, out, _ = vspdf("convert", tmp_path / "hf", tmp_path / "again")
    assert status == 0 and "a Hugging Face folder" in out and "wrote" in out
    ours, again = checkpoints.load(trained), checkpoints.load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), again.model.parameters(), strict=True))
    assert again.tokenizer.to_json() == ours.tokenizer.to_json() and again.model.shape.mlp == "gelu"
    direct = checkpoints.load(tmp_path / "hf")
    assert torch.equal(logits(direct.model, some_tokens()), logits(ours.model, some_tokens()))


def test_sparse_to_dense_of_our_own(trained, tmp_path, vspdf):
    status, _, _ = vspdf("convert", step(trained, 12), tmp_path / "dense", "--to", "dense")
    assert status == 0
    sparse, dense = checkpoints.load(step(trained, 12)), checkpoints.load(tmp_path / "dense")
    assert len(sparse_layers(sparse.model)) == 8 and not sparse_layers(dense.model) and dense.state["step"] == 12
    for name, layer in sparse_layers(sparse.model).items():
        assert torch.equal(dense.model.get_submodule(name).weight, layer.weight)
    assert dense.state["corpus"] == sparse.state["corpus"]


def test_at_90_percent_sparsified_tensors_take_a_fifth_of_their_dense_size(trained):
    tensors = load_file(step(trained, 12) / "model.safetensors")
    layers = sparse_layers(checkpoints.load(step(trained, 12)).model)
    stored = sum(tensors[f"{name}.{part}"].nbytes for name in layers for part in ("values", "pattern"))
    dense = sum(4 * layer.pattern.numel for layer in layers.values())
    assert 0.1 < stored / dense < 0.2
    moments = load_file(step(trained, 12) / "optimizer.safetensors")
    for name, layer in layers.items():
        assert moments[f"{name}.values:exp_avg"].shape == (layer.pattern.nnz,)


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(trained, tmp_path):
    hugging_face.write_hugging_face(*checkpoints.load(trained)[:2], tmp_path / "hf")
    return tmp_path / "hf"


def test_a_tokenizer_of_another_size_does_not_match(folder, corpus):
    Tokenizer.train([corpus.read_text()], 400).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"'tokenizer.json' does not match the model: it has 400 tokens, .* has 257"):
        checkpoints.load(folder)


def test_a_model_may_have_rows_to_spare(trained, tmp_path):
    """As a preset's vocabulary under a tokenizer of one's own: the same end of document tells that the two belong."""
    model, words, _ = checkpoints.load(trained)
    wide = GPT(dataclasses.replace(model.shape, vocab_size=1000))
    hugging_face.write_hugging_face(wide, words, tmp_path / "hf")
    assert checkpoints.load(tmp_path / "hf").tokenizer.vocab_size == 257
    body = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(body | {"eos_token_id": None}))
    with pytest.raises(UserError, match=r"does not match the model: it has 257 tokens, .* has 1000"):
        checkpoints.load(tmp_path / "hf")


def test_a_tokenizer_that_ends_documents_otherwise_does_not_match(folder, corpus):
    Tokenizer.train([corpus.read_text()], 257).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"does not match the model: it ends documents with token 0, .* with 256"):
        checkpoints.load(folder)


def test_gpt2_vocabulary_files_do_as_well(folder):
    words = Tokenizer.bytewise()
    body = json.loads(words.to_json())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(body["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert checkpoints.load(folder).tokenizer.encode(TEXT).tolist() == words.encode(TEXT).tolist()


def test_a_folder_without_one_says_so_and_takes_one(folder, tmp_path, vspdf):
    (folder / "tokenizer.json").unlink()
    status, _, err = vspdf("convert", folder, tmp_path / "out")
    assert status == 0 and "no tokenizer was found" in err
    assert checkpoints.load(tmp_path / "out").tokenizer is None
    Tokenizer.bytewise().save(tmp_path / "words.json")
    assert vspdf("convert", folder, tmp_path / "with", "--tokenizer", tmp_path / "words.json")[0] == 0
    assert checkpoints.load(tmp_path / "with").tokenizer.vocab_size == 257


# -- what is refused --------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(trained, tmp_path, vspdf):
    for target in (tmp_path / "file", tmp_path / "folder"):
        target.mkdir() if target.name == "folder" else target.write_text("mine")
        status, _, err = vspdf("convert", trained, target)
        assert status == 2 and "exists already: nothing is overwritten" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_conversion_leaves_nothing(trained, tmp_path, monkeypatch):
    from vspdf.interop.convert import convert

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "save_file", full)
    with pytest.raises(UserError, match=r"'.*out' was not written: no space left on the disk"):
        convert(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_form_is_refused(trained, tmp_path, vspdf):
    status, _, err = vspdf("convert", trained, tmp_path / "out", "--to", "dens")
    assert status == 2 and "--to 'dens' is not known. Did you mean 'dense'?" in err


def test_the_state_of_a_run_is_kept(trained):
    model, tokenizer, state = checkpoints.load(trained)
    assert state["step"] == 28 and tokenizer.vocab_size == model.shape.vocab_size == 257
    assert checkpoint.resolve(trained) == step(trained, 28)
    assert vspdf.explain(model, 8).startswith("no sparse layer")
