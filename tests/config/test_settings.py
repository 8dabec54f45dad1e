"""Settings: what follows from what, and one clear line for everything that cannot be."""

import pytest

from vspdf import ledger, shapes
from vspdf.config import loading, resolve
from vspdf.config.settings import ModelConfig
from vspdf.errors import UserError

BASE = """
model: {n_layer: 2, d_model: 32, n_head: 4, sequence_length: 16}
train: {batch_size: 8}
phases:
  - {sparsity: 0.9, steps: 100}
  - {steps: 20}
"""


@pytest.fixture
def load(tmp_path):
    def load(text=BASE, *overrides):
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return loading.load(path, overrides)

    return load


def test_what_is_left_out_follows_from_the_rest(load):
    settings = load(BASE)
    assert settings.model.d_ff == 128 and settings.model.vocab_size is None
    assert settings.run_dir == "runs/run" and settings.train.micro_batch_size == 8
    sparse, dense = settings.phases
    assert (sparse.name, dense.name) == ("sparse 0.9", "dense")
    assert (sparse.tokens, dense.tokens) == (100 * 8 * 16, 20 * 8 * 16)
    assert (sparse.warmup_steps, dense.warmup_steps) == (5, 2)  # 5 % at the start, 10 % after a switch
    assert (sparse.lr, sparse.lr_end, sparse.beta2, sparse.weight_decay) == (6e-4, 6e-4 / 10, 0.95, 0.1)


def test_tokens_become_whole_steps(load):
    settings = load(BASE, "phases.0.steps=null", "phases.0.tokens=1000")
    assert (settings.phases[0].steps, settings.phases[0].tokens) == (8, 1024)
    assert load(BASE, "phases.0.steps=null", "phases.0.tokens=1").phases[0].steps == 1


def test_overrides_reach_every_level_and_type(load):
    settings = load(
        BASE,
        "phases.1.lr_multiple=2.5",
        "model.d_ff=48",
        "optimizer.lr=1e-3",
        "data.repeat=true",
        "name=mine",
        "data.corpus=hf:owner/name:part",
        "train.micro_batch_size=4",
        "phases.0.batch_size=4",
        "train={log_every: 3}",
    )
    assert settings.phases[1].lr_multiple == 2.5 and settings.model.d_ff == 48 and settings.optimizer.lr == 1e-3
    assert settings.data.repeat is True and settings.run_dir == "runs/mine"
    assert settings.data.corpus == "hf:owner/name:part"
    assert (settings.train.log_every, settings.train.batch_size, settings.phases[0].batch_size) == (3, 8, 4)
    assert [phase.steps for phase in load(BASE, "phases=[{steps: 3}]").phases] == [3]


def test_presets_give_their_shape_and_other_keys_override_it(load):
    settings = load("model: {name: cerebras-gpt-111m, sequence_length: 64}\nphases: [{steps: 1}]")
    shape = resolve.model_shape(settings.model)
    assert shape == shapes.Shape(10, 768, 12, 3072, 50257, 64)


def test_saved_and_loaded_again_it_is_the_same(load, tmp_path):
    settings = load(BASE)
    (tmp_path / "saved.yaml").write_text(loading.to_yaml(settings))
    assert loading.load(tmp_path / "saved.yaml") == settings


SHIPPED = sorted(path.stem for path in loading.shipped())
FINE_TUNING = [name for name in SHIPPED if name.startswith("dart")]
A_STAGE_A_FILE = [name for name in SHIPPED if name.startswith("cerebras-6.7b")]  # tests/interop/test_cerebras.py


@pytest.mark.parametrize("name", FINE_TUNING)
def test_shipped_fine_tuning_wants_a_model_and_a_task(name):
    start = ("checkpoint", ModelConfig(name="cerebras-gpt-6.7b", vocab_size=50257))
    settings = loading.load(name, ["data.path=train.json"], start=start)
    phase = settings.phases[0]
    assert (phase.decay, phase.lr_end, settings.optimizer.beta2) == ("cosine", 0, 0.999)
    assert settings.model.d_model == 4096 and phase.warmup_steps == pytest.approx(phase.steps / 10, abs=1)
    with pytest.raises(UserError, match=r"data.path is not set"):
        loading.load(name, start=start)
    with pytest.raises(UserError, match=r"vspdf finetune CHECKPOINT CONFIG"):
        loading.load(name)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in FINE_TUNING + A_STAGE_A_FILE])
def test_shipped_configurations_load_and_plan(name):
    settings = loading.load(name)
    shape = resolve.model_shape(settings.model, vocab_size=257)
    stages = [(phase.sparsity, float(phase.tokens)) for phase in settings.phases]
    assert settings.phases[0].sparsity == 0.9 and settings.phases[-1].sparsity == 0
    assert ledger.training_flops(shape, stages, convention="linear") > 0


def test_the_quick_start_is_75_percent_effective():
    settings = loading.load("quickstart")
    steps = [(phase.sparsity, phase.steps) for phase in settings.phases]
    total = sum(n for _, n in steps)
    assert sum(n * (1 - s) for s, n in steps) / total == pytest.approx(0.25, abs=0.005)
    assert 10e6 < resolve.model_shape(settings.model, 257).parameters < 15e6


BAD_FILES = {
    "empty": ("", r"model.n_layer is not set; give it, or model.name for a preset"),
    "a list": ("- 1\n- 2", r"settings.yaml: expected a mapping of settings, not a list"),
    "no YAML": ("a: [1\n", r"settings.yaml is not valid YAML: while parsing"),
    "a tag that does not fit": ("a: !!timestamp x\n", r"settings.yaml is not valid YAML: "),
    "a number of too many digits": ("a: " + "9" * 5000, r"settings.yaml is not valid YAML: Exceeds the limit"),
    "lists of lists of lists": ("[" * 20_000, r"settings.yaml is not valid YAML: "),
    "twice": ("name: a\nname: b\n", r"found duplicate key name"),
    "no text": (b"\xff\xfe\x00a", r"settings.yaml cannot be read: 'utf-8'"),
    "unknown section": ("optimiser: {lr: 1}", r"unknown setting 'optimiser'. Did you mean 'optimizer'\?"),
    "unknown key": ("model: {n_layers: 2}", r"unknown setting 'model.n_layers'. Did you mean 'n_layer'\?"),
    "unknown key of a phase": ("phases: [{steps: 1}, {sparsty: 1}]", r"'phases.1.sparsty'. Did you mean 'sparsity'\?"),
    "section without settings": ("train:\n", r"'train' must be a mapping of settings, not nothing"),
    "section of another kind": ("train: 3", r"'train' must be a mapping of settings, not '3'"),
    "phases of another kind": ("phases: {steps: 1}", r"'phases' must be a list, not a mapping"),
    "phase of another kind": ("phases: [dense]", r"'phases.0' must be a mapping of settings, not 'dense'"),
    "type": ("model: {n_layer: two}", r"'model.n_layer': Value 'two' of type 'str' could not be converted to Integer"),
    "fraction of a layer": ("model: {n_layer: 2.5}", r"'model.n_layer': Value '2.5' of type 'float'"),
    "null": ("seed:\n", r"'seed' must not be empty"),
    "interpolation": (BASE + "name: ${nothing}", r"'name': Interpolation key 'nothing' not found"),
    "no phase": (BASE.split("phases:")[0], r"at least one phase is needed"),
}


@pytest.mark.parametrize("text, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_get_one_line(load, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


BAD_OVERRIDES = {
    "steps": r"override 'steps' is not of the form key=value",
    "=3": r"override '=3' is not of the form key=value",
    "optimzer.lr=1": r"unknown setting 'optimzer' \(override optimzer.lr=...\). Did you mean 'optimizer'\?",
    "optimizer.lrr=1": r"unknown setting 'optimizer.lrr' .* Did you mean 'lr'\?",
    "optimizer.lr.x=1": r"unknown setting 'optimizer.lr.x'",
    "optimizer.lr=abc": r"'optimizer.lr': Value 'abc' of type 'str' could not be converted to Float",
    "optimizer.lr=": r"'optimizer.lr': Value ''",
    "phases.2.steps=1": r"phases has 2 items, no 'phases.2'",
    "phases.0.step=1": r"unknown setting 'phases.0.step' .* Did you mean 'steps'\?",
    "phases.0=3": r"'phases.0' must be a mapping of settings, not '3'",
    "phases=3": r"'phases' must be a list, not '3'",
    "phases=[]": r"at least one phase is needed",
    "model=3": r"'model' must be a mapping of settings, not '3'",
    "train.batch_size=null": r"'train.batch_size' must not be empty",
    "train.tensorboard=maybe": r"'train.tensorboard': Value 'maybe' is not a valid bool",
    "phases.0.update={": r"its value is not valid YAML",
    "model.name=gpt2-smal": r"unknown model 'gpt2-smal'. Did you mean 'gpt2-small'\?",
    "model.n_head=5": r"model.n_head = 5 does not divide model.d_model = 32",
    "model.n_layer=1000000000": r"model.n_layer must be at most 10,000, not 1,000,000,000",
    "model.n_layer=0": r"model.n_layer must be at least 1, not 0",
    "model.d_ff=0": r"model.d_ff must be at least 1, not 0",
    "model.vocab_size=-1": r"model.vocab_size must be at least 1, not -1",
    "model.init_std=0": r"model.init_std must be positive, not 0",
    "train.precision=fp64": r"train.precision = 'fp64' is not known. Known: fp32, bf16",
    "train.backend=gpu": r"train.backend = 'gpu' is not known. Did you mean 'cpu'\?",
    "train.backend=triton": r"train.backend = 'triton' does not run on train.device = 'cpu'",
    "train.device=cuda0": r"train.device = 'cuda0' is not known. Did you mean 'cuda'\?",
    "train.batch_size=0": r"train.batch_size must be at least 1, not 0",
    "train.micro_batch_size=0": r"train.micro_batch_size must be at least 1, not 0",
    "train.micro_batch_size=3": r"train.micro_batch_size = 3 does not divide phases.0.batch_size = 8",
    "train.log_every=0": r"train.log_every must be at least 1, not 0",
    "train.keep_checkpoints=0": r"train.keep_checkpoints must be at least 1, not 0",
    "train.eval_every=-1": r"train.eval_every must not be negative, is -1",
    "train.threads=0": r"train.threads must be at least 1, not 0",
    "optimizer.lr=0": r"optimizer.lr must be positive, not 0.0",
    "optimizer.lr=.nan": r"optimizer.lr must be positive, not nan",
    "optimizer.lr=.inf": r"optimizer.lr must be positive, not inf",
    "optimizer.beta2=1": r"optimizer.beta2 must lie in \[0, 1\), not 1.0",
    "optimizer.eps=-1": r"optimizer.eps must not be negative, is -1.0",
    "optimizer.weight_decay=-1": r"optimizer.weight_decay must not be negative, is -1.0",
    "optimizer.clip=-1": r"optimizer.clip must not be negative, is -1.0",
    "seed=-1": r"seed must not be negative, is -1",
    "init_from=": r"init_from is empty: expected a path, or null for none",
    "run_dir= ": r"run_dir is empty: expected a path",
    "start=": r"start is empty: expected a path",
    "data.path=": r"data.path is empty: expected a path",
    "data.validation_path=''": r"data.validation_path is empty: expected a path",
    "data.cache_dir=": r"data.cache_dir is empty: expected a path",
    "phases.0={init_method: file, init_file: ''}": r"init_method: file and init_file, the file with the masks, belong",
    f"seed={2**64}": r"seed must be below 2\^64, is 18446744073709551616",
    "name=a/b": r"name = 'a/b' must be usable as a folder's name",
    "name=..": r"name = '..' must be usable as a folder's name",
    "data.validation_fraction=0": r"data.validation_fraction must lie between 0 and 1, is 0.0",
    "phases.0.sparsity=1": r"phases.0.sparsity must lie in \[0, 1\), not 1.0",
    "phases.0.sparsity=-0.1": r"phases.0.sparsity must lie in \[0, 1\), not -0.1",
    "phases.1.sparsity=0.95": r"phases.1.sparsity = 0.95 is above the phase before \(0.9\): weights are only ever",
    "phases.0.steps=0": r"phases.0.steps must be at least 1, not 0",
    "phases.0.tokens=100": r"phases.0 needs steps or tokens, one of them",
    "phases.0.steps=null": r"phases.0 needs steps or tokens, one of them",
    "phases.0.batch_size=0": r"phases.0.batch_size must be at least 1, not 0",
    "phases.0.decay=lin": r"phases.0.decay = 'lin' is not known. Did you mean 'linear'\?",
    "phases.0.moments=resett": r"phases.0.moments = 'resett' is not known. Did you mean 'reset'\?",
    "phases.0.lr=0": r"phases.0: lr and lr_multiple must be positive",
    "phases.0.lr_end=1": r"phases.0.lr_end = 1 must lie between 0 and the phase's peak, 0.0006 \(lr · lr_multiple\)",
    "phases.0.lr_end=-1": r"phases.0.lr_end = -1 must lie between 0",
    "phases.0.warmup_steps=101": r"phases.0.warmup_steps = 101 must lie between 0 and the phase's 100 steps",
    "phases.0.revived_warmup=-1": r"phases.0.revived_warmup must not be negative, is -1",
    "phases.0.beta2=1.0": r"phases.0.beta2 must lie in \[0, 1\), not 1.0",
    "phases.0.weight_decay=-1": r"phases.0.weight_decay must not be negative, is -1.0",
}


@pytest.mark.parametrize("override, message", BAD_OVERRIDES.items(), ids=BAD_OVERRIDES)
def test_bad_overrides_get_one_line(load, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load(BASE, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_phase_without_tokens_is_refused(load, tokens):
    with pytest.raises(UserError, match=rf"phases.0.tokens must be at least 1, not {tokens}"):
        load(BASE, "phases.0.steps=null", f"phases.0.tokens={tokens}")


def test_missing_configurations_name_what_is_near(tmp_path):
    with pytest.raises(UserError, match=r"no configuration 'quickstrat': .* Did you mean 'quickstart'\?"):
        loading.load("quickstrat")
    with pytest.raises(UserError, match=r"is a folder; a configuration is a YAML file"):
        loading.load(tmp_path)
    (tmp_path / "mine.yaml").write_text(BASE)
    with pytest.raises(UserError, match=rf"Did you mean '{tmp_path}/mine.yaml'\?"):
        loading.load(tmp_path / "mime.yaml")


SPARSE = [
    "phases.0.sparsity=0.5", 'phases.0.layers={"*": 0.5}', "phases.0={schedule: cycling, levels: [0.5, 0]}",
    "phases.0={algorithm: set, sparsity: 0.0, layers: {h.0.*: 0.5}}",
    "phases.0={algorithm: gmp, schedule: power, sparsity_end: 0.5}",
]  # fmt: skip


@pytest.mark.parametrize("override", SPARSE)
def test_fine_tuning_is_dense_however_a_phase_would_be_sparse(override):
    body = {"data": {"path": "pairs.jsonl"}, "phases": [{"steps": 6}, {"steps": 6}]}
    start = ("run", ModelConfig(n_layer=1, d_model=8, n_head=2, sequence_length=64, vocab_size=257))
    assert loading.build(body, "here", ['phases.1.layers={"*": 0}'], start=start).task
    with pytest.raises(UserError, match=rf"{override[:8]}: fine-tuning is dense: expected no sparsity"):
        loading.build(body, "here", [override], start=start)


IDLE = {
    ("phases.1.init_method=topk",): r"phases.1.init_method = topk does nothing: first masks are those of the first",
    ("phases.1.init_method=file", "phases.1.init_file=none.npz"): r"phases.1.init_method = file does nothing",
    ("phases.0.sparsity=0", "phases.0.init_method=topk"): r"phases.0.init_method = topk does nothing: the phase begins",
    (
        "phases.1={algorithm: set, sparsity: 0}",
    ): r"phases.1: algorithm: set has no masks to move, the sparsity stays at 0",
    ("phases.1={algorithm: rigl}",): r"phases.1: algorithm: rigl has no masks to move",
    (
        "train.memory=low",
        "train.backend=reference",
    ): r"train.memory = 'low' is of the CPU's kernels: it does nothing with",
    ("train.memory=low", "train.device=cuda"): r"train.backend = 'auto' on train.device = 'cuda'",
}


@pytest.mark.parametrize("overrides, message", IDLE.items(), ids=str)
def test_settings_that_would_do_nothing_are_refused(load, overrides, message):
    with pytest.raises(UserError, match=message):
        load(BASE, *overrides)


HOMES = {
    "run_dir": ("run_dir=~/x", lambda config: config.run_dir),
    "init_from": ("init_from=~/x", lambda config: config.init_from),
    "init_file": ("phases.0={init_method: file, init_file: ~/x}", lambda config: config.phases[0].init_file),
}


@pytest.mark.parametrize("override, found", HOMES.values(), ids=HOMES)
def test_a_home_in_a_path_is_found(load, monkeypatch, override, found):
    monkeypatch.setenv("HOME", "/homes/me")
    assert found(load(BASE, override)) == "/homes/me/x"
    with pytest.raises(UserError, match=r"'~no one/x': there is no such home directory"):
        load(BASE, override.replace("~/", "~no one/"))


def test_a_task_at_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    start = ("~/run", ModelConfig(n_layer=1, d_model=8, n_head=2, sequence_length=64, vocab_size=257))
    body = {"data": {"path": "~/a", "validation_path": "~/b"}, "phases": [{"steps": 6}]}
    config = loading.build(body, "here", start=start)
    assert [config.start, config.data.path, config.data.validation_path] == [
        f"/homes/me/{x}" for x in ("run", "a", "b")
    ]


def test_settings_that_say_what_is_so_anyway_are_taken(load, tmp_path):
    constant = load(BASE, "phases.1={decay: constant, lr: 1e-3, lr_end: 1e-3}", "phases.0.decay=constant")
    (tmp_path / "saved.yaml").write_text(loading.to_yaml(constant))
    assert loading.load(tmp_path / "saved.yaml") == constant and constant.phases[1].lr_end == 1e-3
    assert load(BASE, "phases.0.init_method=topk", "phases.1.init_method=topk").phases[1].init_method == "topk"
    assert load(BASE, 'phases.1={algorithm: set, layers: {"*.c_fc": 0.5}}').phases[1].algorithm == "set"


IDLE_IN_FINE_TUNING = {
    "data.corpus=mine/": r"data.corpus = mine/ is for pre-training: fine-tuning learns from data.path alone",
    "data.text_field=body": r"data.text_field = body is for pre-training",
    "data.validation_fraction=0.1": r"validation_fraction = 0.1 does nothing beside data.validation_path: give one",
    "model.init_std=0.1": r"model.init_std = 0.1, but the model to start from has weights of its own: leave it out",
    "start=other": r"start = other, but fine-tuning was told to begin with run: leave it out",
}


@pytest.mark.parametrize("override, message", IDLE_IN_FINE_TUNING.items(), ids=IDLE_IN_FINE_TUNING)
def test_settings_that_would_do_nothing_in_fine_tuning_are_refused(override, message):
    start = ("run", ModelConfig(n_layer=1, d_model=8, n_head=2, sequence_length=64, vocab_size=257))
    body = {"data": {"path": "pairs.jsonl", "validation_path": "more.jsonl"}, "phases": [{"steps": 6}]}
    assert loading.build(body, "here", ["start=run", "model.init_std=0.02"], start=start).start == "run"
    with pytest.raises(UserError, match=message):
        loading.build(body, "here", [override], start=start)


@pytest.mark.parametrize("more", [{}, {"decay": "constant"}, {"decay": "cosine"}], ids=["linear", "constant", "cosine"])
@pytest.mark.parametrize("low", [{"lr": 1e-5}, {"lr_multiple": 0.05}], ids=["lr", "lr_multiple"])
def test_a_peak_below_the_usual_end_of_the_rate_is_its_own_end(load, low, more):
    phase = load(BASE, f"phases.1={low | more}").phases[1]
    assert phase.lr_end == phase.lr * phase.lr_multiple < 6e-5
    assert {phase.learning_rate(step, phase.lr) for step in (phase.warmup_steps, phase.steps - 1)} == {phase.lr_end}


def test_an_end_of_the_rate_that_does_nothing_is_told(load, caplog):
    with caplog.at_level("WARNING", "vspdf"):
        load(BASE, "phases.1.decay=constant", "phases.1.lr_end=2.5e-5")
    assert "phases.1.lr_end = 2.5e-05 does nothing with decay: constant." in caplog.text


def test_scales_of_sparse_weights_that_a_dense_phase_has_none_of_are_told(load, caplog):
    with caplog.at_level("WARNING", "vspdf"):
        load(BASE, "phases.0.s_mu_par=true")
        assert not caplog.text
        load(BASE, "phases.1.s_mu_par=true")
    assert "phases.1.s_mu_par = true does nothing: the phase begins dense." in caplog.text
