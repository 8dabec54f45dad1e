"""The command line: what it prints where, and one clear line with status 2 for whatever the user can mend."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import typer

from vspdf.cli import app
from vspdf.runs import checkpoint


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run_once(vspdf, tiny, tmp_path):
    """A finished run of three steps."""
    status, _, err = vspdf("train", tiny, "phases=[{sparsity: 0.9, steps: 2}, {steps: 1}]", "train.checkpoint_every=1")
    assert status == 0, err
    return tmp_path / "run"


# -- figures to stdout, all else to stderr ----------------------------------------------------------------------------


def test_train_prints_a_table(vspdf, tiny, tmp_path):
    status, out, err = vspdf("train", tiny, "phases=[{sparsity: 0.9, steps: 8}, {steps: 2}]", "train.measure_dense=2")
    assert status == 0
    for word in (
        "sparse 0.9",
        "dense",
        "TFLOP executed",
        "validation bits/byte",
        "times faster",
        "really skipped",
        "By convention",
    ):
        assert word in out, word
    assert f"Everything is in {tmp_path}/run/" in out.replace("\n", "")
    assert "sparsity=0.9" in err and "ETA" in err and "of FLOPs skipped" in err and "times as fast" in err
    assert "weight_decay" not in err, "a default is told"


def test_json_is_one_object_on_stdout(vspdf, run_once, tiny, tmp_path):
    _, out, _ = vspdf("train", tiny, "phases=[{steps: 1}]", f"run_dir={tmp_path}/second", "--json")
    assert json.loads(out) == json.loads((tmp_path / "second" / "summary.json").read_text()) and out.count("\n") == 1
    _, out, _ = vspdf("eval", run_once, "--json")
    assert set(json.loads(out)) == {"checkpoint", "step", "val_loss", "val_bits_per_byte"}
    _, out, _ = vspdf("info", "--json")
    facts = json.loads(out)
    assert facts["backends"]["cpu"] == "available" and facts["hardware"]["isas"] and facts["versions"]["torch"]


def test_eval_measures_all_of_the_held_out_text(vspdf, run_once, tmp_path):
    status, out, _ = vspdf("eval", run_once, "--json")
    last = json.loads(out)
    assert status == 0 and last["step"] == 3
    _, out, _ = vspdf("eval", run_once / "checkpoints" / "step-00000002", "--json")
    assert json.loads(out)["step"] == 2 and json.loads(out)["val_loss"] != last["val_loss"]
    summary = json.loads((run_once / "summary.json").read_text())  # measured on 512 tokens of it
    assert last["val_loss"] == pytest.approx(summary["val_loss"], rel=0.05)
    _, out, _ = vspdf("eval", run_once)
    assert f"{last['val_loss']:.4f} nats/token" in out.replace("\n", " ")


def test_generate_goes_on_from_the_prompt(vspdf, run_once):
    status, out, _ = vspdf("generate", run_once, "--prompt", "def [bold]f", "--tokens", 20)
    assert status == 0 and out.startswith("def [bold]f") and len(out) > 20
    assert vspdf("generate", run_once, "--prompt", "def [bold]f", "--tokens", 20)[1] == out
    greedy = [vspdf("generate", run_once, "--temperature", 0, "--seed", seed, "--tokens", 5)[1] for seed in (0, 1)]
    assert greedy[0] == greedy[1]
    begun = vspdf(
        "generate", run_once / "checkpoints" / "step-00000002", "--tokens", 5
    )  # nothing is put into its mouth
    assert begun[0] == 0 and begun[1].strip() and not begun[1].startswith("def ")


def test_resume_goes_on(vspdf, tiny, run_once):
    status, out, err = vspdf(
        "train",
        tiny,
        "phases=[{sparsity: 0.9, steps: 2}, {steps: 1}]",
        "train.checkpoint_every=1",
        "--resume",
        "--json",
    )
    assert status == 0 and "resumed at step 3 of 3" in err and json.loads(out)["tokens"] == 3 * 128


def test_info_and_help(vspdf):
    status, out, _ = vspdf("info")
    assert status == 0 and "torch" in out and "cpu: available" in out
    status, out, _ = vspdf("--help")
    assert status == 0 and all(verb in out for verb in ("train", "eval", "generate", "info"))
    status, out, _ = vspdf("train", "--help")
    assert status == 0 and "vspdf train quickstart" in out


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(vspdf, folder, *arguments):
    """The one line of an error that leaves every file in `folder` as it was."""
    before = content(folder)
    status, out, err = vspdf(*arguments)
    assert status == 2 and out == "" and "Traceback" not in err
    assert content(folder) == before
    lines = [line for line in err.splitlines() if line.startswith("vspdf: error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("vspdf: error: ")


BAD_RUNS = {
    "missing corpus": ("data.corpus={folder}/tetx.txt", "not found"),
    "empty corpus": ("data.corpus={folder}/empty.txt", "empty"),
    "empty folder": ("data.corpus={folder}/none", "has no text"),
    "corpus shorter than a sequence": ("data.corpus={folder}/short.txt", "expected at least 17"),
    "sparsity of 1": ("phases.0.sparsity=1.0", "phases.0.sparsity must lie in [0, 1), not 1.0"),
    "sparsity below 0": ("phases.0.sparsity=-0.5", "phases.0.sparsity must lie in [0, 1), not -0.5"),
    "heads": ("model.n_head=5", "model.n_head = 5 does not divide model.d_model = 32"),
    "unknown key": ("model.n_layers=2", "Did you mean 'n_layer'?"),
    "unknown type": ("model.n_layer=two", "Value 'two' of type 'str' could not be converted to Integer"),
    "a percentage": ("phases.0.sparsity=90%", "must be a number, not '90%'. Did you mean 0.9?"),
    "a percentage without its sign": ("phases.0.sparsity=90", "not 90.0. Did you mean 0.9?"),
    "not what to do with long examples": ("data.overlong=cutt", "data.overlong = 'cutt' is not known. Did you mean"),
    "a setting of fine-tuning": ("data.lower_relations=true", "data.lower_relations = True is for fine-tuning"),
    "unknown tokenizer": ("data.tokenizer=byte", "Did you mean 'bytes'?"),
    "too many steps": ("phases.0.steps=100000", "set data.repeat=true"),
    "no run to resume": ("--resume", "holds no run"),
}


@pytest.mark.parametrize(
    "argument, message",
    [("phases.0.steps=1000000", "has at most"), ("init_from={folder}/none", "none'")],
    ids=["too many steps", "nothing to begin from"],
)
def test_what_a_text_cannot_give_is_said_before_it_is_tokenised(vspdf, tiny, tmp_path, argument, message):
    (tmp_path / "none").mkdir()
    words = " ".join(f"word{i}" for i in range(3000))
    (tmp_path / "text.txt").write_text("\n\n".join([words, words[1:], words[2:]]))
    text = [f"data.corpus={tmp_path}/text.txt", "data.tokenizer=bpe:300", f"data.cache_dir={tmp_path}/cache"]
    status, _, err = vspdf("train", tiny, *text, argument.format(folder=tmp_path))
    assert status == 2 and len(err.splitlines()) == 1 and message in err and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("argument, message", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_run_that_cannot_start_says_so_in_one_line_and_writes_nothing(vspdf, tiny, tmp_path, argument, message):
    (tmp_path / "text.txt").write_text("words " * 1000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "none").mkdir()
    assert message in refused(vspdf, tmp_path, "train", tiny, argument.format(folder=tmp_path))
    assert not (tmp_path / "run").exists()


def test_missing_and_broken_configurations(vspdf, tmp_path):
    assert "Did you mean 'quickstart'?" in refused(vspdf, tmp_path, "train", "quickstrat")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "is not valid YAML" in refused(vspdf, tmp_path, "train", tmp_path / "broken.yaml")


@pytest.mark.parametrize("verb", ["eval", "train", "convert", "report"])
def test_a_name_that_is_too_long_is_one_line(vspdf, tmp_path, verb):
    others = [tmp_path / "out"] if verb == "convert" else []
    status, _, err = vspdf(verb, "a" * 5000, *others)
    assert status == 2 and "is longer than the name of a file can be" in " ".join(err.split())


def test_a_directory_that_holds_a_run(vspdf, tiny, run_once):
    assert "already holds a run: --resume" in refused(vspdf, run_once, "train", tiny)


def test_a_checkpoint_of_another_model(vspdf, tiny, tmp_path, run_once):
    vspdf("train", tiny, "model.d_ff=64", "phases=[{steps: 1}]", f"run_dir={tmp_path}/other")
    shutil.copytree(tmp_path / "other/checkpoints/step-00000001", run_once / "checkpoints/step-00000009")
    message = refused(vspdf, run_once, "train", run_once / "config.yaml", "--resume")
    assert message == "the checkpoint belongs to another model: its d_ff is 64, here it is 128."


@pytest.mark.parametrize(
    "arguments", [("eval", "{run}"), ("train", "{run}/config.yaml", "--resume")], ids=lambda a: a[0]
)
def test_a_checkpoint_of_another_corpus(vspdf, run_once, corpus, arguments):
    text = corpus.read_text()
    try:
        corpus.write_text(text + "more\n")
        message = refused(vspdf, run_once, *(argument.format(run=run_once) for argument in arguments))
        assert ("has changed since" if arguments[0] == "eval" else "belongs to another corpus") in message
    finally:
        corpus.write_text(text)


VERBS = {"eval": ["eval"], "generate": ["generate"], "resume": ["train", "--resume"]}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "bit-flipped"])
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_damaged_checkpoint(vspdf, run_once, verb, damage, name):
    file = run_once / "checkpoints" / "step-00000003" / name
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    target = run_once / "config.yaml" if verb[0] == "train" else run_once
    message = refused(vspdf, run_once, *verb, target)
    assert f"{name} is damaged" in message
    assert "move that folder out of checkpoints/ to resume from step-00000002" in message


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_no_checkpoint(vspdf, tmp_path, verb):
    assert f"no checkpoint in '{tmp_path}'" in refused(vspdf, tmp_path, verb, tmp_path)


BAD_BENCH = {
    "shape of two": (["linear", "--shapes", "3x4"], "--shapes '3x4': expected TOKENSxINxOUT"),
    "shape of words": (["linear", "--shapes", "axbxc"], "expected TOKENSxINxOUT"),
    "shape of four": (["update", "--shape", "8x16x16xmany"], "--shape '8x16x16xmany': expected TOKENSxINxOUT"),
    "two shapes": (["update", "--shape", "8x16x16,8x16x16"], "--shape '8x16x16,8x16x16': expected TOKENSxINxOUT"),
    "sparsity of words": (["linear", "--sparsity", "0.5,x"], "--sparsity '0.5,x': expected numbers with commas"),
    "sparsity above 1": (["linear", "--sparsity", "1.5"], "--sparsity '1.5': expected numbers from 0 to 1, not 1.5"),
    "no thread": (["linear", "--threads", "0"], "--threads '0': expected numbers of at least 1, not 0"),
    "table into no folder": (["linear", "--csv", "no/such/x.csv"], "--csv 'no/such/x.csv': there is no folder no/such"),
    "plot of no kind": (["linear", "--plot", "x.xyz"], "--plot 'x.xyz': expected a name that ends in .png or"),
    "a step's table": (["step", "--csv", "x.txt"], "--csv 'x.txt': expected a name that ends in .csv"),
    "a step's sparsity": (["step", "--sparsity", "-0.5"], "expected numbers from 0 to 1, not -0.5"),
    "no layer": (["step", "--n-layer", 0], "invalid value for '--n-layer'"),
    "heads": (["step", "--n-head", 5], "model.n_head = 5 does not divide model.d_model = 768"),
}


@pytest.mark.parametrize("arguments, message", BAD_BENCH.values(), ids=BAD_BENCH)
def test_a_benchmark_that_cannot_run_says_so_before_it_measures(vspdf, tmp_path, arguments, message):
    assert message in refused(vspdf, tmp_path, "bench", *arguments)


def test_an_empty_prompt(vspdf, run_once):
    assert "the prompt is empty" in refused(vspdf, run_once, "generate", run_once, "--prompt", "")


def test_a_loss_that_is_no_number(vspdf, tiny, tmp_path):
    status, out, err = vspdf("train", tiny, "optimizer.lr=1e18", "train.checkpoint_every=1")
    last = err.splitlines()[-1]
    assert status == 2 and out == "" and "Traceback" not in err
    assert last.startswith("vspdf: error: the ") and "training stopped" in last and "is intact" in last
    checkpoint.read(tmp_path / "run")


LIMITED = """
import resource, sys
from vspdf.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
main()
"""


def test_no_room_for_a_checkpoint(vspdf, tiny, tmp_path):
    """A real failure of the write, in a process that may make no file above 150 kB."""
    phases = "phases=[{sparsity: 0.9, steps: 2}, {steps: 2}]"
    vspdf("train", tiny, "phases=[{steps: 1}]", f"run_dir={tmp_path}/first")  # tokens are cached now
    arguments = ["train", str(tiny), phases, "train.checkpoint_every=1"]  # the dense checkpoint is the larger one
    result = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "checkpoint of step 3 was not written" in last and last.endswith("earlier ones are kept.")
    assert checkpoint.read(tmp_path / "run").state["step"] == 2


def test_errors_are_all_that_is_said(vspdf, tiny, run_once, tmp_path):
    """The commonest ones, without a configuration before them."""
    for arguments in (
        [], ["data.corpus=none.txt", f"run_dir={tmp_path}/a"], [f"run_dir={tmp_path}/b", "--resume"],
        ["train.device=cuda:99", f"run_dir={tmp_path}/c"],
    ):  # fmt: skip
        status, out, err = vspdf("train", tiny, *arguments)
        assert status == 2 and out == "" and err.count("\n") == 1, err


def test_more_threads_than_cores_get_a_word(vspdf, tiny):
    cores = os.cpu_count()
    _, _, err = vspdf("train", tiny, "phases=[{steps: 1}]", f"train.threads={2 * cores}")
    assert f"{2 * cores} threads on {cores} cores take turns" in err


def test_ctrl_c_ends_in_one_line(tmp_path):
    """Of a verb that has nothing to save."""
    command = "import signal; signal.alarm(60); from vspdf.cli import main; main()"
    arguments = ["bench", "step", "--n-layer", "1", "--d-model", "32", "--n-head", "2", "--rounds", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines = [process.stderr.readline()]
    process.send_signal(2)
    lines += process.communicate()[1].splitlines()
    assert lines[-1] == "vspdf: stopped." and process.returncode == 130 and "Traceback" not in "".join(lines)


def test_a_dropped_ctrl_c_comes_again(monkeypatch):
    """Python drops it where it comes in a finaliser, or while an import's lock is given back."""

    class Finalised:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", app._insist)
    with pytest.raises(KeyboardInterrupt):
        Finalised()
        time.sleep(20)


# -- usage ------------------------------------------------------------------------------------------------------------


def verbs(group=None, path=()):
    """Every verb, by its words: of whatever the command line has."""
    for name, command in (group or typer.main.get_command(app.app)).commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name), command


VERBS_ALL = dict(verbs())


@pytest.mark.parametrize("verb", VERBS_ALL, ids=" ".join)
def test_every_verb_explains_itself_with_an_example(vspdf, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = vspdf(*verb, "--help")
    assert status == 0 and err == ""
    examples = [line for line in out.splitlines() if line.startswith(f" vspdf {' '.join(verb)}")]
    assert examples, "no example in the docstring"


@pytest.mark.parametrize("verb", VERBS_ALL, ids=" ".join)
def test_an_unknown_option_is_one_line(vspdf, tmp_path, verb):
    assert refused(vspdf, tmp_path, *verb, "--hepl") == "no such option '--hepl'. Did you mean '--help'?"


NEEDY = {verb for verb, command in VERBS_ALL.items() if any(parameter.required for parameter in command.params)}


@pytest.mark.parametrize("verb", sorted(NEEDY), ids=" ".join)
def test_a_missing_argument_is_one_line(vspdf, tmp_path, verb):
    message = refused(vspdf, tmp_path, *verb)
    assert message.startswith("missing ") and f"Usage: vspdf {' '.join(verb)}" in message


USAGE = {
    "verb misspelt": (["trian"], "no such command 'trian'. Did you mean 'train'?"),
    "verb unknown": (["xyzzy"], "no such command 'xyzzy'. Known: train, eval,"),
    "verb of a group": (["bench", "linaer"], "Did you mean 'linear'?"),
    "option without its value": (["plan", "--model"], "option '--model' requires an argument."),
    "tune on a CPU": (["bench", "linear", "--tune"], "--tune is for --device cuda"),
    "unknown device": (["bench", "linear", "--device", "tpu"], "--device 'tpu' is not known: cpu or cuda."),
    "no number": (["plan", "--model", "gpt2-small", "--save", "much"], "invalid value for '--save'"),
    "too small": (["generate", "run", "--tokens", 0], "invalid value for '--tokens'"),
    "one argument too many": (["info", "more"], "unexpected extra argument(s) (more). Usage: vspdf info [OPTIONS]"),
    "a percentage": (["plan", "--model", "x", "--save", "90%"], "'90%' is not a number. Did you mean 0.9?"),
    "a percentage among numbers": (["bench", "linear", "--sparsity", "0.5,90%"], "Did you mean 0.9?"),
    "a percentage of phases": (["plan", "--model", "gpt2-small", "--phases", "75%:9"], "Did you mean 0.75?"),
    "a percentage without its sign": (["plan", "--model", "gpt2-small", "--sparsity", 75], "Did you mean 0.75?"),
    "advice on a run": (["plan", "--hours", 1, "--sparsity", 0.5], "--sparsity plans a run of a --model, which one?"),
    "nothing near": (["train", "x", "--no-such"], "no such option '--no-such'. Known: --resume, --json"),
}


def test_the_version(vspdf):
    status, out, err = vspdf("--version")
    assert (status, err) == (0, "") and re.fullmatch(r"vspdf \d+\.\d+\S*\n", out)


def test_a_finished_run_names_what_goes_on_from_it(vspdf, tiny, run_once, tmp_path):
    phases = "phases=[{sparsity: 0.9, steps: 2}, {steps: 5}]"
    message = refused(vspdf, tmp_path, "train", tiny, phases, "train.checkpoint_every=1", "--resume")
    assert f"phases.1.steps was 1, is now 5. The run is finished: init_from={run_once}" in message
    status, _, err = vspdf("train", tiny, "phases=[{steps: 1}]", f"init_from={run_once}", f"run_dir={tmp_path}/on")
    assert status == 0 and f"starting from {run_once} (step 3)" in err


def test_only_names_that_are_alike_are_meant(vspdf, tmp_path):
    (tmp_path / "short.txt").write_text("words")
    near = {name: refused(vspdf, tmp_path, "bleu", tmp_path / name, "x") for name in ("no.txt", "shrot.txt")}
    assert near["no.txt"].endswith("not found.") and near["shrot.txt"].endswith(
        "Did you mean '{}'?".format(tmp_path / "short.txt")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_timings_without_a_gpu_are_one_line(vspdf, tmp_path):
    assert "torch sees no CUDA device here" in refused(vspdf, tmp_path, "bench", "linear", "--device", "cuda", "--tune")


@pytest.mark.parametrize("arguments, message", USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line(vspdf, tmp_path, arguments, message):
    assert message in refused(vspdf, tmp_path, *arguments)


@pytest.mark.parametrize("arguments", [[], ["bench"]], ids=["vspdf", "vspdf bench"])
def test_a_verb_left_out_prints_the_help(vspdf, arguments):
    status, out, err = vspdf(*arguments)
    assert status == 2 and "Usage: vspdf" in out and "error" not in err


def test_shells_can_complete():
    """What `--install-completion` sources, and what a shell asks with: verbs, options."""
    script = "import sys; sys.argv = ['vspdf']; from vspdf.cli import main; main()"
    shell = {**os.environ, "_VSPDF_COMPLETE": "complete_bash", "COMP_WORDS": "vspdf pl", "COMP_CWORD": "1"}
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=shell)
    assert asked.stdout.split() == ["plan"], asked.stderr


def test_the_installed_command(tiny, tmp_path):
    """End to end in a process of its own, as users start it."""
    command = [
        sys.executable,
        "-c",
        "from vspdf.cli import main; main()",
        "train",
        str(tiny),
        "phases=[{steps: 1}]",
        "--json",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)["tokens"] == 128
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and again.stdout == ""
    assert [line for line in again.stderr.splitlines() if "error" in line] == [again.stderr.splitlines()[-1]]
