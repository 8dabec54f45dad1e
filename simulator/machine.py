"""What a machine is: numbers with unit, source and grade, read from YAML; the one home of hardware facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vspdf.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent / "machines"
FIRST = "cs2"  # what a file starts from unless it says otherwise
FIELDS = {"value", "unit", "source", "grade"}
OPTIONAL = {"range"}
# What must not be 0.
POSITIVE = {
    "width", "height", "clock_sdk", "clock_hot_chips", "colours", "switch_positions",
    "router_buffer", "micro_threads", "sram_bytes", "banks", "read_groups", "bank_bytes", "port_bytes", "pair_rate",
    "fmac_fp32_rate", "fmac_fp16_rate", "host_bandwidth", "memory_bandwidth", "edge_links", "swarm_fanout", "sum_bytes",
}  # fmt: skip
GRADES = {"A", "B", "D", "M"}
MOST = 1e15  # of any number
# Whole numbers go no further than the core's 32 bits, its sums of them included, carry; wafers than what is tried of
# them ends in seconds; buffers than fit a computer's memory for thousands of PEs.
MOST_WHOLE = 10**6
MOST_OF = {"width": 10_000, "height": 10_000, "sram_bytes": 2**30, "router_buffer": 1024}
MOST_QUEUES, MOST_WORDS = 64, 1024
LEAST_OF = {"swarm_fanout": 2}  # a tree
# What the event simulator's core takes under the same name.
CORE = (
    "colours", "switch_positions", "hop_cycles", "ramp_cycles", "router_buffer", "in_queue_depth", "out_queue_depth",
    "micro_threads", "sram_bytes", "banks", "read_groups", "bank_bytes", "port_bytes", "accumulator_delay",
    "write_delay", "vector_startup", "pair_startup", "pair_rate", "fmac_fp32_rate", "fmac_fp16_rate", "task_switch",
)  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One number of a machine. Grade: A primary, B quoted, D derived, M unverified, "set" by the user.

    `range` is what is thought possible, of what a training step's band spans; None where nothing is sampled.
    """

    value: Any
    unit: str
    source: str
    grade: str
    range: tuple[float, float] | None = None


class Machine:
    """Parameters by attribute (``machine.vector_startup``) with their provenance in ``machine.parameters``.

    Parameters
    ----------
    parameters : mapping of str to Parameter
    note : str
        What a reader of its results must know; empty for a machine held against measurements.
    settings : mapping of str to value
        What `override` replaced, so that no figure of a changed machine bears the real one's name.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], note: str = "", settings: Mapping[str, Any] = MappingProxyType({})
    ):
        self.parameters = dict(parameters)
        self.note = note
        self.settings = dict(settings)
        self.__dict__ |= {name: parameter.value for name, parameter in self.parameters.items()}  # read a million times
        if changed := {key: value for key, value in self.settings.items() if key != "name"}:
            self.__dict__["name"] += f" with {_listed(changed)}"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no machine parameter '{name}'.")

    def override(self, values: Mapping[str, Any]) -> Machine:
        """A copy with some values replaced; what is set is taken as known, and no longer sampled.

        Raises
        ------
        UserError
            For an unknown key or a value of another kind than the one it replaces.
        """
        parameters = dict(self.parameters)
        for key, value in values.items():
            if key not in parameters:
                raise UserError(f"unknown machine parameter '{key}'.{did_you_mean(key, parameters)}")
            old = parameters[key]
            parameters[key] = Parameter(_like(key, value, old.value), old.unit, "set by the user", "set")
        return Machine(parameters, self.note, self.settings | {key: parameters[key].value for key in values})

    def said(self) -> dict[str, Any]:
        """What every result says of the machine that it is of: ``machine``, ``note``, ``settings``."""
        note = f"Set by the user: {_listed(self.settings, most=len(self.settings))}." if self.settings else ""
        return {"machine": self.name, "note": " ".join(filter(None, (self.note, note))), "settings": self.settings}

    # What follows are quantities that several programs derive in the same way.

    @property
    def relay_cycles(self) -> int:
        """Cycles from one PE's arithmetic on a streamed element to the next one's: ramp, hop, ramp, a cycle of work."""
        return 2 * self.ramp_cycles + 1 + self.hop_cycles

    @property
    def clocks(self) -> dict[str, float]:
        """Hz by label; results are given at both."""
        return {f"{ghz:g}GHz": ghz * 1e9 for ghz in (self.clock_sdk, self.clock_hot_chips)}

    @property
    def clock(self) -> float:
        """Hz at which a result's main figures are given: the first of `clocks`."""
        return next(iter(self.clocks.values()))

    def fabric(self) -> dict[str, Any]:
        """The part that the event simulator's core takes."""
        return {name: getattr(self, name) for name in CORE}


def _listed(settings: Mapping[str, Any], most: int = 3) -> str:
    """``task_switch=500, host_bandwidth=1e+09``; where there are more than `most`, how many."""
    if len(settings) > most:
        return f"{len(settings)} settings"
    return ", ".join(
        f"{key}={value:g}" if type(value) is float else f"{key}={value}" for key, value in settings.items()
    )


def _like(key: str, value: Any, old: Any) -> Any:
    if isinstance(old, str):
        return str(value)
    if isinstance(old, list):
        fits = isinstance(value, (list, tuple)) and 1 <= len(value) <= MOST_QUEUES
        if not fits or not all(type(v) is int and 0 < v <= MOST_WORDS for v in value):
            raise UserError(
                f"machine parameter '{key}' takes a list of positive integers such as {old}, at most {MOST_QUEUES} of "
                f"them and none above {MOST_WORDS:,}, not {value!r}."
            )
        return list(value)
    whole = isinstance(old, int)
    least, most = LEAST_OF.get(key, 0), MOST_OF.get(key, MOST_WHOLE) if whole else MOST
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        end = f"{most:,}" if whole else f"{most:g}"
        raise UserError(
            f"machine parameter '{key}' takes a number of at least {least} and at most {end}, not {value!r}."
        )
    if value < 1 / MOST and key in POSITIVE:
        raise UserError(f"machine parameter '{key}' must be above 0.")
    if whole and float(value) != int(value):
        raise UserError(f"machine parameter '{key}' takes a whole number, not {value!r}.")
    return type(old)(value)


def load(machine: str | Path | Machine = "cs2", settings: Iterable[str] | Mapping[str, Any] = ()) -> Machine:
    """A machine by name or YAML file, with ``key=value`` settings on top.

    A file of the user's own gives the parameters that differ from those of the machine it names as its `base` (without
    one the CS-2's), each with value, unit, source and grade.

    Raises
    ------
    UserError
        For an unknown machine, key or field; the message names the nearest known one.
    """
    if not isinstance(machine, Machine):
        machine = _read(machine)
    if not isinstance(settings, Mapping):
        values = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            try:
                values[key.strip()] = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index, call-overload]
            except (YAMLError, OmegaConfBaseException, ValueError, RecursionError):
                equals = ""
            if not equals:
                raise UserError(f"`settings` '{setting}': expected key=value, e.g. trigger_cycles=10.")
        settings = values
    return machine.override(settings) if settings else machine


def names() -> list[str]:
    """Machines that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _read(machine: str | Path, deriving: tuple[Path, ...] = ()) -> Machine:
    path = Path(machine)
    if not path.is_file():
        path = FOLDER / f"{machine}.yaml"
    if not path.is_file():
        raise UserError(f"no machine '{machine}': neither a YAML file nor a name.{did_you_mean(str(machine), names())}")
    if path.resolve() in deriving:
        raise UserError(f"{path}: a machine cannot start from itself, not even by way of others.")
    own, base, note = _parse(path)
    if base is None and _ships(path) and path.stem == FIRST:
        return Machine(own)
    start = _read(_beside(path, base or FIRST), (*deriving, path.resolve()))
    for key in own:
        if key not in start.parameters:
            raise UserError(f"{path}: unknown machine parameter '{key}'.{did_you_mean(key, start.parameters)}")
        _like(key, own[key].value, start.parameters[key].value)
    kept = {
        key: replace(parameter, grade=_taken_over(parameter.grade), source=f"as {start.name}: {parameter.source}")
        for key, parameter in start.parameters.items()
    }
    name = _name(path, own.get("name") or replace(kept["name"], value=path.stem, source="the file"))
    return Machine(
        kept | own | {"name": name},
        note or f"{name.value} is held against no measurement: it is {start.name} with other numbers.",
    )


def _name(path: Path, name: Parameter) -> Parameter:
    """A machine of one's own is not called as one that ships, be its file a copy of that one's: then as the file is."""
    return replace(name, value=path.name if name.value in names() and not _ships(path) else str(name.value))


def _ships(path: Path) -> bool:
    return path.resolve().parent == FOLDER.resolve()


def _beside(path: Path, base: str) -> str:
    """Where a machine that another starts from lies: a name, or a file beside the one that names it."""
    near = path.parent / base
    return str(near) if near.is_file() else base


def _taken_over(grade: str) -> str:
    """Facts of one machine are assumptions about another."""
    return "M" if grade in GRADES else grade


def _parse(path: Path) -> tuple[dict[str, Parameter], str | None, str]:
    """Parameters, the machine that they change (`base`), and what results must say (`note`)."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except RecursionError:
        raise UserError(f"{path} nests too deep.") from None
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0].rstrip('.')}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected parameters, each with value, unit, source and grade.")
    base, note = tree.pop("base", None), tree.pop("note", "")
    for key, text in (("base", base), ("note", note)):
        if not isinstance(text, str | None):
            raise UserError(f"{path}: '{key}' needs words, not {text!r}.")
    parameters = {}
    for name, entry in tree.items():
        key = str(name)
        if not isinstance(entry, dict):
            raise UserError(f"{path}: '{key}' needs value, unit, source and grade, not a bare {entry!r}.")
        for field in entry:
            if field not in FIELDS | OPTIONAL:
                raise UserError(f"{path}: '{key}' has an unknown field '{field}'.{did_you_mean(field, FIELDS)}")
        if missing := FIELDS - set(entry):
            raise UserError(f"{path}: '{key}' lacks {', '.join(sorted(missing))}.")
        if wrong := sorted(field for field in FIELDS - {"value"} if not isinstance(entry[field], str)):
            raise UserError(f"{path}: '{key}' needs words as its {wrong[0]}, not {entry[wrong[0]]!r}.")
        if entry["grade"] not in GRADES:
            raise UserError(
                f"{path}: '{key}' has grade '{entry['grade']}'; expected one of {', '.join(sorted(GRADES))}."
            )
        parameters[key] = Parameter(**{**entry, "range": _range(path, key, entry)})
    return parameters, base, note


def _range(path: Path, key: str, entry: dict[str, Any]) -> tuple[float, float] | None:
    """Low and high around the value, where a parameter is sampled."""
    if "range" not in entry:
        return None
    ends, numbers = entry["range"], (int, float)
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) in numbers for end in (*ends, entry["value"])):
        raise UserError(f"{path}: '{key}' needs two numbers as its range, e.g. [0, 21], not {ends!r}.")
    if not ends[0] <= entry["value"] <= ends[1]:
        raise UserError(f"{path}: '{key}' = {entry['value']} lies outside its range of {ends[0]} to {ends[1]}.")
    return float(ends[0]), float(ends[1])
