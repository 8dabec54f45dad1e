"""Several processes train one model: real ones, over gloo, started as a user starts them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vspdf.cli import app
from vspdf.errors import RankLost, UserError
from vspdf.parallel import environment
from vspdf.train import trainer

# What goes by the clock or by the number of processes; all else in a line of metrics must be equal.
OWN = {
    "seconds", "training_seconds", "training_cpu_seconds", "step_seconds", "tokens_per_second",
    "communication_seconds", "communication_bytes",
}  # fmt: skip
PHASES = (
    "phases=[{name: sparse, sparsity: 0.9, sparsity_end: 0.5, schedule: linear, update_every: 3, steps: 9}, "
    "{name: dense, steps: 3}]"
)
SETTINGS = (
    PHASES,
    "train.micro_batch_size=2",
    "train.eval_every=6",
    "train.checkpoint_every=4",
    "train.measure_dense=1",
)
MOVING = (
    "phases=[{name: set, sparsity: 0.9, steps: 5, algorithm: set, update: {freq: 2}}, "
    "{name: rigl, sparsity: 0.5, steps: 5, algorithm: rigl, update: {freq: 2}}, {name: dense, steps: 2}]",
    "train.micro_batch_size=2",
    "train.checkpoint_every=4",
)

# Runs commands one after the other on every rank; each is a list of arguments, and what goes wrong on which rank.
CHILD = """
import json, os, signal, sys, types
from vspdf.cli import app, train
from vspdf.kernels import hardware
from vspdf.parallel import meeting, world
from vspdf.sparsity import surgery
from vspdf.train import common, trainer

rank, folder = int(os.environ["RANK"]), sys.argv[1]
step, versions, seed = trainer._step, hardware.versions, surgery.layer_seed
weights = common.weights
train._draw = lambda folder: None  # reports take seconds
world.time, meeting.CALL = types.SimpleNamespace(sleep=lambda seconds: None), 1.0
for number, order in enumerate(json.loads(sys.argv[2])):
    fault = order.get("fault", {})
    mine = fault.get("rank") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def faulty(state, *rest, fault=fault, mine=mine):
        if mine and state.step == fault.get("step"):
            os.kill(os.getpid(), fault["signal"])
        return step(state, *rest)

    trainer._step = faulty
    hardware.versions = lambda mine=mine: versions() | ({"torch": "1.0"} if mine and fault.get("version") else {})
    surgery.layer_seed = lambda a, name, mine=mine: seed(a, name) + bool(mine and fault.get("mask"))
    drift = {"value in 'wte.weight'": "?"}
    common.weights = lambda s, when=fault.get("drift") if mine else None: weights(s) | (drift if when == s.step else {})
    stream = os.open(f"{folder}/said-{number}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    sys.argv = ["vspdf", *order["arguments"], *(fault.get("overrides", []) if mine else [])]
    try:
        app.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    with open(f"{folder}/status-{number}-{rank}", "w") as file:
        file.write(str(status))
"""


class Ranks:
    """`orders` carried out by processes that train together; what each of them said, and its exit status."""

    def __init__(self, folder, size, *orders, restarts=0):
        folder.mkdir(exist_ok=True)
        self.folder, script = folder, folder / "child.py"
        script.write_text(CHILD)
        self.command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
            f"--max-restarts={restarts}", str(script), str(folder), json.dumps(orders),
        ]  # fmt: skip
        self.result = subprocess.run(self.command, capture_output=True, text=True, timeout=120)

    def status(self, number, rank=0):
        return int((self.folder / f"status-{number}-{rank}").read_text())

    def said(self, number, rank=0):
        return " ".join((self.folder / f"said-{number}-{rank}").read_text().split())


def order(*arguments, **fault):
    return {"arguments": [str(argument) for argument in arguments], "fault": fault}


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(run, other, step=12):
    """Whether two runs have the same metrics, weights and moments, to the last bit."""
    plain = [[{k: v for k, v in line.items() if k not in OWN} for line in lines(folder)] for folder in (run, other)]
    assert plain[0] == plain[1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / "checkpoints" / f"step-{step:08d}" / name) for folder in (run, other))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def configured(place, tiny_config):
    return tiny_config(place)


@pytest.fixture(scope="module")
def alone(place, configured):
    """Trains in this process."""

    def train(name, settings):
        sys.argv = ["vspdf", "train", str(configured), f"run_dir={place}/{name}", *settings]
        with pytest.raises(SystemExit) as end:
            app.main()
        assert not end.value.code
        return place / name

    return train


@pytest.fixture(scope="module")
def one(alone):
    """The run of one process that all others must equal."""
    return alone("one", SETTINGS)


@pytest.fixture(scope="module")
def two(place, configured, one):
    """Two processes: what ends well, and what is refused or stopped."""
    train = ("train", configured, *SETTINGS)
    (place / "other.txt").write_text((place / "tiny.yaml").read_text() * 30 + "\n\n" + "else" * 300)
    return Ranks(
        place / "two", 2,
        order(*train, f"run_dir={place}/two-run"),
        order(*train, f"run_dir={place}/stopped", rank=1, step=5, signal=signal.SIGTERM),
        order(*train, f"run_dir={place}/ddp", "train.data_parallel=ddp"),
        order(*train, f"run_dir={place}/odd", "train.batch_size=6"),
        order(*train, f"run_dir={place}/corpus", rank=1, overrides=[f"data.corpus={place}/other.txt"]),
        order(*train, f"run_dir={place}/lr", rank=1, overrides=["optimizer.lr=0.002"]),
        order(*train, f"run_dir={place}/version", rank=1, version=True),
        order(*train, f"run_dir={place}/mask", rank=1, mask=True),
        order(*train, f"run_dir={place}/drift", rank=1, drift=8),
        order(*train, f"run_dir={place}/bad", rank=1, overrides=["train.batch_size=none"]),
        order("eval", one, "--json"),
        order("compare", "toy"),
        order(*train, f"run_dir={place}/one-micro", "train.micro_batch_size=8", "phases=[{sparsity: 0.9, steps: 2}]"),
        order("train", configured, *MOVING, f"run_dir={place}/moving"),
        order("train", configured, *MOVING, f"run_dir={place}/moving-ddp", "train.data_parallel=ddp"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def four(place, configured, two):
    """Four processes: a run, and one that goes on where two were stopped."""
    train = ("train", configured, *SETTINGS)
    return Ranks(
        place / "four", 4, order(*train, f"run_dir={place}/four-run"),
        order(*train, f"run_dir={place}/stopped", "--resume"),
    )  # fmt: skip


def test_two_end_as_one(place, one, two):
    assert two.status(0) == 0 and two.status(0, 1) == 0, two.said(0)
    assert same(place / "two-run", one)
    assert "2 processes share every step, 1 thread each" in two.said(0) and not two.said(0, 1)


def test_four_end_as_one(place, one, four):
    assert four.status(0) == 0, four.said(0)
    assert same(place / "four-run", one)


def test_masks_move_alike_on_all(place, alone, two):
    """Drawn, and by dense gradients that are summed over ranks; ranks whose masks differ are refused."""
    single = alone("moving-alone", MOVING)
    assert two.status(13) == two.status(14) == 0, two.said(13) + two.said(14)
    assert same(place / "moving", single)
    assert len({line["mask_overlap"] for line in lines(single) if "mask_overlap" in line}) > 3, "masks that moved"
    for ours, theirs in zip(lines(single), lines(place / "moving-ddp"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-3)


def test_gradients_travel_at_nnz(place, one, two, four):
    """A rank sends as many bytes as a ring would have it: 2 (W - 1) / W of what is trained."""
    assert {line["communication_bytes"] for line in lines(one)} == {0}
    for size, run in ((2, "two-run"), (4, "four-run")):
        for step in (8, 12):
            line = lines(place / run)[step - 1]
            held = load_file(place / run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
            trained = sum(tensor.numel() for name, tensor in held.items() if not name.endswith(".pattern"))
            assert line["communication_bytes"] == pytest.approx(2 * (size - 1) / size * 4 * trained, rel=1e-3)
            assert line["communication_seconds"] > 0
    sparse, dense = (lines(place / "two-run")[i]["communication_bytes"] for i in (0, -1))
    assert sparse < 0.5 * dense


@pytest.mark.parametrize("size, run", [(2, "two-run"), (4, "four-run")], ids=["two", "four"])
def test_a_plan_says_what_a_run_counts(place, two, four, vspdf, size, run):
    status, out, err = vspdf(
        "plan", "--model", place / run / "config.yaml", "--machines", size, "--network", 1, "--json"
    )
    assert status == 0, err
    found, counted = json.loads(out)["machines"], [line["communication_bytes"] for line in lines(place / run)]
    assert found["bytes_per_step"]["planned"] == pytest.approx(sum(counted) / len(counted), rel=0.02)
    assert found["bytes_per_step"]["dense"] == pytest.approx(counted[-1], rel=0.02)
    assert found["allreduce_seconds"]["dense"] == pytest.approx(8 * counted[-1] / 0.94e9, rel=0.02)
    assert 0 < found["efficiency"]["dense"] <= 1.1 and found["efficiency"]["planned"] > 0


def test_a_plan_for_machines_that_cannot_share(place, one, refused):
    model = ("plan", "--model", one / "config.yaml")
    refused(
        "3 machines cannot share the 8 sequences of a step evenly: --machines 1, 2, 4 or 8", *model, "--machines", 3
    )
    refused("--network goes with --machines: how many are there", *model, "--network", 1)
    refused("--machines must be at least 1, not 0", *model, "--machines", 0)
    refused("--network must be positive, in gigabits a second, not 0", *model, "--machines", 2, "--network", 0)


def test_sigterm_to_one_stops_all_and_another_number_goes_on(place, one, two, four):
    assert two.status(1) == two.status(1, 1) == 130
    assert "stopped after step 6; a checkpoint was written: --resume goes on." in two.said(1) and not two.said(1, 1)
    assert four.status(1) == 0 and "resumed at step 6 of 12" in four.said(1)
    assert same(place / "stopped", one)


def test_ddp_is_near(place, one, two):
    assert two.status(2) == 0, two.said(2)
    for ours, theirs in zip(lines(one), lines(place / "ddp"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-4) and theirs["flops"] == ours["flops"]
        assert theirs["communication_bytes"] > 0
    assert lines(place / "ddp")[0]["loss"] == pytest.approx(lines(one)[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "number, words",
    [
        (3, r"2 processes cannot share the 3 micro-batches of a step evenly \(phases.0: batch_size = 6, "
            r"train.micro_batch_size = 2\): start 1 or 3."),
        (4, "rank 1 on .* has another setting data.corpus than rank 0: "),
        (5, "rank 1 on .* has another setting optimizer.lr than rank 0: 0.002, not 0.003."),
        (6, r"rank 1 on .* has another version of torch than rank 0: 1.0, not "),
        (7, r"rank 1 on .* has another mask of 'h.0.attn.c_attn' than rank 0"),
        (9, "rank 1 on .*: override 'train.batch_size=none'"),
    ],
    ids=["3 micro-batches", "corpus", "setting", "version", "mask", "a bad setting on one"],
)  # fmt: skip
def test_refused_before_the_first_step(two, place, number, words):
    assert two.status(number) == two.status(number, 1) == 2
    assert re.search(words, two.said(number)) and not two.said(number, 1), two.said(number)
    name = json.loads(two.command[-1])[number]["arguments"][-1 if number != 3 else -2].removeprefix("run_dir=")
    assert not Path(name).exists() or not lines(Path(name))


def test_ranks_that_drift_apart_are_found_at_the_next_checkpoint(two):
    assert two.status(8) == 2
    assert "rank 1 on" in two.said(8) and "has another value in 'wte.weight' than rank 0: ?, not" in two.said(8)
    assert "set ATEN_CPU_CAPABILITY to what all have" in two.said(8)


def test_evaluation_is_shared(one, two, vspdf):
    status, out, _ = vspdf("eval", one, "--json")
    assert status == 0 and two.status(10) == 0
    assert json.loads(out.strip().splitlines()[-1]).items() <= json.loads("{" + two.said(10).split("{", 1)[1]).items()


def test_compare_is_one_process(two):
    assert two.status(11) == 2
    assert "--jobs N spreads a study over the cores of one machine" in two.said(11) and not two.said(11, 1)


def test_a_step_of_one_micro_batch_is_split(place, two):
    assert two.status(12) == 0 and "a step is one micro-batch (train.micro_batch_size = 8)" in two.said(12)


def test_a_killed_rank_and_a_restart(place, configured, one):
    killed = order("train", configured, *SETTINGS, f"run_dir={place}/killed", rank=1, step=7, signal=signal.SIGKILL)
    ranks = Ranks(place / "killing", 2, killed, restarts=1)
    assert ranks.result.returncode == 0, ranks.said(0)
    assert "rank 1 on" in ranks.said(0) and "is gone; the checkpoint of step 4 is intact" in ranks.said(0)
    assert "resumed at step 4 of 12" in ranks.said(0)
    assert same(place / "killed", one)


@pytest.mark.parametrize("torchrun", [True, False])
def test_torchruns_signal_waits_for_the_word_of_who_is_left(torchrun, monkeypatch):
    """It comes as soon as a rank is dead, and killed the others before they had printed who."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(RankLost), trainer._signals():
            raise RankLost("rank 1 is gone")
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_IGN if torchrun else before[signal.SIGTERM])
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_a_silent_rank_without_torchrun(place, configured):
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all that is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = place / "silent"
    folder.mkdir()
    (folder / "child.py").write_text(CHILD)
    hung = order("train", configured, *SETTINGS, f"run_dir={place}/hung", "train.timeout=2", rank=1, step=5,
                 signal=signal.SIGSTOP)  # fmt: skip
    command = [sys.executable, str(folder / "child.py"), str(folder), json.dumps([hung])]
    whole = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = (subprocess.Popen(command, env=whole | {"RANK": str(rank)}) for rank in (0, 1))
    try:
        first.wait(timeout=90)
    finally:
        second.kill()
        second.wait()
    said = " ".join((folder / "said-0-0").read_text().split())
    assert (folder / "status-0-0").read_text() == "2"
    assert "was silent for 2 s (train.timeout); the checkpoint of step 4 is intact" in said


@pytest.mark.parametrize(
    "told, words",
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected a number"),
     ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK is not set: torchrun sets all of them"),
     ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK = 2 is not below WORLD_SIZE")],
    ids=["no number", "half told", "too high"],
)  # fmt: skip
def test_an_environment_that_cannot_be(told, words, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        environment.from_environment()


def test_one_process_takes_nothing_of_torch_distributed(configured, place):
    code = (
        "import sys\n"
        "from vspdf.config import loading\n"
        "from vspdf.train.trainer import train\n"
        f"train(loading.load({str(configured)!r}, ['run_dir={place}/alone', 'phases=[{{steps: 1}}]']))\n"
        "print([name for name in sys.modules if name.startswith('vspdf.parallel')])\n"
        "print(sys.modules['torch'].distributed.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "vspdf.parallel.world" in out and "vspdf.parallel.group" not in out and out.strip().endswith("False")
