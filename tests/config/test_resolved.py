"""A resolved configuration: frozen, nothing left open, and written down so that it is read as it was."""

import dataclasses

import pytest
import yaml

from vspdf.config import ResolvedConfig, load, loading, resolve
from vspdf.config.essentials import essentials
from vspdf.config.resolved import ResolvedTask
from vspdf.config.settings import Config, ModelConfig, PhaseConfig
from vspdf.errors import UserError

START = ("run", ModelConfig(n_layer=1, d_model=8, n_head=2, sequence_length=64, vocab_size=257))
TEXT = """
model: {n_layer: 2, d_model: 32, n_head: 4, sequence_length: 16}
phases:
  - {schedule: cycling, levels: [0.9, 0.5], steps: 100}
  - {sparsity: 0.5, layers: {"*.c_fc": 0.25}, steps: 20}
  - {tokens: 2560}
"""
CASES = {
    "text": (TEXT, None),
    "task": ("data: {path: pairs.jsonl}\nphases: [{steps: 3}]", START),
    "preset": ("model: {name: gpt2-small}\nphases: [{steps: 3}]", None),
}
# What None means in each is said in vspdf.config.resolved: there is no such thing, or the data tell.
STATIC = (
    "sparsity_end",
    "update_every",
    "drop_fraction",
    "update",
    "random_share",
    "init_file",
)  # what its phases do not have
NONE_THERE = {
    "text": {"init_from", "start", "model.name", "model.vocab_size", "data.path", "data.validation_path", "data.length",
             "data.first_sequence", "data.cache_dir", "train.threads", "model.rope_scaling",
             *(f"phases.1.{key}" for key in STATIC), *(f"phases.2.{key}" for key in STATIC),
             *(f"phases.0.{key}" for key in STATIC[2:])},
    "task": {"init_from", "model.rope_scaling", "model.name", "data.validation_path", "data.first_sequence",
             "data.cache_dir", "train.threads", *(f"phases.0.{key}" for key in STATIC)},
    "preset": {"init_from", "model.rope_scaling", "start", "data.path", "data.validation_path", "data.length",
               "data.first_sequence", "data.cache_dir", "train.threads", *(f"phases.0.{key}" for key in STATIC)},
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Name of the case, and its configuration."""
    text, start = CASES[request.param]
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return request.param, load(path, start=start)


def parts(value, key=""):
    """Every dataclass in a configuration, by dotted key."""
    yield key, value
    for field in dataclasses.fields(value):
        item, inner = getattr(value, field.name), f"{key}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(item):
            yield from parts(item, inner)
        elif isinstance(item, tuple):
            for i, one in enumerate(item):
                yield from parts(one, f"{inner}.{i}") if dataclasses.is_dataclass(one) else ()


def test_nothing_is_open_but_what_has_no_answer(case):
    name, config = case
    assert isinstance(config, ResolvedConfig) and isinstance(config.data, ResolvedTask) == (name == "task")
    named = {
        f"{key}.{field.name}".lstrip(".")
        for key, part in parts(config)
        for field in dataclasses.fields(part)
        if getattr(part, field.name) is None
    }
    assert named == NONE_THERE[name]


def test_nothing_can_be_set(case):
    _, config = case
    for _, part in parts(config):
        for field in dataclasses.fields(part):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, None)


def test_resolving_leaves_what_was_written_as_it_was(case):
    _, config = case
    again = resolve.written(config)
    before = dataclasses.asdict(again)
    assert resolve.resolve(again) == config and dataclasses.asdict(again) == before
    sparse = Config(model=ModelConfig(name="gpt2-small"), phases=[PhaseConfig(sparsity=0.5, steps=3)])
    before = dataclasses.asdict(sparse)
    assert resolve.resolve(sparse).phases[0].tokens and dataclasses.asdict(sparse) == before


def test_written_down_it_has_every_setting_and_is_read_as_it_was(case, tmp_path):
    _, config = case
    text = loading.to_yaml(config)
    body = yaml.safe_load(text)
    assert body == loading.to_dict(config) and body.keys() == {field.name for field in dataclasses.fields(Config)}
    assert body["phases"][0].keys() == {field.name for field in dataclasses.fields(PhaseConfig)}
    assert loading.build(body, "again") == config


def test_what_the_data_tell_is_filled_in_once(case):
    name, config = case
    found = config.with_data(300, 7)
    assert (
        found.model.vocab_size == {"text": 300, "task": 257, "preset": 50257}[name] and found.data.first_sequence == 7
    )
    assert found.with_data(400, 9) == found and config.data.first_sequence is None
    if name == "text":
        with pytest.raises(UserError, match=r"model.vocab_size is not set"):
            resolve.model_shape(config.model)
    assert resolve.model_shape(found.model) == resolve.model_shape(config.model, 300)


THEIRS = {
    "current": "trainer: {init: {}}",
    "older": "runconfig: {max_steps: 8}\nmodel: {hidden_size: 32}",
    "a block beside ours": TEXT + "sparsity: 0.9\n",
}


@pytest.mark.parametrize("text", THEIRS.values(), ids=THEIRS)
def test_files_of_another_program_are_named(tmp_path, text):
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(UserError, match=r"theirs.yaml: '\w+' is a setting of the Cerebras stack: vspdf.interop.load_c"):
        load(tmp_path / "theirs.yaml")


def test_the_essentials_say_all_that_is_needed(tmp_path):
    """What they leave out follows: written to a file, they give the same configuration."""
    for name in ("quickstart", "gpt2-small-variable"):
        config = loading.load(name, ["train.batch_size=4", f"run_dir={tmp_path}/elsewhere"])
        said = essentials(config)
        phases = [said.pop(key) for key in sorted(said) if key.startswith("phases.")]
        body = {**said.pop(""), **said, "phases": phases}
        assert loading.build(body, name) == config
        assert body["train"]["batch_size"] == 4 and "weight_decay" not in str(body) and "tokens" not in phases[0]


def test_what_the_essentials_try_is_not_warned_of(tmp_path, caplog):
    phase = "{sparsity: 0.5, s_mu_par: true, steps: 9}"
    (tmp_path / "settings.yaml").write_text(f"model: {{name: gpt2-small}}\nphases: [{', '.join([phase] * 4)}]")
    said = essentials(load(tmp_path / "settings.yaml"))
    assert said["phases.3"]["sparsity"] == 0.5 and said["phases.3"]["s_mu_par"] is True
    assert not caplog.text
