"""Configurations of the Cerebras stack, both generations: whole files, masks that move, and a recipe in three files."""

import copy
import json
from dataclasses import replace

import pytest
import yaml

from vspdf.config import loading, resolve
from vspdf.config.settings import ModelConfig
from vspdf.data.text import prepare
from vspdf.errors import UserError
from vspdf.interop import checkpoints, load_config
from vspdf.model import GPT
from vspdf.pattern import kept_count
from vspdf.runs.folder import Run
from vspdf.shapes import MODELS, PUBLISHED, Shape
from vspdf.sparsity.layer import sparse_layers
from vspdf.train.trainer import train

FILTERS = ["*proj_[qkv]_dense_layer.weight", "*proj_output_dense_layer.weight", "*linear_layer.weight"]
PATTERNS = [".*proj_[qkv]_dense_layer.weight", ".*proj_output_dense_layer.weight", ".*linear_layer.weight"]
NORMAL = {"name": "truncated_normal", "mean": 0.0, "std": 0.02, "a": -0.04, "b": 0.04}


def model(**settings):
    return {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "filter_size": 128, "max_position_embeddings": 16,
        "vocab_size": 257, "position_embedding_type": "learned", "share_embedding_weights": True, "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0, "use_projection_bias_in_attention": True, "use_ffn_bias_in_attention": True,
        "use_ffn_bias": True, "nonlinearity": "gelu", "layer_norm_epsilon": 1e-5, "use_bias_in_output": False,
        "initializer": NORMAL, "output_layer_initializer": {**NORMAL, "std": 0.01}, "mixed_precision": True,
    } | settings  # fmt: skip


def current(sparsity=None, steps=8, warmup=2, **settings):
    """As the current release has it, everything under `trainer`."""
    init = {
        "backend": {"backend_type": "CSX"},
        "model": {"name": "gpt3", **model(**settings)},
        "optimizer": {"AdamW": {"betas": [0.9, 0.95], "eps": 1e-9, "weight_decay": 0.1, "correct_bias": True}},
        "schedulers": [{"SequentialLR": {"schedulers": [
            {"LinearLR": {"initial_learning_rate": 0.0, "end_learning_rate": 3.6e-4, "total_iters": warmup}},
            {"LinearLR": {"initial_learning_rate": 3.6e-4, "end_learning_rate": 1.2e-5, "total_iters": steps - warmup}},
        ]}}],
        "precision": {"enabled": True, "max_gradient_norm": 1.0},
        "loop": {"max_steps": steps, "eval_frequency": 1000},
        "checkpoint": {"steps": 1000},
        "logging": {"log_steps": 1},
    }  # fmt: skip
    if sparsity is not None:
        init["sparsity"] = sparsity
    data = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": ["./pile"], "batch_size": 8}
    return {"trainer": {"init": init, "fit": {"train_dataloader": data}}}


def older(sparsity=None, steps=8, warmup=2, decay="Linear", peak=3.6e-4, end=1.2e-5, **settings):
    """As releases before had it, blocks side by side."""
    rate = [
        {"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": peak, "total_iters": warmup},
        {"scheduler": decay, "initial_learning_rate": peak, "end_learning_rate": end, "total_iters": steps - warmup},
    ]
    body = {
        "train_input": {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "./pile", "batch_size": 8},
        "model": model(**settings),
        "optimizer": {"optimizer_type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-9, "max_gradient_norm": 1.0,
                      "learning_rate": rate, "weight_decay": 0.1},
        "runconfig": {"max_steps": steps, "checkpoint_steps": 1000, "log_steps": 1},
    }  # fmt: skip
    return body | ({} if sparsity is None else {"sparsity": sparsity})


def loaded(body, tmp_path, *overrides):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(body))
    return load_config(path, ["data.corpus=stdlib", "data.tokenizer=bytes", *overrides])


# -- whole files ------------------------------------------------------------------------------------------------------

WHOLE = {
    "current": current({"sparsity": 0.9, "init_method": "random", "param_filter": FILTERS}),
    "older": older({"sparsity": 0.9, "init_method": "random", "type": "static", "param_name_patterns": PATTERNS}),
}


@pytest.mark.parametrize("form", WHOLE)
def test_a_whole_file_is_read_as_it_is(tmp_path, form):
    found = loaded(WHOLE[form], tmp_path)
    (phase,) = found.phases
    assert (phase.sparsity, phase.layers, phase.init_method) == (0.9, {}, "random")
    assert phase.count == {"current": "truncate", "older": "round"}[form]
    assert (phase.steps, phase.warmup_steps, phase.lr, phase.lr_end, phase.decay) == (8, 2, 3.6e-4, 1.2e-5, "linear")
    assert (found.model.n_layer, found.model.d_ff, found.model.sequence_length, found.model.vocab_size) == (
        2,
        128,
        16,
        257,
    )
    o = found.optimizer
    assert (o.beta1, o.beta2, o.eps, o.weight_decay, o.clip) == (0.9, 0.95, 1e-9, 0.1, 1.0)
    assert found.train.batch_size == 8 and found.train.checkpoint_every == 1000 and found.name == "theirs"


def test_without_a_sparsity_block_it_is_dense_and_text_must_be_named(tmp_path):
    found = loaded(older(), tmp_path)
    assert found.phases[0].sparsity == 0 and found.phases[0].name == "dense"
    unnamed = load_config(tmp_path / "theirs.yaml")  # enough to plan a run
    with pytest.raises(UserError, match=r"the text is not named: give data.corpus=FILE and data.tokenizer=gpt2:FOLDER"):
        prepare(unnamed.data, 16, 0)


def test_settings_that_say_nothing_here_are_named(tmp_path, caplog):
    loaded(edited(edited(older(), "model.backbone", "wafer"), "optimizer.amsgrad", True), tmp_path)
    assert "settings that are not read here: optimizer.amsgrad." in caplog.text
    assert "settings that are not read here: model.backbone." in caplog.text


@pytest.mark.parametrize("form, key", [("older", "runconfig.seed"), ("current", "trainer.init.seed")])
def test_their_seed_is_ours(tmp_path, form, key):
    assert loaded(edited(WHOLE[form], key, 7), tmp_path).seed == 7


def test_names_of_earlier_releases_are_read_too(tmp_path):
    body = older()
    o = body["optimizer"]
    del o["betas"]
    o |= {"beta1": 0.8, "beta2": 0.98, "weight_decay_rate": o.pop("weight_decay")}
    for stretch in o["learning_rate"]:
        stretch["steps"] = stretch.pop("total_iters")
    found = loaded(body, tmp_path)
    assert (found.optimizer.beta1, found.optimizer.beta2, found.optimizer.weight_decay) == (0.8, 0.98, 0.1)
    assert found.phases[0].warmup_steps == 2


LLAMA = {
    "position_embedding_type": "rotary", "norm_type": "rmsnorm", "nonlinearity": "swiglu", "use_ffn_bias": False,
    "use_projection_bias_in_attention": False, "use_ffn_bias_in_attention": False, "initializer": None,
    "output_layer_initializer": None, "initializer_range": 0.02, "embedding_dropout_rate": 0.0,
}  # fmt: skip
ZOO = {
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_heads": 32, "filter_size": 8192,
        "max_position_embeddings": 8192, "attention_module": "multiquery_attention",
        "extra_attention_params": {"num_kv_groups": 8}, "rope_theta": 500000.0, "rotary_dim": 64,
        "pos_scaling_factor": 32.0, "pos_scaling_type": "llama3", "share_embedding_weights": True,
        "pos_scaling_extra_args": {"high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                   "original_max_position_embeddings": 8192},
    },
    "llama-350m": {
        "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 16, "filter_size": 2736,
        "max_position_embeddings": 1024, "rotary_dim": 64, "share_embedding_weights": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_the_llama_family_of_their_zoo(tmp_path, name, caplog):
    found = loaded(current(**LLAMA | ZOO[name]), tmp_path)
    expected = MODELS[name]
    assert resolve.model_shape(found.model) == replace(expected, sequence_length=found.model.sequence_length)
    assert "not read here" not in caplog.text and found.model.init_std == 0.02


def test_filters_name_the_matrices_of_a_llama(tmp_path):
    """Their linear_layer is what is gated, linear_layer_for_glu the gate."""
    block = [{"sparsity": 0.9, "param_filter": ["*linear_layer.weight", "*proj_k_dense_layer.weight"]},
             {"sparsity": 0.5, "param_filter": "*linear_layer_for_glu.weight"}]  # fmt: skip
    found = loaded(current(block, **LLAMA), tmp_path)
    phase = found.phases[0]
    amounts = phase.of_layers(resolve.linear_layers(found.model))
    assert {name.removeprefix("h.0."): s for name, s in amounts.items() if name.startswith("h.0.")} == {
        "attn.q_proj": 0.0, "attn.k_proj": 0.9, "attn.v_proj": 0.0, "attn.o_proj": 0.0, "mlp.gate_proj": 0.5,
        "mlp.up_proj": 0.9, "mlp.down_proj": 0.9,
    }  # fmt: skip


def edited(body, path, value):
    body = copy.deepcopy(body)
    *way, last = path.split(".")
    node = body
    for key in way:
        node = node[key]
    if value is None:
        node.pop(last)
    else:
        node[last] = value
    return body


UNLIKE = {
    "dropout": ("model.dropout_rate", 0.1, r"model.dropout_rate = 0.1 is not offered; expected 0.0"),
    "dropout left out": ("model.dropout_rate", None, r"model.dropout_rate is not set, which means 0.1 there"),
    "alibi": ("model.position_embedding_type", "alibi", r"'alibi' is not offered; expected 'learned' or 'rotary'"),
    "relu": ("model.nonlinearity", "relu", r"model.nonlinearity = 'relu' is not offered; expected 'gelu' or 'swiglu'"),
    "some biases": ("model.use_ffn_bias", False, r"= \[True, True, False\] is not offered; expected all, none, or the"),
    "a sliding window": ("model.attention_sliding_window_length", 8, r"sliding_window_length = 8 is not offered"),
    "groups": (
        "model.attention_inner_dim",
        "all",
        r"attention_inner_dim must be a whole number of at least 1, not",
    ),
    "µP": ("model.embeddings_scale", 10.0, r"model.embeddings_scale is µP, which is not trained here"),
    "no size": ("model.hidden_size", "wide", r"model.hidden_size must be a whole number, not 'wide'"),
    "no initializer": ("model.output_layer_initializer", {"name": "uniform"}, r"must be a truncated_normal with a std"),
    "a mean": (
        "model.initializer",
        {**NORMAL, "mean": 0.5},
        r"model.initializer.mean = 0.5 is not offered; expected 0",
    ),
    "a bound that is none": ("model.initializer", {**NORMAL, "a": "-2s"}, r"initializer.a must be a number, not '-2s'"),
    "a std of text": ("model.initializer", {**NORMAL, "std": "2%"}, r"initializer.std must be a number, not '2%'"),
    "no std": ("model.initializer", {**NORMAL, "std": 0}, r"initializer must be a truncated_normal with a std, not"),
    "a base of 0": ("model", model(**LLAMA, rope_theta=0), r"rope_base must be"),
    "a range of text": ("model.initializer_range", "a", r"model.initializer_range must be a number, not 'a'"),
    "a range of 0": ("model.initializer_range", 0, r"model.initializer_range must be a number above 0, not 0"),
    "a billion layers": ("model.num_hidden_layers", 10**9, r"num_hidden_layers = 1000000000 must lie between 1 and 10"),
    "no layers": ("model.num_hidden_layers", 0, r"num_hidden_layers = 0 must lie between 1 and 10,000"),
    "no bias correction, older": (
        "optimizer.use_bias_correction",
        False,
        r"use_bias_correction = False is not off",
    ),
    "a loss of lists": ("model.loss_scaling", ["a"], r"loss_scaling = \['a'\] with loss_weight = 1.0 is not offered"),
    "embeddings": ("model.embedding_initializer", {**NORMAL, "std": 0.1}, r"embedding_initializer.std = 0.1 is not"),
    "loss": ("model.loss_scaling", "batch_size", r"loss_scaling = 'batch_size' with loss_weight = 1.0 is not offered"),
    "post-norm": ("model.norm_first", False, r"model.norm_first = False is not offered; expected True"),
    "length": ("train_input.max_sequence_length", 8, r"max_sequence_length = 8 is not offered beside max_position_emb"),
    "optimizer": ("optimizer.optimizer_type", "SGD", r"optimizer 'SGD' is not offered; expected AdamW"),
    "scheduler": ("optimizer.learning_rate", [{"scheduler": "CyclicLR"}], r"scheduler 'CyclicLR' is not offered"),
    "another length": ("runconfig.max_steps", 9000, r"schedule covers 8 steps, the run has 9,000"),
    "misspelt": (
        "model.hidden_sise",
        1,
        r"model.hidden_size must be a whole number, not None. Did you mean 'hidden_sise'",
    ),
    "one beta": ("optimizer.betas", 0.9, r"optimizer.betas must be two numbers, not 0.9"),
    "no bias correction": (
        "optimizer.correct_bias",
        False,
        r"optimizer.correct_bias = False is not offered; expected T",
    ),
    "no steps": ("runconfig.max_steps", None, r"runconfig.max_steps must be a whole number of at least 1, not None"),
    "no mapping": ("runconfig", [1], r"runconfig must be a mapping, not \[1\]"),
}


def test_the_output_layers_have_a_deviation_of_their_own(tmp_path):
    body = older(output_layer_initializer={**NORMAL, "std": 0.0025})
    found = loaded(body, tmp_path)
    assert (found.model.init_std, found.model.output_init_std) == (0.02, 0.0025)
    made = GPT(Shape(2, 32, 4, 128, 257, 16), found.model.init_std, output_init_std=found.model.output_init_std)
    inner, outer = (layer.weight.detach() for layer in (made.h[0].mlp.c_fc, made.h[0].mlp.c_proj))
    assert outer.abs().max() <= 0.005 < inner.std()
    assert loaded(older(), tmp_path).model.output_init_std == pytest.approx(0.02 / 2)


def test_an_initializers_std_may_be_whole_and_what_of_it_is_not_read_is_named(tmp_path, caplog):
    wide = {"name": "truncated_normal", "std": 1, "a": -2.0, "b": 2}
    assert loaded(older(initializer=wide), tmp_path).model.init_std == 1.0
    assert "model.initializer" not in caplog.text
    loaded(older(initializer={**wide, "std": 0.02, "seed": 3}), tmp_path)
    assert "model.initializer: a = -2 and b = 2 are not read: weights are drawn within 2 std, 0.04" in caplog.text
    assert "not read here: model.initializer.seed" in caplog.text


HARMLESS = {
    "factors of one": ("model", {"embeddings_scale": 1.0, "output_logits_scale": 1, "mup_base_hidden_size": None}),
    "keys that are off": ("model", {"scale_qk_dot_by_layer_idx": False, "fixed_sparse_attention": None}),
    "no dropout": ("model", {"embedding_dropout_rate": 0.0, "residual_dropout_rate": 0}),
    "a loss by default": ("model", {"loss_scaling": None}),
    "numbers of their machine": ("model", {"precision_opt_level": 1, "use_bfloat16": True, "name": "gpt3"}),
    "older names": ("optimizer", {"epsilon": 1e-9, "use_bias_correction": True, "eps": None}),
    "keys of the run": ("runconfig", {"save_losses": True, "eval_steps": 3, "num_csx": 8, "precision_opt_level": 0}),
}


@pytest.mark.parametrize("block, keys", HARMLESS.values(), ids=HARMLESS)
def test_keys_that_change_nothing_are_taken(tmp_path, caplog, block, keys):
    body = older()
    body[block] = {k: v for k, v in (body[block] | keys).items() if not (block == "optimizer" and v is None)}
    assert loaded(body, tmp_path) == loaded(older(), tmp_path)
    assert "not read here" not in caplog.text


def test_a_rate_that_stays_after_the_end_is_none(tmp_path):
    body = older()
    body["optimizer"]["learning_rate"][1]["decay_steps"] = body["optimizer"]["learning_rate"][1].pop("total_iters")
    body["optimizer"]["learning_rate"].append({"scheduler": "Constant", "learning_rate": 1.2e-5})
    assert loaded(body, tmp_path) == loaded(older(), tmp_path)


def published(batch, name="cerebras-gpt-6.7b", steps=None, **settings):
    shape, run = MODELS[name], PUBLISHED[name]
    sizes = dict(hidden_size=shape.d_model, num_hidden_layers=shape.n_layer, num_heads=shape.n_head,
                 filter_size=shape.d_ff, vocab_size=shape.vocab_size, max_position_embeddings=shape.sequence_length,
                 output_layer_initializer=None)  # fmt: skip
    body = older(steps=steps or run.steps, **sizes)
    body["train_input"]["batch_size"] = batch
    body["runconfig"] |= settings
    return body


@pytest.mark.parametrize(
    "name, batch, systems, steps",
    [("cerebras-gpt-6.7b", 130, 8, None), ("cerebras-gpt-6.7b", 65, 16, 62_523), ("cerebras-gpt-1.3b", 132, 4, None),
     ("cerebras-gpt-2.7b", 264, 2, None), ("cerebras-gpt-13b", 90, 12, 116_223)],
    ids=str,
)  # fmt: skip
def test_a_batch_that_is_one_systems_is_asked_about(tmp_path, name, batch, systems, steps):
    with pytest.raises(UserError, match=rf"one of {systems} systems. Write batch_size: {batch * systems}, or run"):
        loaded(published(batch, name, steps), tmp_path)
    assert loaded(published(batch, name, steps, num_csx=1), tmp_path).train.batch_size == batch
    assert loaded(published(batch * systems, name, steps), tmp_path).train.batch_size == batch * systems
    assert loaded(published(batch, name, 500), tmp_path).train.batch_size == batch  # another run


def test_a_batch_that_nothing_tells_about_is_said(tmp_path, caplog):
    body = older()
    body["optimizer"] |= {"beta1": 0.9, "beta2": 0.95}
    assert loaded(body, tmp_path).train.batch_size == 8
    assert "batch_size = 8 is taken for the whole; release 1.8 wrote that of one system" in caplog.text


@pytest.mark.parametrize("form", ["older", "current"])
def test_bent_files_are_read_or_refused(tmp_path, form, bent):
    path, refused = tmp_path / "theirs.yaml", 0
    text = json.dumps({"older": older, "current": current}[form]({"sparsity": 0.9, "param_filter": FILTERS}))
    for _ in range(150):
        path.write_bytes(bent(text))
        try:
            load_config(path, ["data.corpus=stdlib", "data.tokenizer=bytes"])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("path, value, message", UNLIKE.values(), ids=UNLIKE)
def test_what_our_trainer_does_otherwise_is_refused_by_name(tmp_path, path, value, message):
    body = edited(older(), path, value)
    if path == "model.hidden_sise":
        del body["model"]["hidden_size"]
    with pytest.raises(UserError, match=message):
        loaded(body, tmp_path)


# -- masks that move --------------------------------------------------------------------------------------------------

COSINE = {"type": "cosine", "init": 0.3, "half_period": 6}
MOVING = {
    "set, from the first step": ({"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2}}, 0.75, [0.75] * 4, 3),
    "rigl, dense at first": (
        {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 2, "start": 2}, "drop_fraction": COSINE}, 0.0,
        [0.0, 0.0, 0.225, 0.2835], 1,  # never more than the fraction at once, which is 0 at the last
    ),
    "gmp": (
        {"algorithm": "gmp", "schedule": {"type": "exp", "init": 0, "gamma": -0.1}, "update": {"freq": 2}}, 0.0,
        [0.0, 0.0, 0.1813, 0.3297], 2,
    ),
    "every step": ({"algorithm": "set", "sparsity": 0.75}, 0.75, [0.75] * 4, 7),
}  # fmt: skip


@pytest.mark.parametrize("form", [current, older], ids=["current", "older"])
@pytest.mark.parametrize("block, first, kept, moves", MOVING.values(), ids=MOVING)
def test_masks_that_move_are_taken_with_their_rules(tmp_path, corpus, form, block, first, kept, moves):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(form(block)))
    data = [f"data.corpus={corpus}", "data.tokenizer=bytes", f"run_dir={tmp_path}/run", "train.backend=cpu"]
    config = load_config(path, [*data, "train.measure_dense=0", "train.sample_tokens=0", "train.log_every=1"])
    (phase,) = config.phases
    assert (phase.algorithm, phase.rules, phase.sparsity) == (block["algorithm"], "cstorch", first or phase.sparsity)
    assert (
        phase.drop_fraction == {"minimum": 0.0, **COSINE}
        if "drop_fraction" in block
        else phase.drop_fraction in (0.3, None)
    )
    assert loading.build(loading.to_dict(config), "again") == config
    train(config)
    lines = Run(tmp_path / "run").lines
    assert [lines[step]["sparsity"] for step in (0, 1, 2, 4)] == pytest.approx(kept, abs=5e-3)
    assert lines[-1].get("mask_updates", 0) == moves


# -- a recipe in three files ------------------------------------------------------------------------------------------

TINY = [
    "model.n_layer=2", "model.d_model=32", "model.n_head=4", "model.d_ff=128", "model.sequence_length=64",
    "model.vocab_size=257", "phases.0.steps=4", "phases.0.warmup_steps=1", "train.batch_size=8", "train.eval_every=0",
    "train.measure_dense=0", "train.sample_tokens=0",
]  # fmt: skip


def test_stage_1_stage_2_and_dart_run_from_three_files(tmp_path, corpus, vspdf):
    """The shipped files themselves, made small on the command line."""
    towns = ("Rome", "Oslo", "Bonn", "Lima", "Cork", "Kiel", "Pisa", "York", "Nice", "Bern") * 5
    triples = [{"tripleset": [[f"Al {i}", "from", t]], "annotations": [{"text": t}]} for i, t in enumerate(towns)]
    (tmp_path / "dart.json").write_text(json.dumps(triples))
    text = [*TINY, f"data.corpus={corpus}", "data.tokenizer=bytes"]
    one, two, three = (f"run_dir={tmp_path / name}" for name in ("one", "two", "three"))
    status, out, err = vspdf("train", "cerebras-6.7b-stage1", *text, one, "--json")
    assert status == 0, err
    assert json.loads(out)["phases"][0]["sparsity"] == 0.9
    layers = sparse_layers(checkpoints.load(tmp_path / "one").model).values()
    assert len(layers) == 8 and all(x.pattern.nnz == kept_count(x.pattern.numel, 0.9) for x in layers)
    status, out, err = vspdf("train", "cerebras-6.7b-stage2", *text, two, f"init_from={tmp_path / 'one'}", "--json")
    assert status == 0, err
    assert "with moments, its data from sequence 32" in err and not sparse_layers(
        checkpoints.load(tmp_path / "two").model
    )
    pairs = [*TINY, f"data.path={tmp_path / 'dart.json'}", "data.length=64", three]
    status, out, err = vspdf("finetune", tmp_path / "two", "cerebras-6.7b-dart", *pairs, "--json")
    assert status == 0, err
    assert json.loads(out)["phases"][0]["steps"] == 4 and checkpoints.load(tmp_path / "three").state["step"] == 4


def test_the_three_files_are_the_published_recipe():
    ours, start = loading.load("cerebras-gpt-6.7b-variable"), ModelConfig("cerebras-gpt-6.7b", vocab_size=50257)
    files = [load_config(f"cerebras-6.7b-stage{i}") for i in (1, 2)]
    files.append(load_config("cerebras-6.7b-dart", ["data.path=x"], start=("stage2", start)))
    phases = [*ours.phases, loading.load("dart-6.7b", ["data.path=x"], start=("stage2", start)).phases[0]]
    for file, phase in zip(files, phases, strict=True):
        (theirs,) = file.phases
        for key in (
            "sparsity",
            "steps",
            "tokens",
            "batch_size",
            "warmup_steps",
            "lr_end",
            "decay",
            "weight_decay",
            "beta2",
        ):
            assert getattr(theirs, key) == getattr(phase, key), key
        assert theirs.lr == pytest.approx(phase.lr * phase.lr_multiple) and file.data.length in (None, 512)
