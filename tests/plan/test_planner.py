"""The planner: golden numbers of published runs, wishes that come true, configurations that train, errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from vspdf import ledger
from vspdf.bench.calibrate import Calibration, calibrate
from vspdf.cli import app
from vspdf.config import loading, resolve
from vspdf.errors import UserError
from vspdf.kernels.cpu import has_bf16
from vspdf.model import GPT
from vspdf.plan.machines import Machines
from vspdf.plan.planner import plan
from vspdf.plan.wish import _Wish, state_bytes
from vspdf.plan.write import write
from vspdf.shapes import MODELS, PUBLISHED, Shape
from vspdf.sparsity.layer import training_state_bytes
from vspdf.sparsity.surgery import sparsify

LARGE = "cerebras-gpt-6.7b"


@pytest.fixture
def command(monkeypatch, capsys):
    """`vspdf plan ARGUMENTS` in this process: status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vspdf", "plan", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        status = 0
        try:
            app.main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status or 0, captured.out, captured.err

    return call


def steps(found):
    return [(phase.sparsity, phase.steps) for phase in found.phases]


# -- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, how, expected",
    [
        (LARGE, {"sparsity": 0.9, "effective": 0.75}, [(0.9, 62_522), (0.0, 9_379)]),
        (LARGE, {}, [(0.9, 62_522), (0.0, 9_379)]),
        ("cerebras-gpt-6.7b-variable", {}, [(0.9, 62_523), (0.0, 9_379)]),
        (LARGE, {"phases": [(0.9, 62_523), (0.0, 9_379)]}, [(0.9, 62_523), (0.0, 9_379)]),
    ],
    ids=["add-on", "defaults", "published", "explicit"],
)
def test_the_67b_recipe(model, how, expected):
    found = plan(model, **how)
    assert steps(found) == expected
    assert (found.dense.steps, found.dense.tokens) == (62_522, 62_522 * 1040 * 2048)
    assert 1 - found.effective_sparsity == pytest.approx(0.2500, abs=5e-5)
    assert found.time_average_sparsity == pytest.approx(0.783, abs=5e-4)
    assert found.token_ratio == pytest.approx(71_901 / 62_522, abs=2e-5)
    saved = {name: row["saved_fraction"] for name, row in found.by_convention().items()}
    assert saved == {
        name: pytest.approx(fraction, abs=5e-5)
        for name, fraction in {
            "linear": 0.7500, "vspdf": 0.6418, "spdf": 0.6570, "chinchilla": 0.6341, "cerebras-card": 0.5877
        }.items()
    }  # fmt: skip
    assert found.flops_saved_fraction == saved["vspdf"]


def test_fine_tuning_against_both_denominators():
    found = plan("cerebras-gpt-6.7b-variable")
    dart = ledger.training_flops(LARGE, tokens=1_938 * 32 * 512)
    assert dart / found.dense.flops == pytest.approx(0.00024, abs=5e-6)
    assert dart / found.flops == pytest.approx(0.00067, abs=5e-6)


def test_gpt3_xl_at_a_uniform_75_percent():
    found = plan("gpt3-xl", sparsity=0.75, convention="spdf")
    assert found.flops_saved_fraction == pytest.approx(0.5991, abs=5e-5)
    assert found.dense.flops / found.flops == pytest.approx(2.494, abs=5e-4)
    assert [phase.sparsity for phase in found.phases] == [0.75]


def test_the_fixed_budget_is_five_sixths_sparse():
    found = plan(LARGE, effective=0.75, split="fixed-budget")
    assert found.sparse_fraction == pytest.approx(0.8333, abs=5e-5)
    assert found.token_ratio == 1 and found.effective_sparsity == pytest.approx(0.75, abs=2e-5)


def test_published_steps_make_the_published_tokens():
    tokens = {
        "111m": 2.221e9, "256m": 5.119e9, "590m": 1.181e10, "1.3b": 2.631e10, "2.7b": 5.303e10, "6.7b": 1.332e11,
        "13b": 2.571e11,
    }  # fmt: skip
    assert set(PUBLISHED) == {f"cerebras-gpt-{size}" for size in tokens}
    for size, published in tokens.items():
        assert plan(f"cerebras-gpt-{size}").dense.tokens == pytest.approx(published, rel=5e-4)


def test_causal_attention_changes_attention_alone():
    full, half = (plan(LARGE, convention="spdf", causal=causal) for causal in (False, True))
    assert full.dense.flops - half.dense.flops == pytest.approx(3 * MODELS[LARGE].attention * full.dense.tokens)
    assert full.by_convention()["linear"] == half.by_convention()["linear"]


# -- memory and time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.75, 0.9])
def test_training_state_is_that_of_a_model(sparsity):
    """The constant for plans stands for what kernels really build, here in all three products of every layer."""
    shape = Shape(n_layer=2, d_model=256, n_head=4, d_ff=1024, vocab_size=101, sequence_length=64)
    model = GPT(shape)
    assert state_bytes(shape, 0.0) == training_state_bytes(model)["model"]["dense"]
    if sparsity:
        sparsify(model, sparsity, backend="cpu")
        inputs = torch.randint(101, (8, 64))
        model(inputs, inputs).backward()
        for path, found in training_state_bytes(model)["paths"].items():
            assert found == pytest.approx(state_bytes(shape, sparsity, path), rel=1e-3)
        real = training_state_bytes(model)["model"]
        # No more than stated, up to small layers' padding: other instruction sets need less.
        assert 16 * sum(p.numel() for p in model.parameters()) < real["sparse"] < 1.1 * state_bytes(shape, sparsity)


def test_a_plan_tells_memory_by_path():
    """Bytes a position of sparse layers: 1.8 at 90 % on a GPU's usual paths, 4.2 at 75 %, 16 dense."""
    for sparsity, expected in [(0.9, 1.8), (0.75, 4.2)]:
        found = plan(LARGE, sparsity=sparsity)
        shape, (phase,) = found.shape, found.phases
        never = 16 * (shape.parameters - shape.linear)
        for path in ("dense", "2:4"):
            assert (phase.state_bytes_by_path[path] - never) / shape.linear == pytest.approx(expected, abs=0.02)
        assert phase.state_bytes_by_path["cpu"] == phase.state_bytes
        assert found.to_json()["phases"][0]["state_bytes_by_path"] == phase.state_bytes_by_path
        assert set(found.dense.state_bytes_by_path.values()) == {16 * shape.parameters}


def test_a_calibration_prices_a_step():
    shape = Shape(n_layer=3, d_model=2, n_head=1, d_ff=8, vocab_size=9, sequence_length=15)
    measured = Calibration(10, 5, 1, 1, {0.5: 2.0}, (1.0, 6.0), vocabulary_seconds=3.0, optimizer_seconds=0.5)
    attention = 6.0 / 15 - 1.0 / 5  # a token's, at the whole length instead of the measured one
    token = 3 * (2.0 / 10 + attention) + 3.0 / 10
    update = 0.5 * (shape.parameters - 0.5 * shape.linear)
    assert measured.step_seconds(shape, 0.5, 20) == pytest.approx(20 * token + update)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_calibration_measures_all_that_a_step_is_made_of(precision):
    shape = Shape(n_layer=3, d_model=64, n_head=4, d_ff=128, vocab_size=9000, sequence_length=600)
    found = calibrate(shape, [0.9], 512, rounds=1, precision=precision)
    assert found.precision == (precision if has_bf16() else "fp32")
    assert (found.tokens, found.sequence) == (512, 512) and found.block_seconds.keys() == {0.0, 0.9}
    times = (*found.block_seconds.values(), *found.attention_seconds, found.vocabulary_seconds, found.optimizer_seconds)
    assert min(times) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_time_is_that_of_the_runs_precision(precision, corpus, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("vspdf.plan.wish.calibrate", lambda *_, precision: asked.append(precision) or SPEEDS)
    (tmp_path / "mine.yaml").write_text(
        f"model: {{n_layer: 1, d_model: 32, n_head: 2, sequence_length: 32}}\ntrain: {{precision: {precision}}}\n"
        f"data: {{corpus: {corpus}, repeat: true}}\nphases: [{{sparsity: 0.9, steps: 9}}]\n"
    )
    plan(tmp_path / "mine.yaml", time=True)
    assert asked == [precision]


def test_time_adds_up(tmp_path):
    body = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 300, "n_positions": 64, "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(body))
    found = plan(tmp_path, steps=1000, batch_size=4, time=True)
    assert found.seconds == pytest.approx(sum(phase.steps * phase.step_seconds for phase in found.phases))
    assert found.dense.step_seconds == found.phases[1].step_seconds > 0
    quick = plan(tmp_path, steps=1000, batch_size=4, hours=1000)
    assert steps(quick) == [(0.0, 1000)] and "dense run itself fits" in quick.notes[0]
    with pytest.raises(UserError, match=r"finishing in 1e-06 hours is not possible .* enough for \d+ of 1,000 steps"):
        plan(tmp_path, steps=1000, batch_size=4, hours=1e-6)


SPEEDS = Calibration(10, 10, 1, 1, {0.0: 10.0, 0.9: 3.0, 0.95: 2.0, 0.98: 1.5, 0.99: 1.4}, (0.0, 0.0), 0.0, 0.0)


@pytest.mark.parametrize("split", ["add-on", "fixed-budget"])
@pytest.mark.parametrize(
    "hours, first", [(8, 0.9), (3.1, 0.9), (2.5, 0.95), (1.6, 0.98)], ids=lambda value: f"{value:g}"
)
def test_hours_are_filled_and_not_exceeded(split, hours, first):
    """A dense step of 30 s: 1,200 of them take ten hours."""
    shape = Shape(n_layer=3, d_model=2, n_head=1, d_ff=8, vocab_size=9, sequence_length=10)
    wish = _Wish(shape, 1200, 10, split, None, None, "vspdf", False, print, calibration=SPEEDS)
    (sparsity, sparse), (_, dense) = wish.hours(hours)
    seconds = {s: SPEEDS.step_seconds(shape, s, 10) for s in (0.0, sparsity)}
    assert seconds[0.0] == pytest.approx(30) and sparsity == first
    taken = sparse * seconds[sparsity] + dense * seconds[0.0]
    one_more = seconds[0.0] - (seconds[sparsity] if split == "fixed-budget" else 0)
    assert taken <= hours * 3600 < taken + one_more
    assert (sparse if split == "add-on" else sparse + dense) == 1200
    with pytest.raises(UserError, match=r"sparsity 0.99 throughout, takes 1.4; 1 hours are enough for 857 of 1,200"):
        wish.hours(1)
    assert wish.hours(10) == [(0.0, 1200)]


# -- wishes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["add-on", "fixed-budget"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.75, 0.85])
@pytest.mark.parametrize("convention", ["vspdf", "linear"])
def test_a_fraction_of_flops_is_saved_and_no_step_more(split, fraction, convention):
    found = plan(LARGE, save=fraction, split=split, convention=convention)
    assert 0 <= found.flops_saved_fraction - fraction + 1e-12 < 1 / found.dense.steps
    assert found.dense.steps == (found.phases[0].steps if split == "add-on" else sum(p.steps for p in found.phases))
    assert found.phases[0].sparsity == (0.98 if (fraction, convention) == (0.85, "vspdf") else 0.9)


def test_the_published_saving_is_found_again():
    assert steps(plan(LARGE, save=0.75, convention="linear")) == [(0.9, 62_522), (0.0, 9_378)]


def test_memory_finds_the_mildest_sparsity_that_fits():
    found = plan(LARGE, memory=24)
    assert found.state_bytes <= 24e9 < state_bytes(found.shape, found.phases[-1].sparsity - 0.001)
    assert len(found.phases) == 1
    staged = plan(LARGE, memory=60, effective=0.75)
    assert staged.state_bytes <= 60e9 and staged.effective_sparsity == pytest.approx(0.75, abs=2e-5)
    assert [phase.sparsity for phase in staged.phases] == [0.9, plan(LARGE, memory=60).phases[0].sparsity]
    tight = plan(LARGE, memory=20, effective=0.75)  # one sparsity from the beginning, for more steps
    assert len(tight.phases) == 1 and tight.phases[0].sparsity > 0.9
    assert tight.effective_sparsity == pytest.approx(0.75, abs=2e-5)
    fixed = plan(LARGE, memory=70, effective=0.75, split="fixed-budget")
    assert (fixed.token_ratio, fixed.effective_sparsity) == (1, pytest.approx(0.75, abs=2e-5))
    with pytest.raises(UserError, match=r"effective sparsity of 0.5 is not possible in 60 GB: 0.\d+ is the least that"):
        plan(LARGE, memory=60, effective=0.5, split="fixed-budget")
    roomy = plan(LARGE, memory=200)
    assert steps(roomy) == steps(plan(LARGE)) and "fits as well" in roomy.notes[0]


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_hugging_face_folder_is_the_model_it_describes(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=131, n_positions=32)).save_pretrained(
        tmp_path
    )
    found = plan(tmp_path, sparsity=0.5)
    assert found.shape == Shape(2, 48, 4, 192, 131, 32, mlp="gelu_tanh")
    weights = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert found.shape.parameters == sum(p.numel() for p in weights.parameters())
    form = {"tie_word_embeddings": False, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-6}
    body = json.loads((tmp_path / "config.json").read_text()) | form | {"model_type": "btlm"}
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert plan(tmp_path).shape == Shape(2, 48, 4, 192, 131, 32, mlp="gelu_tanh", norm_eps=1e-6, tie=False)
    OPTConfig().save_pretrained(tmp_path)
    opt = plan(tmp_path)
    assert opt.shape == Shape(12, 768, 12, 3072, 50272, 2048) and "by its sizes alone" in " ".join(opt.notes)
    assert not any("by its sizes" in note for note in found.notes) and "by its sizes" in plan("bert-large").notes[0]


def test_a_configuration_keeps_its_own_phases_and_budget():
    found = plan("quickstart")
    assert steps(found) == [(0.9, 250), (0.0, 50)] and found.shape.vocab_size == 1024
    assert found.effective_sparsity == pytest.approx(0.75) and found.dense.steps == 300
    assert steps(plan("quickstart", sparsity=0.8, effective=0.5, steps=100)) == [(0.8, 100), (0.0, 30)]


def test_no_torch_is_needed():
    code = "import sys; from vspdf.plan import plan; plan('gpt2-small'); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


# -- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cerebras-gpt-111m", "gpt2-small", "quickstart"])
def test_what_is_written_loads_as_the_plan(tmp_path, model):
    found = plan(model, sparsity=0.9, effective=0.6)
    write(found, tmp_path / "mine.yaml")
    loaded = loading.load(tmp_path / "mine.yaml")
    assert [(p.sparsity, p.steps, p.tokens) for p in loaded.phases] == [
        (p.sparsity, p.steps, p.tokens) for p in found.phases
    ]
    assert {phase.lr_multiple for phase in loaded.phases} == {3.0} and loaded.name == "mine"
    assert resolve.model_shape(loaded.model, found.shape.vocab_size) == found.shape
    lr = PUBLISHED[model].lr if model in PUBLISHED else found.config.optimizer.lr
    assert loaded.optimizer.lr == lr
    again = plan(tmp_path / "mine.yaml")
    assert steps(again) == steps(found) and again.flops == found.flops


def test_numpys_numbers_are_written_as_ours(tmp_path):
    two = np.int64(2)
    write(plan("gpt2-small", phases=[(0.9, two)], batch_size=two, sequence=two), tmp_path / "mine.yaml")
    loaded = loading.load(tmp_path / "mine.yaml")
    assert (loaded.phases[0].steps, loaded.train.batch_size, loaded.model.sequence_length) == (2, 2, 2)


def test_what_is_written_trains(tmp_path, tiny, command):
    status, out, err = command(
        "--model", tiny, "--phases", "0.9:3,0.5:2,0:1", "--write", tmp_path / "planned.yaml", "--json"
    )
    assert status == 0 and f"vspdf train {tmp_path}/planned.yaml" in err
    from vspdf.train.trainer import train

    summary = train(loading.load(tmp_path / "planned.yaml", [f"run_dir={tmp_path}/planned"]), say=lambda line: None)
    body = json.loads(out)
    keys = ("name", "sparsity", "steps", "tokens")
    assert [[p[key] for key in keys] for p in summary["phases"]] == [[p[key] for key in keys] for p in body["phases"]]
    assert body["effective_sparsity"] == pytest.approx(summary["effective_sparsity"])
    saved = summary["flops_saved_fraction_by_convention"]
    assert {k: v["saved_fraction"] for k, v in body["flops_by_convention"].items()} == pytest.approx(saved)


def test_nothing_is_overwritten(tmp_path, command):
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    status, out, err = command("--model", "gpt2-small", "--write", path)
    assert status == 2 and out == "" and "nothing is overwritten" in err and path.read_text() == "precious"


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns(command):
    status, out, err = command("--model", LARGE, "--sparsity", 0.9, "--effective", 0.75)
    assert status == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    for text in ("62,522", "9,379", "64.18%", "65.70%", "63.41%", "106.5 GB", "0.7826", "Time on a CS-2, simulated"):
        assert text in out, text


def test_json_has_the_keys_that_scripts_rely_on(command):
    status, out, _ = command("--model", LARGE, "--effective", 0.75, "--convention", "spdf", "--json")
    body = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert body["convention"] == "spdf" and body["flops_saved_fraction"] == pytest.approx(0.6570, abs=5e-5)
    assert body["effective_sparsity"] == pytest.approx(0.75, abs=2e-5)
    assert body["flops"]["planned"] / body["flops"]["dense"] == pytest.approx(1 - body["flops_saved_fraction"])
    assert [(p["name"], p["sparsity"], p["steps"]) for p in body["phases"]] == [
        ("sparse 0.9", 0.9, 62_522), ("dense", 0.0, 9_379)
    ]  # fmt: skip
    assert sum(p["tokens"] for p in body["phases"]) == 71_901 * 1040 * 2048


BAD = {
    "unknown model": (["--model", "gpt2-smal"], "unknown model 'gpt2-smal'", "Did you mean 'gpt2-small'?"),
    "no model": (["--model", ""], "unknown model ''", "Known: cerebras-gpt-111m"),
    "unknown convention": (["--convention", "spfd"], "unknown FLOP convention 'spfd'", "Did you mean 'spdf'?"),
    "unknown split": (["--split", "addon"], "unknown split 'addon'", "Did you mean 'add-on'?"),
    "sparsity of 1": (["--sparsity", 1], "sparsity must lie in [0, 1), not 1.0"),
    "effective above": (["--sparsity", 0.5, "--effective", 0.75], "0.75 cannot come from a first stage at 0.5"),
    "phases": (["--phases", "0.9-100"], "--phases '0.9-100': expected SPARSITY:STEPS"),
    "phases that grow sparser": (["--phases", "0.5:9,0.9:9"], "weights are only ever added"),
    "phases of no step": (["--phases", "0.5:-1"], "phases.0.steps must be a whole number of at least 0, not -1"),
    "phases and how to split": (
        ["--phases", "0.5:9", "--split", "add-on"],
        "phases leave nothing to split",
        "'add-on'",
    ),
    "phases and split": (["--phases", "0.5:9", "--sparsity", 0.5], "phases leave nothing to split"),
    "two wishes": (["--save", 0.5, "--memory", 3], "one wish at a time: save and memory"),
    "wish and effective": (["--save", 0.5, "--effective", 0.3], "effective sparsity is what save finds"),
    "save above 1": (["--save", 60], "save must lie between 0 and 1", "not 60.0"),
    "save too much": (["--save", 0.95], "saving 0.95 of the FLOPs (convention vspdf) is not possible", "saves 0.8710"),
    "save at a sparsity": (["--save", 0.8, "--sparsity", 0.5], "stays at sparsity 0.5 saves 0.4399"),
    "too little memory": (
        ["--memory", 2],
        "2 GB is not possible: at sparsity 0.99 it is 8.4",
        "3.455 GB are never sparse",
    ),
    "memory at a sparsity": (["--memory", 24, "--sparsity", 0.9], "0.92 is the least that fits"),
    "no steps": (["--steps", 0], "steps must be positive, not 0"),
    "batch of a configuration": (["--model", "quickstart", "--batch-size", 4], "train.batch_size"),
}


NOT_WHOLE = {
    "steps": ({"steps": 2.5}, "steps must be a whole number of at least 1, not 2.5"),
    "batch size": ({"batch_size": True}, "batch size must be a whole number of at least 1, not True"),
    "sequence": ({"sequence": 16.5}, "`sequence` must be a whole number of at least 1, not 16.5"),
    "a phase's steps": ({"phases": [(0.9, 2), (0.0, 2.5)]}, r"phases.1.steps must be a whole number of .*, not 2.5"),
    "no pair": ({"phases": [(0.9,)]}, r"phases.0 must be \(sparsity, steps\), not \(0.9,\)"),
}


@pytest.mark.parametrize("arguments, message", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_what_no_run_could_have_is_not_planned(arguments, message):
    with pytest.raises(UserError, match=message):
        plan("gpt2-small", **arguments)


@pytest.mark.parametrize("arguments, messages", [(a, m) for a, *m in BAD.values()], ids=BAD)
def test_bad_input_in_one_line(command, arguments, messages):
    status, out, err = command(*(arguments if "--model" in arguments else ["--model", LARGE, *arguments]))
    assert status == 2 and out == "" and err.count("\n") == 1
    for message in messages:
        assert message in err


@pytest.mark.parametrize(
    "body, message",
    [
        ("{", "config.json is no JSON"),
        ('{"model_type": "mixtral"}', "model_type 'mixtral' are not known"),
        ('{"model_type": "gptj", "n_embd": "x"}', "expected a whole number as n_layer"),
        ('{"model_type": "gpt2", "n_embd": "x"}', "n_layer must be a whole number of at least 1"),
    ],
    ids=["broken", "another architecture", "missing sizes", "gpt2's"],
)
def test_hugging_face_folders_that_cannot_be_planned(tmp_path, body, message):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text(body)
    with pytest.raises(UserError, match=message):
        plan(tmp_path)


@pytest.mark.parametrize(
    "asked", [{}, {"time": True}, {"effective": None, "hours": 1.0}], ids=["alone", "beside a timing", "for a wish"]
)
def test_machines_that_cannot_share_a_step_are_refused_before_anything_is_measured(asked):
    with pytest.raises(UserError, match="7 machines cannot share the 12 sequences of a step evenly"):
        plan("gpt2-small", batch_size=12, machines=Machines(7, 10.0), progress=pytest.fail, **asked)
