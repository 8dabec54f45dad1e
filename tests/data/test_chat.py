"""Tokenizers of others' folders, and conversations by their chat templates: read, learnt and answered."""

import json
import shutil
import unicodedata

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vspdf.config.resolve import resolve_task
from vspdf.config.settings import DataConfig
from vspdf.data import chat, pairs
from vspdf.data.rows import said_in
from vspdf.data.tokenizer import Tokenizer as Ours
from vspdf.errors import UserError
from vspdf.evaluate import answers
from vspdf.interop import checkpoints

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["Paris is the capital of France.", "Naïve cafés open at nine.", "2 + 2 = 4", "caf\u0065\u0301", "  indented"]


def qwen():
    """Byte-level with Unicode's NFC before it."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))  # fmt: skip
    return made


def llama2(scheme):
    """SentencePiece's kind: characters, bytes for those it lacks, spaces as ▁ and one more before the text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    if scheme == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return made


@pytest.mark.parametrize(
    "made, seen",
    [(qwen(), lambda text: unicodedata.normalize("NFC", text)), (llama2("normalizer"), lambda text: " " + text),
     (llama2("pre-tokenizer"), lambda text: text if text.startswith(" ") else " " + text)],
    ids=["qwen's", "llama 2's", "mistral's"],
)  # fmt: skip
def test_bytes_are_those_that_a_tokenizer_sees(made, seen):
    ours = Ours.from_json(made.to_str(), "theirs")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids.tolist() == made.encode(text, add_special_tokens=False).ids
        assert ours.seen(text) == seen(text)
        assert ours.bytes_per_token[ids].sum() == len(seen(text).encode())


def test_what_alters_text_more_is_refused():
    lower = qwen()
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"does not keep text exactly: expected one without normalisation \(but NFC\)"):
        Ours.from_json(lower.to_str(), "lower")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen2 with tokenizer and chat template, as its instruction-tuned ones lie on the Hub."""
    path, words = tmp_path_factory.mktemp("qwen"), qwen()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(path)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=[2, 0], tie_word_embeddings=True,
    )).save_pretrained(path)  # fmt: skip
    return path


def test_a_template_is_the_folders(folder):
    words = checkpoints.load(folder).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert words.end_token == "<|im_end|>"
    said = (("system", "Be brief."), ("user", "Capital of France? <|endoftext|>"))
    messages = [{"role": role, "content": content} for role, content in said]
    prompt, answer = chat.encode(words, said, "Paris.")
    assert prompt.tolist() == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert words.decode(answer) == "Paris." and answer[-1] == words.end_of_document
    assert len(chat.encode(words, said)[1]) == 0


@pytest.fixture
def changed(folder, tmp_path):
    """The folder with other settings in its files."""

    def written(**files):
        path = shutil.copytree(folder, tmp_path / "changed")
        for name, settings in files.items():
            file = path / f"{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return path

    return written


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_an_answer_ends_with_any_end_of_its_folder(changed, tmp_path, where, vspdf):
    """As Llama 3's: documents end with the first, answers with another."""
    path = changed(**{"config": {"eos_token_id": 0}, where: {"eos_token_id": [0, 2]}})
    words = checkpoints.load(path).tokenizer
    assert words.ends == (0, 2) and words.named_tokens["eos_token"] == "<|im_end|>"
    assert chat.encode(words, (("user", "Who?"),), "I.")[1].tolist() == [*words.encode("I."), 2]
    assert vspdf("convert", path, tmp_path / "again", "--to", "hugging-face")[0] == 0
    for name in ("config", "generation_config"):
        assert json.loads((tmp_path / "again" / f"{name}.json").read_text())["eos_token_id"] == [0, 2]
    assert checkpoints.load(tmp_path / "again").tokenizer.about == words.about


def test_tokens_that_a_template_names_are_the_folders(changed):
    template = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{{ pad_token }}{% endgeneration %}"
    path = changed(tokenizer_config={
        "bos_token": "<|im_start|>", "pad_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "chat_template": template + "{% endfor %}",
    })  # fmt: skip
    (path / "chat_template.jinja").unlink(missing_ok=True)
    words, theirs = checkpoints.load(path).tokenizer, transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
    assert chat.encode(words, (("user", "Hi"),))[0].tolist() == expected
    assert theirs.decode(expected) == "<|im_start|>Hi<|endoftext|>"


def test_a_template_that_is_no_utf8_is_refused(changed):
    path = changed()
    (path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"chat_template.jinja' is not UTF-8"):
        checkpoints.load(path)


@pytest.mark.parametrize("eps", [None, "1e-5", True], ids=str)
def test_an_epsilon_that_is_no_number_is_refused(changed, eps):
    with pytest.raises(UserError, match="rms_norm_eps must be a number, not"):
        checkpoints.load(changed(config={"rms_norm_eps": eps}))


def test_an_end_with_a_name_of_its_own(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "named")
    for file in path.glob("*.json*"):
        file.write_text(file.read_text().replace("<|im_end|>", "[END]").replace("<|endoftext|>", "[PAD]"))
    words = checkpoints.load(path).tokenizer
    assert words.end_token == "[END]" and words.ends == (2, 0)


def test_an_answer_has_the_tokens_that_it_has_in_the_whole():
    """Of SentencePiece's kind, where a text begins with a space and its middle does not."""
    template = "{% for m in messages %}{{ m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    made = llama2("normalizer")
    words = Ours.from_json(made.to_str(), "theirs", {"chat_template": template})
    prompt, answer = chat.encode(words, (("user", "hi"),), "yo")
    whole = made.encode("user\nhi</s>\nassistant\nyo</s>", add_special_tokens=False).ids
    assert [*prompt, *answer] == whole and len(answer) == 3


@pytest.mark.parametrize(
    "template, message",
    [("{{ raise_exception('no system here') }}", "no system here"), ("{% if %}", "chat template of"),
     ("{{ messages | length }}", "writes a conversation otherwise once it is answered"),
     ("{{ ''.__class__.__mro__ }}", "unsafe")],
    ids=["refuses", "no template", "rewrites", "runs code"],
)  # fmt: skip
def test_templates_that_cannot_be_used(template, message):
    words = Ours.from_json(qwen().to_str(), "theirs", {"chat_template": template})
    with pytest.raises(UserError, match=message):
        chat.encode(words, (("user", "hello"),), "yes")


def test_fine_tuning_learns_conversations_and_answers_them(folder, tmp_path, vspdf):
    """From a folder through `finetune` to `generate` and back to a folder, with one template."""
    facts = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    ask = lambda land: {"role": "user", "content": f"Capital of {land}?"}  # noqa: E731
    rows = [{"messages": [ask(land), {"role": "assistant", "content": city}]} for land, city in facts.items()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fine.yaml").write_text(
        "data: {repeat: true}\noptimizer: {lr: 1.0e-2, weight_decay: 0.0}\n"
        "train: {batch_size: 4, threads: 1, eval_every: 0, sample_tokens: 0}\nphases: [{steps: 150}]\n"
    )
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    status, _, err = vspdf("finetune", folder, tmp_path / "fine.yaml", f"data.path={pairs}",
                           f"data.validation_path={pairs}", f"run_dir={run}")  # fmt: skip
    assert status == 0, err
    for source in ("run", "again"):
        status, out, err = vspdf("generate", tmp_path / source, "--input", pairs, "--beams", 1, "--temperature", 0,
                                 "--tokens", 8)  # fmt: skip
        assert status == 0 and out.split("\n")[:4] == list(facts.values()), (out, err)
        if source == "run":
            assert vspdf("convert", run, tmp_path / "again")[0] == 0
    out = vspdf("generate", run, "--prompt", "Capital of Italy?", "--temperature", 0, "--tokens", 8)[1]
    assert out.strip().endswith("Rome")
    assert vspdf("convert", tmp_path / "again", tmp_path / "third")[0] == 0
    assert checkpoints.load(tmp_path / "third").tokenizer.about == checkpoints.load(run).tokenizer.about


def test_conversations_keep_their_template_where_relations_are_lowered(folder, tmp_path):
    said = [{"role": "user", "content": "A : IS NEAR : B"}, {"role": "assistant", "content": "It is."}]
    path, words, told = tmp_path / "pairs.jsonl", checkpoints.load(folder).tokenizer, []
    path.write_text(json.dumps({"messages": said}) + '\n{"context": "C : IS NEAR : D", "completion": "So."}\n')
    config = DataConfig(path=str(path), validation_path=str(path), lower_relations=True)
    found = pairs.prepare(resolve_task(config, 64), 0, words)
    assert found.chat and words.decode(found.prompt()).startswith("user\nA : IS NEAR : B\nassistant")
    task = {"lower_relations": True, "chat": True}
    prompts = answers.read_prompts(path, "auto", task, None, told.append)
    assert prompts.texts == ["A : IS NEAR : B", "C : is near : D"] and len(told) == 1
    first = answers.read_prompts(path, "auto", task, 1, told.append)
    one = answers.one_prompt("A : IS NEAR : B", task, told.append)
    assert [*map(said_in, first.texts)] == [*map(said_in, one.texts)] == [(("user", "A : IS NEAR : B"),)]
    assert len(told) == 1


def test_verbs_take_a_folder(folder, vspdf, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(TEXTS) * 4)
    status, out, err = vspdf("eval", folder, "--text", tmp_path / "text.txt", "--json")
    assert status == 0 and 0 < json.loads(out)["val_bits_per_byte"] < 20, err
    status, out, err = vspdf("plan", "--model", folder, "--sparsity", 0.9, "--json")
    assert status == 0 and 0 < json.loads(out)["flops_saved_fraction"] < 0.9, err
    status, out, err = vspdf("simulate", "step", "--model", folder, "--batch", 64, "--sparsity", 0.75, "--json")
    assert status == 0 and json.loads(out)["speedup"]["central"] > 0, err
