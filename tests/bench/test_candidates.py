"""Candidates are held against float64 on the very mask before they are timed; masks come from anywhere."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from vspdf.bench import candidates, compare, linear_gpu, patterns
from vspdf.bench.problem import TOLERANCE, Problem, facts
from vspdf.errors import UserError
from vspdf.kernels import cpu, ops
from vspdf.pattern import Pattern

SMALL = ("--shapes", "24x32x48", "--sparsity", "0.5", "--rounds", 2, "--threads", 1)
ROOT = Path(__file__).resolve().parents[2]

MINE = """
import torch
from scipy.sparse import csr_matrix

class Csr:
    def prepare(self, pattern):
        self.rows, self.columns = pattern.csr()
        self.shape = pattern.shape

    def forward(self, x, values):
        return (csr_matrix((values.numpy(), self.columns, self.rows), shape=self.shape) @ x.numpy().T).T

class Wrong(Csr):
    def forward(self, x, values):
        return super().forward(x, values) * 1.001

class OneWrong(Csr):
    def forward(self, x, values):
        y = super().forward(x, values)
        y[-1, -1] += 1
        return y

class Turned(Csr):
    def forward(self, x, values):
        return super().forward(x, values).T

class Nan(Csr):
    def forward(self, x, values):
        return super().forward(x, values) * float("nan")

class Raises:
    def grad_values(self, grad, x):
        raise RuntimeError("no such\\nthing")

class Nothing:
    pass

class Needs:
    def __init__(self, something):
        pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mykernels.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield "mykernels"
    import sys

    sys.modules.pop("mykernels", None)


def rows_of(vspdf, *arguments):
    status, out, err = vspdf("bench", "linear", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


MASKS = {
    "random": Pattern.random((48, 32), 0.8), "full": Pattern.random((48, 32), 0.0),
    "empty": Pattern.random((48, 32), 1.0),
    **{kind: patterns.draw(kind, [(48, 32)], [0.75])[0][1] for kind in ("power-law", "banded", "causal", "2:4")},
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [name for name in candidates.BUILT_IN if name not in ("dense_compiled",)])
def test_every_candidate_computes_what_float64_does(name, mask):
    if (why := candidates.why_missing(name)) and name != "dense_bf16":
        pytest.skip(why)
    problem, candidate = Problem.of(MASKS[mask], 24), candidates.find(name)
    problem.prepared(candidate)
    own = getattr(candidate, "dtype", None)
    for dtype in (own,) if own else getattr(candidate, "dtypes", ("float32", "bfloat16")):
        calls = problem.calls(candidate, dtype)
        errors, failed = problem.check(calls)
        assert not failed and errors.keys() == calls.keys()
        assert max(errors.values()) <= TOLERANCE[dtype] and errors, (dtype, errors)


@pytest.mark.parametrize("kind", ["Wrong", "OneWrong", "Turned", "Nan"])
def test_a_wrong_candidate_is_caught_and_not_timed(vspdf, mine, kind):
    body = rows_of(vspdf, *SMALL, "--no-peers", "--candidate", f"{mine}:{kind}", "--candidate", f"{mine}:Csr")
    found = {row["candidate"]: row for row in body["rows"] if row["candidate"].startswith(mine)}
    wrong, right = found[f"{mine}:{kind}"], found[f"{mine}:Csr"]
    assert wrong["correct"] is False and wrong["ratio_to_dense"] is wrong["seconds_median"] is None
    assert right["correct"] is True and right["ratio_to_dense"] > 0 and right["error"] < 1e-6
    assert right["ratio_low"] <= right["ratio_to_dense"] <= right["ratio_high"] and right["prepare_seconds"] > 0
    _, out, _ = vspdf("bench", "linear", *SMALL, "--no-peers", "--candidate", f"{mine}:{kind}")
    assert f"WRONG, not timed: {mine}:{kind}, forward: differs from float64" in out


def test_a_candidate_that_fails_is_named_in_one_line(vspdf, mine):
    body = rows_of(vspdf, *SMALL, "--no-peers", "--candidate", f"{mine}:Raises")
    assert body["missing"][f"{mine}:Raises grad_values in float32"] == "no such thing"
    assert not [row for row in body["rows"] if row["candidate"].startswith(mine)]


@pytest.mark.parametrize(
    "name, message",
    [("vsdpf", "Did you mean 'vspdf'"), ("mykernels:Cs", "'mykernels' has no 'Cs'. Did you mean 'Csr'"),
     ("nowhere:Csr", "ModuleNotFoundError: No module named 'nowhere'"), ("mykernels:Nothing", "has none of forward"),
     ("mykernels:Needs", "TypeError")],
    ids=["unknown", "no such class", "no such module", "no product", "not made without arguments"],
)  # fmt: skip
def test_a_candidate_that_is_none(refused, mine, name, message):
    refused(message, "bench", "linear", *SMALL, "--candidate", name)


def test_packages_name_candidates_by_an_entry_point(mine, monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("theirs", f"{mine}:Csr", candidates.GROUP)
    monkeypatch.setattr(candidates, "entry_points", lambda group: [point] if group == candidates.GROUP else [])
    monkeypatch.syspath_prepend(".")
    assert hasattr(candidates.find("theirs"), "forward")
    assert ("theirs", f"{mine}:Csr, of a package", "available") in candidates.listed()


def test_candidates_of_gpus_have_the_names_that_they_are_timed_by():
    layer = linear_gpu.Layer(8, 16, 16, 0.5, "fp32", torch.device("cpu"))
    timed = {*ops.PATHS, *layer.bounds("forward"), *layer.peers("forward")}
    assert candidates.ON_GPUS.keys() <= timed


def test_missing_peers_are_named_once(vspdf, monkeypatch):
    monkeypatch.setattr(candidates, "find_spec", lambda package: None)
    status, out, _ = vspdf("bench", "linear", *SMALL)
    assert status == 0
    assert "not timed: scipy_csr (pip install scipy); sparselab (pip install sparselab)" in out
    assert out.count("sparselab") == 2  # its name and how to get it
    _, out, _ = vspdf("bench", "linear", "--list", "--json")
    assert {row["name"]: row["state"] for row in json.loads(out)["candidates"]}["scipy_csr"] == "pip install scipy"


# -- dtypes -----------------------------------------------------------------------------------------------------------


def test_dtypes_are_rows_of_one_base(vspdf):
    body = rows_of(vspdf, *SMALL, "--dtype", "float32,bfloat16")
    found = {(row["candidate"], row["dtype"]) for row in body["rows"]}
    assert {("vspdf", "float32"), ("vspdf", "bfloat16"), ("dense", "bfloat16"), ("torch_csr", "float32")} <= found
    assert not {("torch_csr", "bfloat16"), ("dense_bf16", "bfloat16")} & found
    dense = {r["ratio_to_dense"] for r in body["rows"] if (r["candidate"], r["dtype"]) == ("dense", "float32")}
    assert dense == {1.0}
    assert {r["peak_fraction"] for r in body["rows"] if r["dtype"] == "bfloat16"} == {None}


def test_slow_bf16_is_said_before_the_first_round(vspdf, monkeypatch, tiny):
    import vspdf as package
    from vspdf.kernels import hardware

    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    hardware._bf16_ratio.cache_clear()
    words = r"took \d+\.\d times as long here as in float32 \(measured\)"
    try:
        assert re.search(words, vspdf("bench", "linear", *SMALL, "--no-peers", "--dtype", "bfloat16")[2])
        assert re.search(words, package.explain(Pattern.random((64, 64), 0.5), 64, dtype=torch.bfloat16))
        status, out, err = vspdf("train", tiny, "train.precision=bf16")
        assert status == 0 and re.search(words, " ".join((out + err).split()))
        body = rows_of(vspdf, *SMALL)
        assert "dense_bf16" in body["missing"]
    finally:
        hardware._bf16_ratio.cache_clear()


def test_explain_knows_where_dense_bf16_wins(monkeypatch):
    import vspdf as package
    from vspdf.kernels import tuning

    pattern = Pattern.random((256, 256), 0.5)
    for dtype, timing in ((torch.float32, tuning.Timing(2e-3, 3e-3)), (torch.bfloat16, tuning.Timing(2e-3, 1e-3))):
        monkeypatch.setitem(tuning.CPU.timings, tuning.cpu_key("forward", pattern, 512, dtype), timing)
    lines = package.explain(pattern, 512).splitlines()
    assert "dense in bfloat16 is 2.00x as fast as that (measured 1.00e-03 s)" in lines[0] and "bfloat16" not in lines[1]


# -- masks ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_masks(vspdf, tmp_path):
    first, second = Pattern.random((48, 32), 0.5, seed=1), Pattern.random((32, 32), 0.9, seed=2)
    first.write(tmp_path / "a.smtx")
    (tmp_path / "more").mkdir()
    second.write(tmp_path / "more" / "b.npz")
    body = rows_of(vspdf, "--mask", tmp_path, "--tokens", "8,16", "--rounds", 1, "--threads", 1, "--no-peers")
    assert {(row["mask"], row["tokens"]) for row in body["rows"]} == {(m, t) for m in ("a", "more/b") for t in (8, 16)}
    assert body["masks"]["more/b"]["kept"] == second.nnz
    assert {group["sparsity"] for group in body["summary"]} == {0.5, 0.9}
    few = ("--tokens", 8, "--rounds", 1, "--threads", 1, "--no-peers")
    status, out, _ = vspdf("bench", "linear", "--mask", tmp_path, *few)
    assert status == 0 and "geometric means by sparsity" in out and "worst" in out and "more/b" in out


def test_figures_of_a_mask():
    mask = np.zeros((4, 8), dtype=bool)
    mask[0] = mask[1, :4] = mask[3, 7] = True
    found = facts(Pattern.from_mask(mask))
    assert [found[key] for key in ("rows", "columns", "kept", "empty_rows", "empty_columns")] == [4, 8, 13, 1, 0]
    assert found["fullest_row"] == 8 / 3.25 and found["row_spread"] == pytest.approx(np.std([8, 4, 0, 1]) / 3.25)
    assert found["bandwidth"] == pytest.approx(7 / 8)
    assert facts(Pattern.random((4, 4), 1.0))["bandwidth"] == 0


@pytest.mark.parametrize("name", [*patterns.KINDS, "1:4", "3:8", "block-of-1", "block-of-8", "erk"])
def test_patterns_that_ship(name):
    """Seeded, of the sparsity that was asked for, and different by seed where chance takes part."""
    shape = (64, 96)
    (_, pattern), *_ = patterns.draw(name, [shape], [0.75], seed=1)
    assert patterns.draw(name, [shape], [0.75], seed=1)[0][1] is pattern
    assert (patterns.draw(name, [shape], [0.75], seed=2)[0][1] is pattern) is (name in ("banded", "arrow"))
    exact = {"2:4": 0.5, "3:8": 0.625}.get(name, 0.75)
    assert pattern.shape == shape and pattern.sparsity == pytest.approx(exact, abs=0.01 if "bloc" in name else 1e-9)
    mask = pattern.mask().numpy()
    if ":" in name:
        n, m = map(int, name.split(":"))
        assert (mask.reshape(64, -1, m).sum(2) == n).all()
    if name == "causal":
        assert not np.triu(mask[:, :64], 64).any() and not mask[0, 2:].any()
    if name == "power-law":
        assert facts(pattern)["row_spread"] > 0.4  # by chance 0.18
    if name == "banded":
        assert facts(pattern)["bandwidth"] < 0.2


def test_erdos_renyi_keeps_the_whole_and_fills_small_layers():
    shapes = [(3072, 768), (64, 64), (768, 768)]
    amounts = patterns.erdos_renyi(shapes, 0.5)
    sizes = [a * b for a, b in shapes]
    assert sum(s * n for s, n in zip(amounts, sizes, strict=True)) / sum(sizes) == pytest.approx(0.5)
    assert amounts[1] == 0 and amounts[0] > amounts[2]


@pytest.mark.parametrize(
    "arguments, message",
    [(("--pattern", "bandes"), "Did you mean 'banded'"), (("--pattern", "5:4"), "with 0 < N <= M"),
     (("--pattern", "2:5"), "groups of 5 do not divide rows of 32"),
     (("--pattern", "causal", "--sparsity", "0.1"), "keeps half of a matrix at most"),
     (("--pattern", "banded", "--mask", "."), "give one"), (("--tokens", "8"), "--tokens is for --mask"),
     (("--mask", "none.smtx"), "not found"), (("--dtype", "float64"), "--dtype float64: on a CPU float32 and bfloat16"),
     (("--device", "cuda", "--pattern", "banded"), "--pattern is for the CPU")],
    ids=["unknown", "more than all", "no groups", "too many", "both", "tokens", "no file", "dtype", "gpu"],
)  # fmt: skip
def test_what_cannot_be_timed(refused, arguments, message):
    refused(message, "bench", "linear", *(() if "--mask" in arguments else SMALL[:2]), *arguments)


# -- two results ------------------------------------------------------------------------------------------------------


def result(low, ratio, high, **other):
    row = {"tokens": 8, "sparsity": 0.5, "threads": 1, "dtype": "float32", "product": "layer", "candidate": "vspdf",
           "ratio_low": low, "ratio_to_dense": ratio, "ratio_high": high, "noisy": False} | other  # fmt: skip
    return {"hardware": {"cpu": "X"}, "rows": [row]}


@pytest.mark.parametrize(
    "new, verdict",
    [((1.98, 2.0, 2.02), "no difference"), ((2.03, 2.06, 2.09), "no difference"),
     ((2.3, 2.4, 2.5), "1 faster, 0 slower"), ((1.5, 1.6, 1.7), "0 faster, 1 slower")],
    ids=["the same", "within noise", "faster", "slower"],
)  # fmt: skip
def test_what_changed_beyond_noise(new, verdict):
    found = compare.compare(result(1.97, 2.0, 2.03), result(*new))
    assert found["verdict"].startswith(verdict)
    assert compare.compare(result(1.0, 2.0, 3.0, noisy=True), result(*new))["unclear"] == 1


def test_results_of_two_machines_are_not_compared(tmp_path):
    with pytest.raises(UserError, match="of another machine"):
        compare.compare(result(1, 1, 1) | {"hardware": {"cpu": "Y"}}, result(1, 1, 1))
    with pytest.raises(UserError, match="no row of the earlier result is in this one"):
        compare.compare(result(1, 1, 1, tokens=9), result(1, 1, 1))
    (tmp_path / "x.json").write_text('{"rows": 3}')
    with pytest.raises(UserError, match="expected what vspdf bench"):
        compare.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    "change",
    [lambda body: body["rows"][0].pop("ratio_low"), lambda body: body["rows"][0].update(ratio_high=None),
     lambda body: body.update(hardware=None), lambda body: body.pop("hardware"), lambda body: body.update(model="x")],
    ids=["no interval", "half an interval", "no machine", "no hardware", "a model by name"],
)  # fmt: skip
def test_what_holds_no_result_is_refused_when_it_is_read(tmp_path, change):
    body = result(1.9, 2.0, 2.1)
    (tmp_path / "x.json").write_text(json.dumps(body))
    assert compare.read(tmp_path / "x.json") == body
    change(body)
    (tmp_path / "x.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="holds no result to compare with"):
        compare.read(tmp_path / "x.json")


STEP = ("--n-layer", 1, "--d-model", 16, "--n-head", 2, "--sequence-length", 8, "--batch-size", 1)


@pytest.mark.parametrize(
    "verb, other, message",
    [(("linear", *SMALL), {"hardware": {"cpu": "Y"}}, r"of another machine \(Y\)"),
     (("step", *STEP), {"model": {"d_model": 64}}, r"of another model \(d_model 64, now 16\)")],
)  # fmt: skip
def test_results_that_differ_are_refused_before_anything_is_measured(
    refused, monkeypatch, tmp_path, verb, other, message
):
    monkeypatch.setattr("vspdf.bench.linear.bench_linear", None)  # measuring would be a TypeError
    monkeypatch.setattr("vspdf.bench.step.bench_step", None)
    (tmp_path / "old.json").write_text(
        json.dumps(result(1.9, 2.0, 2.1) | {"hardware": {"cpu": cpu.cpu_name()}} | other)
    )
    refused(message, "bench", *verb, "--compare", tmp_path / "old.json")


def test_what_was_measured_is_told_where_it_matches_no_earlier_row(vspdf, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(result(1.9, 2.0, 2.1) | {"hardware": {"cpu": cpu.cpu_name()}}))
    how = ("bench", "linear", *SMALL, "--no-peers", "--compare", tmp_path / "old.json")
    for more, told in (((), "speed-up over dense"), (("--json",), '"rows": [')):
        status, out, err = vspdf(*how, *more)
        assert status == 2 and told in out and "no row of the earlier result" in err.splitlines()[-1]


def test_steps_of_two_models_are_not_compared():
    small, large = ({"model": {"d_model": width, "batch_size": 4}} for width in (64, 768))
    with pytest.raises(UserError, match=r"of another model \(d_model 64, now 768\)"):
        compare.compare(result(1.9, 2, 2.1) | small, result(3.9, 4, 4.1) | large)
    with pytest.raises(UserError, match="batch_size 4, now 1"):
        compare.compare(result(1.9, 2, 2.1) | small, result(3.9, 4, 4.1) | {"model": {"d_model": 64, "batch_size": 1}})
    assert compare.compare(result(1.9, 2, 2.1) | small, result(1.9, 2, 2.1) | small)["same"] == 1


def test_what_became_wrong_is_a_kind_of_its_own(monkeypatch):
    from vspdf.cli import bench_tables

    right, wrong = result(1.9, 2.0, 2.1, in_features=16, out_features=16), result(None, None, None)
    wrong["rows"][0] |= {"in_features": 16, "out_features": 16}
    found = compare.compare(right, wrong)
    assert [row["old"] for row in found["wrong"]] == [2.0] and not found["slower"] and not found["unmatched"]
    assert found["verdict"] == "1 WRONG now, 0 rows alike"
    assert compare.compare(wrong, right)["verdict"] == "1 right that was wrong, 0 rows alike"
    lines = []
    monkeypatch.setattr(bench_tables, "tell", lines.append)
    bench_tables._print_comparison(found)
    assert lines[1] == "  wrong: layer, vspdf, 8x16x16, sparsity 0.5, 1 threads, float32: 2.00x -> wrong"


def test_rows_of_either_result_alone_are_counted():
    both, other, third = (result(1.9, 2.0, 2.1, tokens=n) for n in (8, 9, 10))
    old = both | {"rows": both["rows"] + other["rows"] + third["rows"]}
    found = compare.compare(old, both | {"rows": both["rows"] + result(1, 2, 3, tokens=11)["rows"]})
    assert (found["same"], found["unmatched"]) == (1, 3) and found["verdict"].endswith("3 in one result only")


def test_comparing_by_command(vspdf, tmp_path):
    body = rows_of(vspdf, *SMALL, "--no-peers")
    (tmp_path / "old.json").write_text(json.dumps(body))
    again = rows_of(vspdf, *SMALL, "--no-peers", "--compare", tmp_path / "old.json", "--roofline")
    assert {"faster", "slower", "same", "unclear", "verdict"} <= again["comparison"].keys()
    roof = again["roofline"]["1"]
    assert set(roof["gbytes_per_second"]) >= {"L1", "L2", "memory"} and roof["peak_gflops"] > 0
    for row in again["rows"]:
        assert row["roof_gflops"] <= roof["peak_gflops"] and row["intensity"] > 0
    small = ("--n-layer", 1, "--d-model", 16, "--n-head", 2, "--sequence-length", 8, "--batch-size", 1, "--rounds", 1)
    status, out, _ = vspdf("bench", "step", *small, "--dtype", "float32,bfloat16", "--json")
    (tmp_path / "step.json").write_text(out)
    assert {row["dtype"] for row in json.loads(out)["rows"]} == {"float32", "bfloat16"}
    status, out, err = vspdf(
        "bench", "step", *small, "--dtype", "float32,bfloat16", "--compare", tmp_path / "step.json"
    )
    assert status == 0 and "Against the earlier result" in out, err


# -- the whole machine -------------------------------------------------------------------------------------------------


def test_the_suite_is_a_page_and_a_file(vspdf, tmp_path):
    from vspdf.report import bench_tables

    status, out, err = vspdf("bench", "suite", "--tiny", "--output", tmp_path / "new", "--name", "My machine", "--json")
    assert status == 0, err
    body = json.loads(out)
    assert set(body["sections"]) == set(bench_tables.ALL) and body["machine"]["name"] == "My machine"
    stored = bench_tables.read(tmp_path / "new" / "my-machine.json")
    assert [table.title for table in bench_tables.tables(stored)] == [
        table.title for table in bench_tables.tables(body)
    ]
    page = (tmp_path / "new" / "my-machine.html").read_text()
    assert "tiny" in page and "http://" not in page and "<svg" in page
    for table in bench_tables.tables(body):
        assert table.title.replace(">", "&gt;") in page


def test_a_section_that_is_none(refused, tmp_path):
    refused(
        "section 'layer' is not known. Did you mean 'layers'",
        "bench",
        "suite",
        "--sections",
        "layer",
        "--output",
        tmp_path,
    )


def test_docs_kernel_ends_with_a_candidate_that_works(tmp_path, monkeypatch):
    """The twenty lines that people copy: held against float64, as `--candidate` does it."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernel.md").read_text(), flags=re.DOTALL)[-1]
    assert len(code.splitlines()) <= 24
    (tmp_path / "mykernel.py").write_text(code)
    candidate = runpy.run_path(str(tmp_path / "mykernel.py"))["ScipyCsr"]()
    problem = Problem.random(24, 32, 48, 0.8)
    problem.prepared(candidate)
    errors, failed = problem.check(problem.calls(candidate))
    assert not failed and set(errors) == {"forward", "grad_input", "grad_values"}
    assert max(errors.values()) <= TOLERANCE["float32"]
