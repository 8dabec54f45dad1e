"""Configurations read from YAML with `key=value` overrides, and written back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vspdf.config.resolve import resolve, resolve_model
from vspdf.config.resolved import ResolvedConfig
from vspdf.config.settings import Config, ModelConfig, PhaseConfig
from vspdf.errors import UserError, did_you_mean, first_line, percent_meant

_CEREBRAS = {"trainer", "runconfig", "train_input", "sparsity"}  # one of them is in each of its files
_NULL = ("null", "Null", "NULL", "~")  # as YAML has it


def load(
    source: str | Path, overrides: Sequence[str] = (), *, start: tuple[str, ModelConfig] | None = None
) -> ResolvedConfig:
    """Reads a configuration, applies overrides, fills in what follows from the rest, and checks it.

    Parameters
    ----------
    source : path of a YAML file, or the name of a config that ships with vspdf ("quickstart")
    overrides : sequence of "key=value"
        Dotted keys; list items by index: ``phases.0.steps=100``. A mapping replaces a setting that is one (`layers`);
        of a group of settings (`model`) it changes those that it names.
    start : (str, ModelConfig), optional
        Fine-tuning: where the model to begin with is, and its shape; the configuration itself names none, or the same.

    Returns
    -------
    ResolvedConfig
        Frozen, and complete but for what the data tell.

    Raises
    ------
    UserError
        For a missing file, one of another program, an unknown key, a wrong type or an impossible value; one line
        that names the key.
    """
    path = find_config(source)
    return build(read_yaml(path), str(path), overrides, start=start)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, interpolations not yet resolved.

    Raises
    ------
    UserError
        If it cannot be read or is no YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise _explained(error, str(path)) from None
    except RecursionError:
        raise UserError(f"{path} nests too deep.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.") from None
    except Exception as error:  # of tags that do not fit their values, YAML's constructors raise whatever they meet
        raise UserError(f"{path} is not valid YAML: {first_line(error)}.") from None


def build(
    body: Any, where: str, overrides: Sequence[str] = (), *, start: tuple[str, ModelConfig] | None = None
) -> ResolvedConfig:
    """As `load`, from what a file holds; `where` begins error messages."""
    if isinstance(body, dict) and (theirs := sorted(_CEREBRAS & body.keys())):
        raise UserError(
            f"{where}: '{theirs[0]}' is a setting of the Cerebras stack: vspdf.interop.load_config reads such files."
        )
    try:
        _check_form(body, Config, "", where)
        tree = OmegaConf.merge(_defaults(), body)
    except OmegaConfBaseException as error:
        _check_phases(body.get("phases", ()), where)
        raise _explained(error, where) from None
    for override in overrides:
        key, value = parse_override(override)
        try:
            _check_path(tree, key)
            _check_form(OmegaConf.to_container(value)["value"], _hint(key), key, f"override '{override}'")  # type: ignore[call-overload,index]
            _set(tree, re.sub(r"\.(\d+)", r"[\1]", key), value.value, _hint(key))
        except OmegaConfBaseException as error:
            raise _explained(error, f"override '{override}'") from None
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise _explained(error, where) from None
    assert isinstance(config, Config)
    if start is not None:
        if any(override.startswith("start=") for override in overrides) and config.start not in (None, start[0]):
            raise UserError(f"start = {config.start}, but fine-tuning was told to begin with {start[0]}: leave it out.")
        config.start, model = start
        found = dataclasses.asdict(resolve_model(model))
        others = {"activation": found["mlp"], "d_attention": found["n_head"] * found["head_dim"]}
        for key, value in (found | others).items():
            mine = getattr(config.model, key)
            if mine not in (None, value, getattr(ModelConfig(), key)):
                drawn = "weights of its own" if key in ("init_std", "output_init_std") else value
                raise UserError(f"model.{key} = {mine}, but the model to start from has {drawn}: leave it out.")
        config.model = ModelConfig(**found)
    return resolve(config)


@cache  # a study builds hundreds of configurations; `merge` copies what it begins with
def _defaults() -> Any:
    """What a configuration is before a file says anything, with the types of its settings."""
    return OmegaConf.structured(Config)


@cache
def _settings(hint: Any) -> dict[str, Any]:
    """Types of the settings in a group of them; of anything else none."""
    return get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}


def _set(tree: Any, path: str, value: Any, hint: Any) -> None:
    """Puts a value in the place of a setting; of a group of settings (`model`, a phase) it is those that are named.

    A setting that is itself a mapping is replaced whole: merged, rules of `layers` would come after those that count.
    """
    if (settings := _settings(hint)) and isinstance(value, DictConfig):
        for name, item in value.items():
            _set(tree, f"{path}.{name!s}", item, settings[str(name)])
    else:
        OmegaConf.update(tree, path, value, merge=not isinstance(value, DictConfig))


def parse_override(override: str) -> tuple[str, DictConfig | ListConfig]:
    """The dotted key of ``key=value``, and its value under "value": read as YAML, but text as it is typed.

    Raises
    ------
    UserError
        If it is not of that form, or the value is no YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}' is not of the form key=value.")
    if not text or _as_typed(text.strip(), _hint(key)):
        return key, OmegaConf.create({"value": text.strip()})
    try:
        return key, OmegaConf.create(f"value: {text}")
    except YAMLError:
        raise UserError(f"override '{override}': its value is not valid YAML.") from None
    except OmegaConfBaseException as error:
        raise _explained(error, f"override '{override}'") from None


def _as_typed(text: str, hint: Any) -> bool:
    """Whether the value of an override is to be taken as it stands, for a setting of a type.

    YAML 1.1 would make 1.10 of a folder's name 1.1 and "no" False, and end it at " #"; of a number, it takes 010 for 8
    and 1:30 for 90. Quotes around all of a text go, and null stays null.
    """
    kinds = {*(get_args(hint) if isinstance(hint, UnionType) else (hint,))} - {type(None)}
    if kinds == {str}:
        return text not in _NULL and not re.fullmatch(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", text)
    return kinds <= {int, float} and bool(re.fullmatch(r"[+-]?(0[\d_]+|[\d_]+(:[\d_]+)+)(\.[\d_]*)?", text))


def shipped(folder: str = "configs") -> list[Path]:
    """Configurations, or what else is in a folder of YAML files, that come with vspdf."""
    return sorted(Path(__file__).parents[1].glob(f"{folder}/*.yaml"))


def find_config(source: str | Path, folder: str = "configs", what: str = "configuration") -> Path:
    """Path of a configuration given by path or by the name of one that ships with vspdf."""
    path = Path(source)
    if path.is_file():
        return path
    ours = {file.stem: file for file in shipped(folder)}
    if str(source) in ours:
        return ours[str(source)]
    if path.is_dir():
        raise UserError(f"{path} is a folder; a {what} is a YAML file.")
    near = [*ours, *(str(file) for file in path.parent.glob("*.yaml"))]
    hint = f" Did you mean '{path.stem}'?" if path.stem in ours else did_you_mean(str(source), near)
    raise UserError(f"no {what} '{source}': neither a file nor one that ships.{hint}")


def to_yaml(config: ResolvedConfig) -> str:
    """A resolved configuration as `load` reads it."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: ResolvedConfig) -> dict[str, Any]:
    """A resolved configuration as `build` takes it."""
    body = dataclasses.asdict(config)
    return body | {"phases": [phase | {"levels": list(phase["levels"])} for phase in body["phases"]]}


def _keys(node: Any) -> list[str]:
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def _check_path(tree: Any, key: str) -> None:
    """An override must name a setting that exists."""
    node, seen = tree, ""
    for part in key.split("."):
        known = _keys(node) if not isinstance(node, ListConfig) else [str(i) for i in range(len(node))]
        if part not in known:
            what = f"{seen} has {len(known)} items, no" if isinstance(node, ListConfig) else "unknown setting"
            hint = "" if isinstance(node, ListConfig) else did_you_mean(part, known)
            raise UserError(f"{what} '{seen + '.' if seen else ''}{part}' (override {key}=...).{hint}")
        node = node[int(part)] if isinstance(node, ListConfig) else node._get_node(part)
        seen = f"{seen}.{part}" if seen else part


def _hint(key: str) -> Any:
    """Type of the setting that a dotted key names."""
    hint: Any = Config
    for part in key.split("."):
        # Within a setting that may have any form, everything may.
        hint = get_args(hint)[0] if get_origin(hint) is list else _settings(hint).get(part, Any)
    return hint


def _check_form(value: Any, hint: Any, key: str, where: str) -> None:
    """Mappings, lists and keys must be those of the dataclasses; what single values are is left to OmegaConf.

    To that ``???`` says that a value is to be given yet, and `merge` would leave the default.
    """
    named = f"'{key}' must be" if key else "expected"
    if value == "???":
        raise UserError(f"{where}: '{key}' is ???, which stands for what is to be given yet: give it.")
    if known := _settings(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {named} a mapping of settings, not {_described(value)}.")
        for name, item in value.items():
            path = f"{key}.{name}" if key else str(name)
            if name not in known:
                raise UserError(f"{where}: unknown setting '{path}'.{did_you_mean(str(name), known)}")
            _check_form(item, known[name], path, where)
    elif get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: {named} a list, not {_described(value)}.")
        for i, item in enumerate(value):
            _check_form(item, get_args(hint)[0], f"{key}.{i}", where)
    elif value is None and hint is not Any and type(None) not in get_args(hint):
        raise UserError(f"{where}: '{key}' must not be empty.")
    elif isinstance(value, list) and any(get_origin(kind) is dict for kind in (hint, *get_args(hint))):
        raise UserError(f"{where}: {named} a mapping, not a list.")
    elif isinstance(value, dict | list):  # what a setting that may have any form holds
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_form(item, Any, f"{key}.{name}", where)


def _check_phases(phases: Sequence[Any], where: str) -> None:
    """Raises what `merge` does not like in a phase, with all of the key: within a list it names only the last part."""
    for i, phase in enumerate(phases):
        try:
            OmegaConf.merge(OmegaConf.structured(PhaseConfig), phase)
        except OmegaConfBaseException as error:
            raise _explained(error, where, f"phases.{i}.") from None


def _described(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), f"'{value}'")


def _explained(error: OmegaConfBaseException, where: str, within: str = "") -> UserError:
    """OmegaConf's error in one line that names the key, which counts from `within`."""
    key = within + re.sub(r"\[(\d+)\]", r".\1", error.full_key or str(error.key or ""))
    written = re.search(r"Value '(.*?)' of type 'str' could not be converted to Float", str(error))
    meant = percent_meant(written[1]) if written else ""
    return UserError(f"{where}: {f'{key!r}: ' if key else ''}{first_line(error)}.{meant}")


_FREE_TO_CHANGE = {
    "name", "run_dir", "data.cache_dir",
    "train.log_every", "train.eval_every", "train.eval_tokens", "train.sample_tokens", "train.checkpoint_every",
    "train.keep_checkpoints", "train.measure_dense", "train.tensorboard", "train.wandb", "train.timeout",
}  # fmt: skip


def free_to_change(config: ResolvedConfig) -> set[str]:
    """Settings in which a resumed run may differ from what it was: they do not touch the numbers."""
    if config.train.patience or config.train.keep_best:  # which go by evaluations
        return _FREE_TO_CHANGE - {"train.eval_every", "train.eval_tokens"}
    return _FREE_TO_CHANGE


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings in which two configurations differ, by dotted key: (in a, in b)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*a, *b}):
        old, new = a.get(key), b.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            within = differences(old, new, f"{prefix}{key}.")
            if not within and key == "layers" and list(old) != list(new):  # the first glob that matches counts
                within = {prefix + key: (old, new)}
            found.update(within)
        elif isinstance(old, list) and isinstance(new, list):
            if len(old) != len(new):
                return {prefix + key: (f"a list of {len(old)}", f"one of {len(new)}")}
            numbered = [{str(i): item for i, item in enumerate(items)} for items in (old, new)]
            found.update(differences(numbered[0], numbered[1], f"{prefix}{key}."))
        elif old != new:
            found[prefix + key] = (old, new)
    return found
