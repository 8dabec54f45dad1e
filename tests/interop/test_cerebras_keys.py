"""Every key of a configuration of the Cerebras stack: read, known to change nothing, named in a line, or refused."""

import copy

import pytest
import yaml

from vspdf.config.loading import find_config
from vspdf.errors import UserError
from vspdf.interop import load_config

OLDER = yaml.safe_load(find_config("cerebras-6.7b-stage1").read_text())


def moved(body):
    """The same in the current form."""
    run, optimizer = body["runconfig"], dict(body["optimizer"])
    rates = [{f"{rate['scheduler']}LR": {key: value for key, value in rate.items() if key != "scheduler"}}
             for rate in optimizer.pop("learning_rate")]  # fmt: skip
    block = dict(body["sparsity"])
    block["param_filter"] = ["*proj_[qkv]_dense_layer.weight", "*proj_output*.weight", "*linear_layer.weight"]
    del block["param_name_patterns"], optimizer["optimizer_type"]
    return {"trainer": {
        "init": {
            "model": {"name": "gpt3", **body["model"]},
            "precision": {"enabled": True, "max_gradient_norm": optimizer.pop("max_gradient_norm")},
            "optimizer": {"AdamW": optimizer}, "schedulers": [{"SequentialLR": {"schedulers": rates}}],
            "loop": {"max_steps": run["max_steps"]}, "checkpoint": {"steps": run["checkpoint_steps"]},
            "logging": {"log_steps": run["log_steps"]}, "sparsity": block,
        },
        "fit": {"train_dataloader": body["train_input"]},
    }}  # fmt: skip


CURRENT = moved(OLDER)
FORMS = {"older": OLDER, "current": CURRENT}


def loaded(tmp_path, form, edits=(), *overrides):
    """A whole file, some of whose keys, by dotted names, are others."""
    body = copy.deepcopy(FORMS[form])
    for path, value in dict(edits).items():
        *way, last = path.split(".")
        node = body
        for key in way:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(body))
    return load_config(tmp_path / "theirs.yaml", ["data.corpus=stdlib", "data.tokenizer=bytes", *overrides])


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_said_of_what_is_known(tmp_path, form, caplog):
    known = {
        "older": {
            "eval_input": {"batch_size": 8}, "train_input.shuffle": True, "train_input.num_workers": 8,
            "runconfig.model_dir": "./model_dir", "runconfig.checkpoint_path": None, "runconfig.steps_per_epoch": 7,
            "runconfig.is_pretrained_checkpoint": False, "runconfig.num_epochs": None, "optimizer.grad_accum_steps": 1,
            "optimizer.max_gradient_value": None, "model.lora_params": None, "train_input.use_vsl": False,
            "optimizer.learning_rate.0.main_scheduler": "sequential", "runconfig.save_losses": True, "seed": 1,
            "optimizer.learning_rate.0.disable_lr_steps_reset": False,
        },
        "current": {
            "trainer.init.backend": {"backend_type": "CSX"}, "trainer.init.seed": 1, "trainer.fit.ckpt_path": None,
            "trainer.init.callbacks": [{"ScopedTrainFlags": {"csx.performance.micro_batch_size": 8}},
                                       {"ComputeNorm": {}}, {"Lora": None}, {"keepncheckpoints": {"n": 2}}],
            "trainer.init.loggers": [{"TensorBoardLogger": {}}], "trainer.init.loop.eval_steps": 3,
            "trainer.init.loop.grad_accum_steps": 1, "trainer.init.precision.loss_scaling_factor": "dynamic",
            "trainer.init.precision.max_gradient_value": None, "trainer.init.checkpoint.save_initial_checkpoint": True,
            "trainer.init.schedulers.0.SequentialLR.milestones": [177], "trainer.init.optimizer.AdamW.learning_rate": 1,
            "trainer.fit.val_dataloader": {"batch_size": 8}, "trainer.validate": {"val_dataloader": {}},
        },
    }[form]  # fmt: skip
    assert loaded(tmp_path, form, known) == loaded(tmp_path, form, {"seed": 1})
    assert not caplog.text


UNREAD = {
    "a key of the file": ("older", "descripton", "settings that are not read here: descripton."),
    "of the run": ("older", "runconfig.max_checkpoint", "runconfig.max_checkpoint (did you mean 'max_checkpoints'?)"),
    "of the text": ("older", "train_input.shufle", "train_input.shufle (did you mean 'shuffle'?)"),
    "of the optimizer": ("older", "optimizer.max_gradient_nrom", "(did you mean 'max_gradient_norm'?)"),
    "of the model": ("older", "model.layer_norm_epsilonn", "(did you mean 'layer_norm_epsilon'?)"),
    "of a rate": ("older", "optimizer.learning_rate.1.end_lr", "settings that are not read here: Linear.end_lr."),
    "of both": ("older", "optimizer.learning_rate.1.disable_lr_steps_reset", "Linear.disable_lr_steps_reset"),
    "of the trainer": ("current", "trainer.fitt", "trainer.fitt"),
    "of its beginning": ("current", "trainer.init.precison", "precison (did you mean 'precision'?)"),
    "of the loop": ("current", "trainer.init.loop.max_epochs", "not read here: trainer.init.loop.max_epochs"),
    "of the loop, misspelt": ("current", "trainer.init.loop.eval_frequenzy", "(did you mean 'eval_frequency'?)"),
    "of the precision": ("current", "trainer.init.precision.max_grad_norm", "(did you mean 'max_gradient_norm'?)"),
    "of the old place": ("current", "trainer.init.optimizer.AdamW.max_gradient_norm", "optimizer.max_gradient_norm"),
    "of the checkpoints": ("current", "trainer.init.checkpoint.every", "trainer.init.checkpoint.every"),
    "of the lines": ("current", "trainer.init.logging.every", "trainer.init.logging.every"),
    "of the fit": ("current", "trainer.fit.train_dataloder", "(did you mean 'train_dataloader'?)"),
    "of its text": ("current", "trainer.fit.train_dataloader.sorted", "trainer.fit.train_dataloader.sorted"),
    "of the schedule": ("current", "trainer.init.schedulers.0.SequentialLR.milestone", "(did you mean 'milestones'?)"),
    "of a scheduler": (
        "current", "trainer.init.schedulers.0.SequentialLR.schedulers.0.LinearLR.power", "LinearLR.power"
    ),
}  # fmt: skip


@pytest.mark.parametrize("form, key, line", UNREAD.values(), ids=UNREAD)
def test_a_key_that_is_not_known_is_named(tmp_path, form, key, line, caplog):
    assert loaded(tmp_path, form, {key: 1.0}) == loaded(tmp_path, form)
    assert line in caplog.text and "settings that are not read here: " in caplog.text


def test_callbacks_that_are_not_known_are_named(tmp_path, caplog):
    loaded(tmp_path, "current", {"trainer.init.callbacks": [{"CheckLoss": {}}, {"Mine": {}}, "Bare"]})
    assert "not read here: trainer.init.callbacks.Mine, trainer.init.callbacks.Bare." in caplog.text


BEGIN = "give what the run is to begin from as init_from=PATH, or leave the key out"
SPARSITY = "Did you mean 'trainer.init.sparsity'"
REFUSED = {
    "sparsity misspelt": ("current", "trainer.init.sparsty", {"sparsity": 0.75}, SPARSITY),
    "shortened": ("current", "trainer.init.sparse", 0.75, SPARSITY),
    "misplaced": ("current", "trainer.sparsity", 0.75, r"unknown setting 'trainer.sparsity'. " + SPARSITY),
    "of the older form": ("current", "sparsity", 0.75, "'sparsity' beside 'trainer' is of the older form and not read"),
    "so is the optimizer": ("current", "optimizer", {"optimizer_type": "SGD"}, "'optimizer' beside 'trainer' is of"),
    "misspelt, older": ("older", "sparsiti", 0.75, "unknown setting 'sparsiti'. Did you mean 'sparsity'"),
    "misplaced, older": ("older", "runconfig.sparsity", 0.75, "unknown setting 'runconfig.sparsity'. Did you mean 's"),
    "a start": ("current", "trainer.fit.ckpt_path", "a.mdl", f"trainer.fit.ckpt_path = 'a.mdl' is not read: {BEGIN}"),
    "a start, older": ("older", "runconfig.checkpoint_path", "a.mdl", f"checkpoint_path = 'a.mdl' .* {BEGIN}"),
    "our start in their file": ("older", "init_from", "runs/one", "on the command line: init_from=PATH"),
    "clipping by value": ("current", "trainer.init.precision.max_gradient_value", 0.5, "give max_gradient_norm"),
    "clipping by value, older": ("older", "optimizer.max_gradient_value", 0.5, "optimizer.max_gradient_value = 0.5 is"),
    "epochs": ("current", "trainer.init.loop.num_epochs", 2, "loop.num_epochs = 2 is not offered; .* give max_steps"),
    "epochs, older": ("older", "runconfig.num_epochs", 2, "runconfig.num_epochs = 2 is not offered"),
    "several batches": ("current", "trainer.init.loop.grad_accum_steps", 4, "batch_size is all of a step: multiply it"),
    "several batches of text": (
        "current", "trainer.fit.train_dataloader.grad_accum_steps", 4, "train_dataloader.grad_accum_steps = 4 is not"
    ),
    "several batches, older": ("older", "optimizer.grad_accum_steps", 4, "optimizer.grad_accum_steps = 4 is not off"),
    "texts apart": ("older", "train_input.use_vsl", True, "train_input.use_vsl = True is not offered"),
    "milestones": (
        "current", "trainer.init.schedulers.0.SequentialLR.milestones", [50],
        r"SequentialLR.milestones = \[50\] is not offered; expected \[177\]",
    ),
    "two schedulers": (
        "current", "trainer.init.schedulers", [{"ConstantLR": {"learning_rate": 1e-3}}] * 2, "run side by side there"
    ),
    "two names": (
        "current", "trainer.init.schedulers", [{"ConstantLR": {}, "LinearLR": {}}], "must be one name with its settings"
    ),
    "no schedulers": (
        "current", "trainer.init.schedulers", [{"SequentialLR": {}}], "schedulers must be a list of schedulers, not N"
    ),
    "a rate for some": (
        "current", "trainer.init.schedulers.0.SequentialLR.param_group_tags", ["a"], r"param_group_tags = \['a'\] is"
    ),
    "rates that multiply": ("older", "optimizer.learning_rate.0.main_scheduler", "chained", "main_scheduler = 'chain"),
    "two optimizers": (
        "current", "trainer.init.optimizer", {"AdamW": {}, "SGD": {}}, "must hold one optimizer, not AdamW, SGD"
    ),
    "adapters": ("current", "trainer.init.callbacks", [{"LoRA": {"r": 8}}], "LoRA is not offered; whole models are"),
    "adapters, older": ("older", "model.lora_params", {"r": 8}, "model.lora_params = {'r': 8} is not offered"),
    "some weights": ("current", "trainer.init.callbacks", [{"SelectiveGrad": {}}], "SelectiveGrad is not offered; all"),
}  # fmt: skip


@pytest.mark.parametrize("form, key, value, message", REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_run_is_refused(tmp_path, form, key, value, message):
    with pytest.raises(UserError, match=message) as caught:
        loaded(tmp_path, form, {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form, key", [("current", "trainer.fit.ckpt_path"), ("older", "runconfig.checkpoint_path")])
def test_a_start_that_is_given_answers_for_theirs(tmp_path, form, key, caplog):
    found = loaded(tmp_path, form, {key: "a.mdl"}, "init_from=runs/one")
    assert found.init_from == "runs/one" and f"{key} is not read: the run begins from what was given" in caplog.text


@pytest.mark.parametrize("form, key", [("current", "trainer.init.loop.num_steps"), ("older", "runconfig.num_steps")])
def test_a_number_of_steps_counts_before_the_most(tmp_path, form, key):
    assert loaded(tmp_path, form, {key: 62_522}).phases[0].steps == 62_522
