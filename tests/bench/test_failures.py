"""What a benchmark cannot time is said in one line, and the rest is timed."""

import json

import pytest

from vspdf.bench import linear, step
from vspdf.bench.candidates import Dense
from vspdf.bench.problem import Problem
from vspdf.interop import hugging_face
from vspdf.model import GPT
from vspdf.pattern import Pattern
from vspdf.shapes import Shape

LINEAR = ("bench", "linear", "--shapes", "24x32x48", "--sparsity", "0.5", "--rounds", 2, "--threads", 1, "--no-peers")
THEIRS = """
from vspdf.bench.candidates import Dense

class Half(Dense):
    dtype = "float16"

class Later(Dense):
    calls = 0
    last = 1

    def forward(self, x, weight):
        self.calls += 1
        if self.calls > self.last:
            raise RuntimeError("no memory\\nis left")
        return super().forward(x, weight)

class MuchLater(Later):
    last = 5
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    yield
    import sys

    sys.modules.pop("theirs", None)


def timed(vspdf, *arguments):
    """Products that have rows, by candidate, and what is missing."""
    status, out, err = vspdf(*LINEAR, *arguments, "--json")
    assert status == 0, err
    body = json.loads(out)
    found = {}
    for row in body["rows"]:
        found.setdefault(row["candidate"], []).append(row["product"])
    return found, body["missing"]


ALL = ["forward", "grad_input", "grad_values", "layer"]


def test_a_dtype_that_is_not_timed(vspdf, theirs):
    found, missing = timed(vspdf, "--candidate", "theirs:Half")
    assert found["vspdf"] == ALL and "theirs:Half" not in found
    assert missing == {"theirs:Half": "its dtype is float16: on a CPU float32 and bfloat16 are timed"}


@pytest.mark.parametrize("name", ["Later", "MuchLater"])
def test_a_candidate_that_raises_while_it_is_timed(vspdf, theirs, name):
    found, missing = timed(vspdf, "--candidate", f"theirs:{name}")
    assert found["vspdf"] == found["dense"] == ALL and found[f"theirs:{name}"] == ["grad_input", "grad_values"]
    assert missing == {f"theirs:{name} forward in float32": "no memory is left"}


class One(Dense):
    dtypes = "float32"


def test_one_dtype_by_its_name_alone():
    problem = Problem.random(8, 16, 16, 0.5)
    case, one = linear.Case(problem.pattern, 8, 0.5, None, 1), One()
    sides, missing = linear._sides(case, {"one": one}, ["float32", "bfloat16"])
    assert list(sides) == [("one", "float32")] and missing == {"one in bfloat16": "it takes float32"}
    one.dtypes = "not float32"
    assert linear._sides(case, {"one": one}, ["float32"])[0] == {}


def test_a_checkpoint_without_zeros(tmp_path, refused):
    hugging_face.write_hugging_face(GPT(Shape(1, 16, 2, 32, 33, 32)), None, tmp_path / "dense")
    small = ("--rounds", 1, "--tokens", 1, "--context", 2, "--threads", 1)
    refused("--sparsity zeros: none of its weights is zero", "bench", "decode", "--model", tmp_path / "dense",
            "--sparsity", "zeros", *small)  # fmt: skip


@pytest.mark.parametrize("sparsity", ["0", "0.5,0", "1"])
def test_masks_that_cannot_move(refused, sparsity):
    message = f"--sparsity {sparsity[-1]}: expected more than 0 and less than 1"
    refused(message, "bench", "update", "--shape", "8x16x16", "--sparsity", sparsity, "--rounds", 1)


# -- masks by name ----------------------------------------------------------------------------------------------------


def test_labels_that_would_be_alike(vspdf, tmp_path):
    few = ("bench", "linear", "--tokens", 8, "--rounds", 1, "--threads", 1, "--no-peers")
    drawn = ("--pattern", "uniform,2:4", "--shapes", "8x128x128", "--sparsity", "0.991,0.994,0.991")
    status, out, err = vspdf(*few, *drawn, "--json")
    assert status == 0, err
    assert list(json.loads(out)["masks"]) == ["uniform 0.991", "uniform 0.994", "2:4 0.5"]
    for name, seed in (("a.npz", 1), ("a.smtx", 2), ("a (2).smtx", 3)):
        Pattern.random((16, 16), 0.5, seed=seed).write(tmp_path / name)
    body = json.loads(vspdf(*few, "--mask", tmp_path, "--json")[1])
    assert set(body["masks"]) == {row["mask"] for row in body["rows"]} and len(body["masks"]) == 3
    out = vspdf(*few, *drawn)[1]
    assert "uniform 0.991" in out and "uniform 0.994" in out


def row(sparsity, ratio, mask=None):
    about = (8, 16, 16, sparsity, mask, 1, "float32", "layer", "vspdf")
    return linear.Row(*about, ratio_to_dense=ratio)


def test_break_even_is_of_one_kind_of_mask():
    fast = [row(0.5, 0.5, "banded 16x16 0.5"), row(0.9, 1.5, "banded 16x16 0.9")]
    slow = [row(0.5, 0.2, "a b 50%"), row(0.9, 0.6, "a b 90%")]
    found = {each["mask"]: each["sparsity"] for each in linear._break_even([*fast, *slow])}
    assert found == {"banded": pytest.approx(0.7), "a b": None}
    plain = linear._break_even([row(0.5, 0.5), row(0.9, 1.5)])
    assert len(plain) == 1 and "mask" not in plain[0] and plain[0]["sparsity"] == pytest.approx(0.7)
    for mask in ("epoch 1", "version 1.2.3", "0.5", "banded"):
        assert linear._break_even([row(0.5, 1.5, mask)])[0]["mask"] == mask


# -- lists that are empty ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb, option, given",
    [("linear", option, ",") for option in ("--shapes", "--sparsity", "--dtype", "--pattern", "--threads")]
    + [("linear --mask .", "--tokens", " "), ("suite --tiny", "--sections", ","), ("step", "--dtype", ",")]
    + [("update", option, given) for option in ("--shape", "--sparsity") for given in ("", ",")]
    + [("decode", option, given) for option in ("--sparsity", "--batch-size", "--dtype") for given in ("", ",")],
)
def test_an_empty_list_is_refused_at_once(refused, monkeypatch, tmp_path, verb, option, given):
    monkeypatch.chdir(tmp_path)
    Pattern.random((16, 16), 0.5).write(tmp_path / "a.smtx")
    monkeypatch.setattr(linear, "bench_linear", lambda *given: pytest.fail("it is timed"))
    refused(f"{option} '{given}' is an empty list: expected", "bench", *verb.split(), option, given)


def test_spaces_beside_commas(vspdf):
    assert timed(vspdf, "--dtype", "float32, bfloat16")[0]["vspdf"] == ALL * 2


@pytest.mark.parametrize("verb", ["linear", "update", "step", "suite", "decode"])
def test_ranks_do_not_measure_each_other(refused, monkeypatch, verb):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    refused(f"bench {verb} is one process, and the environment .* tells of 2: start it without", "bench", verb)


GIVEN = {"random masks": None, "given masks": [("a", Pattern.random((8, 8), 0.5))]}


@pytest.mark.parametrize("masks", GIVEN.values(), ids=GIVEN)
def test_a_value_that_is_given_twice_is_timed_once(masks):
    once = linear.cases([(4, 8, 8)], [0.9], [1], masks, [4])
    assert linear.cases([(4, 8, 8), (4, 8, 8)], [0.9, 0.9], [1, 1], masks, [4, 4]) == once


def test_a_sparsity_that_is_given_twice_is_one_side_of_a_step():
    once = step._sides([0.9], ["float32", "bfloat16"], True)
    assert step._sides([0.9, 0.0, 0.9], ["float32", "bfloat16"], True) == once
