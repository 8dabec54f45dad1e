"""Numbers and names that a verb cannot do anything with: one line, before anything is lost or takes for ever."""

import pytest

from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.evaluate.generate import Decoding
from vspdf.train.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    train(loading.load(tiny_config(folder), ["phases=[{steps: 1}]"]), say=lambda line: None)
    return folder / "run"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed", "-1"], "error: --seed -1: expected 0 or more"),
        (["--temperature", "inf"], "error: --temperature inf: expected a finite number of 0 or more"),
        (["--beams", "2", "--length-penalty", "nan"], "error: --length-penalty nan: expected a finite number"),
        (["--prompt", "\udcff"], "error: --prompt is no UTF-8 text"),
        (["--beams", "100000"], "error: --beams 100000: expected 1 to 1,000, each costs as much as an answer"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_text_that_cannot_be_made(trained, refused, arguments, message):
    refused(message, "generate", trained, "--prompt", "a", "--json", *arguments)


def test_no_temperature_is_too_low(trained, vspdf):
    texts = [vspdf("generate", trained, "--prompt", "a", "--temperature", of)[1] for of in ("1e-9", "1e-320")]
    assert texts[0] == texts[1] and texts[0].strip() != "a"


def test_text_is_made_by_one_process(trained, refused, monkeypatch):
    for key, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    refused("generate is one process", "generate", trained, "--prompt", "a")


@pytest.mark.parametrize(
    "key, value",
    [("max_tokens", 0), ("beams", "4"), ("no_repeat_ngram", -1), ("seed", 0.5), ("temperature", None), ("beams", True)],
)
def test_what_a_file_says_of_decoding_is_checked_too(key, value):
    with pytest.raises(UserError, match=f"^`{key}` {value}: expected "):
        Decoding(**{key: value})


def test_a_report_overwrites_no_other_file(trained, refused, vspdf, tmp_path):
    notes, page = tmp_path / "notes.md", tmp_path / "page.html"
    notes.write_text("# What I found\n")
    refused(r"'.*notes.md' exists and is no HTML page: it is not overwritten", "report", trained, "--output", notes)
    assert notes.read_text() == "# What I found\n"
    for _ in range(2):  # new, and over a report
        assert vspdf("report", trained, "--output", page)[0] == 0


def test_tasks_without_a_name(trained, refused):
    refused("--tasks ',': expected names of tasks with commas between them", "eval", trained, "--tasks", ",")


def test_more_threads_than_can_be_started(tiny, tmp_path, refused):
    refused(
        r"train.threads = 100000: expected at most \d+; this machine has \d+ cores",
        "train",
        tiny,
        "train.threads=100000",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["linear", "update", "step", "decode"])
def test_more_threads_than_a_benchmark_can_start(refused, verb):
    refused(r"--threads = 100000: expected at most \d+", "bench", verb, "--threads", 100000)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("linear --shapes 99999999999x9999999x4", "--shapes 99999999999x9999999x4 would need .* GiB of memory at"),
        ("linear --pattern banded --shapes 8x64x64 --tokens 99999999999", "--tokens 99999999999 with banded.* would"),
        ("update --shape 99999999999x64x64", "--shape 99999999999x64x64 would need"),
        ("step --d-model 12000000", "such a model and batch would need"),
        ("step --batch-size 99999999999", "such a model and batch would need"),
    ],
)
def test_a_benchmark_that_does_not_fit_the_memory(refused, arguments, message):
    refused(message, "bench", *arguments.split())


def test_a_folder_of_texts_is_not_meant_for_itself(tmp_path, vspdf):
    (tmp_path / "dir").mkdir()
    status, out, err = vspdf("bleu", tmp_path / "dir", tmp_path / "dir", "--json")
    assert (status, out) == (2, "") and "dir' is a folder: expected a file of one text a line." in err
    assert "Did you mean" not in err
