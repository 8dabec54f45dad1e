"""lm-evaluation-harness on a model in memory, with real tasks of a few lines; no data set is reachable."""

import json
import math

import pytest
import torch

from vspdf.data.tokenizer import Tokenizer
from vspdf.evaluate import harness
from vspdf.evaluate.harness import CEREBRAS7, evaluate_tasks, score_continuations
from vspdf.interop import checkpoints
from vspdf.model import GPT
from vspdf.shapes import Shape

CHOICE = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDERquestions.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: questions.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {data_files: {test: questions.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"question": "the sky is", "choices": [" blue", " made of long words"], "answer": 0},
    {"question": "two and two", "choices": [" five", " four"], "answer": 1},
    {"question": "x" * 70, "choices": [" no", " yes", " maybe"], "answer": 2},
    {"question": "water", "choices": ["!", "?"], "answer": 1},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.bytewise()


@pytest.fixture(scope="module")
def model():
    return GPT(Shape(2, 32, 4, 64, 257, 48), init_std=0.3, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks whose data lie beside them; one takes the name of a published task, one has lost its data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.json").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "choice.yaml").write_text(CHOICE.replace("NAME", "local_choice").replace("FOLDER", ""))
    (folder / "piqa.yaml").write_text(CHOICE.replace("NAME", "piqa").replace("FOLDER", f"{folder}/"))
    (folder / "lost.yaml").write_text(CHOICE.replace("NAME", "local_lost").replace("FOLDER", "lost-"))
    (folder / "text.yaml").write_text(TEXT)
    (folder / "until.yaml").write_text(UNTIL)
    return folder


def plain_score(model, context, continuation):
    """One text at a time, the plain way."""
    ids = torch.tensor([*context, *continuation])[-49:]
    n = min(len(continuation), len(ids) - 1)
    logprobs = model(ids[None, :-1])[0].log_softmax(-1)[-n:].detach()
    targets = ids[-n:]
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def test_continuations_are_scored_as_one_by_one(model):
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (5, 3), (47, 1), (48, 1), (60, 4), (2, 60), (30, 20)]
    rows = [tuple(torch.randint(257, (n,), generator=generator).tolist() for n in pair) for pair in sizes]
    likely = int(model(torch.tensor([[7, 8]]))[0, -1].argmax())
    rows.append(([7, 8], [likely]))
    expected = [plain_score(model, *row) for row in rows]
    for batch_size in (1, 3, 16):
        found = score_continuations(model, rows, batch_size)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and model.training


def test_a_local_task_for_real(model, tokenizer, folder):
    """Accuracy as computed by hand from log-probabilities; acc_norm divides by the characters of a choice."""
    result = evaluate_tasks(model, tokenizer, ["local_choice"], folder=folder)
    right = right_norm = 0
    for row in QUESTIONS:
        context = tokenizer.encode(row["question"]).tolist()
        # The harness puts a space between question and choice.
        scores = [plain_score(model, context, tokenizer.encode(f" {c}").tolist())[0] for c in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
        norm = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right_norm += norm.index(max(norm)) == row["answer"]
    row = result["tasks"]["local_choice"]
    assert row["metrics"] == {"acc": right / 4, "acc_norm": right_norm / 4}
    assert (row["samples"], row["few_shot"], result["average"], result["missing"]) == (4, 0, right / 4, {})


def test_rolling_and_generating_tasks(model, tokenizer, folder):
    result = evaluate_tasks(model, tokenizer, ["local_text", "local_until"], folder=folder, limit=3)
    nats = size = 0
    for row in QUESTIONS[:3]:
        ids = [256, *tokenizer.encode(row["question"]).tolist()]
        for start in range(0, len(ids) - 1, 48):
            nats -= plain_score(model, ids[start : start + 1], ids[start + 1 : start + 49])[0]
        size += len(row["question"].encode())
    found = result["tasks"]["local_text"]["metrics"]["bits_per_byte"]
    assert found == pytest.approx(nats / size / math.log(2), rel=1e-4)
    assert result["tasks"]["local_until"]["acc"] in (0, 1 / 3, 2 / 3, 1)
    assert result["tasks"]["local_text"]["samples"] == 3


def test_what_cannot_be_reached_is_named_and_the_rest_printed(vspdf, folder, tmp_path, tiny):
    assert vspdf("train", tiny, "phases=[{steps: 1}]")[0] == 0
    names = "cerebras7,local_choice,local_lost"
    status, out, err = vspdf("eval", tmp_path / "run", "--tasks", names, "--task-folder", folder, "--json")
    body = json.loads(out)
    assert status == 0 and set(body["tasks"]) == {
        "piqa",
        "local_choice",
    }  # a task of the folder goes before the known one
    assert set(body["missing"]) == {*CEREBRAS7, "local_lost"} - {"piqa"}
    assert "hellaswag was not evaluated: ConnectionError: Couldn't reach 'Rowan/hellaswag'" in err
    assert body["average"] == sum(row["acc"] for row in body["tasks"].values()) / 2
    status, out, _ = vspdf("eval", tmp_path / "run", "--tasks", "local_choice", "--task-folder", folder)
    assert status == 0 and "average of 1" in out and "acc_norm" in out
    status, out, err = vspdf("eval", tmp_path / "run", "--tasks", "winogrande")
    assert (
        status == 2 and "no task could be evaluated" in err.splitlines()[-1] and "winogrande was not evaluated" in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "hellaswg"], "no task 'hellaswg'. Did you mean 'hellaswag'"),
        (["--tasks", "piqa", "--task-folder", "nowhere"], "'nowhere' holds no task"),
        (["--task-folder", "nowhere"], "--task-folder goes with --tasks"),
    ],
    ids=["task", "folder", "folder alone"],
)
def test_wrong_names(vspdf, tiny, tmp_path, arguments, message):
    assert vspdf("train", tiny, "phases=[{steps: 1}]")[0] == 0
    status, _, err = vspdf("eval", tmp_path / "run", *arguments)
    assert status == 2 and message in err.splitlines()[-1]


def test_a_hugging_face_folder_has_no_held_out_text(vspdf, tiny, tmp_path):
    assert vspdf("train", tiny, "phases=[{steps: 1}]")[0] == 0
    assert vspdf("convert", tmp_path / "run", tmp_path / "hf")[0] == 0
    status, _, err = vspdf("eval", tmp_path / "hf")
    assert status == 2 and "has no run with held-out text: give --text FILE, or --tasks" in err


def test_a_text_of_ones_own_on_a_run_and_on_a_hugging_face_folder(vspdf, tiny, tmp_path):
    assert vspdf("train", tiny, "phases=[{sparsity: 0.5, steps: 2}]")[0] == 0
    assert vspdf("convert", tmp_path / "run", tmp_path / "hf")[0] == 0
    text = "Grüße, said she.\n\nAnd again, at some length: nothing.\n"
    (tmp_path / "own.txt").write_text(text)
    bodies = []
    for place in ("run", "hf"):
        status, out, err = vspdf("eval", tmp_path / place, "--text", tmp_path / "own.txt", "--json")
        assert status == 0 and "tokens" in err.splitlines()[-1] and "ETA 0:00" in err
        bodies.append(json.loads(out))
    size = len(text.encode())
    assert bodies[0]["text"] == bodies[1]["text"]
    assert (bodies[0]["text"]["documents"], bodies[0]["text"]["bytes"], bodies[0]["text"]["tokens"]) == (
        1,
        size,
        size + 1,
    )
    assert bodies[0]["val_loss"] == pytest.approx(bodies[1]["val_loss"], rel=1e-5)
    # By hand: every byte and the end of the document is a target once, in windows of 16.
    model, words, _ = checkpoints.load(tmp_path / "hf")
    ids = torch.tensor([words.end_of_document, *words.encode(text).tolist(), words.end_of_document])
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17][None]
            nats += float(model(window[:, :-1], window[:, 1:])) * (window.shape[1] - 1)
    assert bodies[1]["val_loss"] == pytest.approx(nats / (size + 1), rel=1e-5)
    assert bodies[1]["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "own.tx"], "Did you mean 'own.txt'?"),
        (["--text", "empty.txt"], "'empty.txt' is empty: expected text."),
        (["--text", "own.txt", "--tasks", "piqa"], "--text and --tasks are two evaluations: give one of them."),
        (["--text", "own.txt", "--device", "cuda:7"], "--device = 'cuda:7': torch sees "),
        (["--text", "own.txt", "--device", "gpu"], "--device = 'gpu' is not known."),
    ],
    ids=["missing", "empty", "text and tasks", "no such device", "no device"],
)
def test_texts_that_cannot_be_scored(vspdf, tiny, tmp_path, monkeypatch, arguments, message):
    assert vspdf("train", tiny, "phases=[{steps: 1}]")[0] == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("Text.")
    (tmp_path / "empty.txt").write_text(" \n")
    status, out, err = vspdf("eval", "run", *arguments)
    assert (status, out) == (2, "") and message in err.splitlines()[-1]


def test_a_group_counts_once_beside_its_tasks():
    def rows(**scores):
        return {name: {"acc": score} for name, score in scores.items()}

    members = {"group_subtasks": {"group": ["a", "b"], "bare": ["a", "b"]}}
    assert harness._asked(members, "group", rows(group=0.83, a=0.0, b=1.0)) == 0.83  # weighted by the harness
    assert harness._asked(members, "bare", rows(bare=None, a=0.0, b=1.0)) == 0.5
    assert harness._asked({}, "a", rows(a=0.25)) == 0.25 and harness._asked({}, "a", rows(a=None)) is None
