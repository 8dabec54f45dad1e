"""The ``sparsity`` block of the Cerebras stack's configurations, of either generation, as settings of a phase."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from vspdf.errors import UserError, did_you_mean
from vspdf.sparsity import courses
from vspdf.sparsity.schedule import INIT_METHODS

log = logging.getLogger("vspdf")

# Our layers, and the weights of theirs that make up each.
ROLES = {
    "attn.c_attn": [f"self_attn.proj_{x}_dense_layer" for x in "qkv"],
    "attn.c_proj": ["self_attn.proj_output_dense_layer"],
    "mlp.c_fc": ["ffn.ffn.0.linear_layer"],
    "mlp.c_proj": ["ffn.ffn.1.linear_layer"],
}
_NEVER_SPARSE = (
    "embedding_layer.word_embeddings.weight",
    "embedding_layer.position_embeddings.weight",
    "embedding_layer.position_embeddings.embed.weight",
    "lm_head.weight",
    "transformer_decoder.norm.weight",
)
_NORMS = ("norm1", "norm3")  # of every layer, never sparse either
_SPARSITY_KEYS = ("algorithm", "type", "sparsity", "schedule", "init_method", "param_filter", "param_name_patterns",
                  "seed", "drop_fraction", "update")  # fmt: skip
_REPEATS = 4  # in one alternative of a regex: more could take hours on a name that does not match
_MOVING = ("set", "rigl", "gmp")


def roles_of(block: Iterable[str]) -> dict[str, list[str]]:
    """As `ROLES`, of a model whose blocks have matrices of these names (`vspdf.shapes.Shape.block`)."""
    gated = {
        **{f"attn.{x}_proj": [f"self_attn.proj_{x}_dense_layer"] for x in "qkv"},
        "attn.o_proj": ROLES["attn.c_proj"],
        "mlp.up_proj": ROLES["mlp.c_fc"],
        "mlp.gate_proj": ["ffn.ffn.0.linear_layer_for_glu"],
        "mlp.down_proj": ROLES["mlp.c_proj"],
    }
    return {name: (ROLES | gated)[name] for name in block}


def sparsity(
    block: Any, n_layer: int, where: str, older: bool = False, roles: Mapping[str, list[str]] = ROLES
) -> dict[str, Any]:
    """Settings of a phase (`sparsity`, `layers`, `init_method`, `count`) and `seed` from a ``sparsity`` block.

    Masks that move do so by the rules of cstorch.sparse: `algorithm`, `update`, `drop_fraction` and `rules` say it.

    Parameters
    ----------
    block : None, float, dict or list of dict
        Of a list the first entry whose filter matches a weight counts.
    n_layer : int
    where : str
        For messages.
    older : bool
        Of the form that counts kept weights as ``numel − round(s · numel)``; the current one truncates.
    roles : mapping
        Our layers of a block, and the weights of theirs that make up each.

    Raises
    ------
    UserError
        For filters that our layers cannot follow, and for several algorithms in one run.
    """
    if block is None or block == {} or block == []:
        return {}
    entries = block if isinstance(block, list) else [block]
    rules = [_rule(entry, where) for entry in entries]
    moves = _moves(rules, where)
    chosen = _by_layer(rules, n_layer, where, roles)
    methods = {rule["init_method"] for rule in rules if rule["sparsity"]} or {"random"}
    if len(methods) > 1:
        raise UserError(f"{where}: sparsity: init_method {' and '.join(sorted(methods))} in one run; one is offered.")
    seeds = {rule["seed"] for rule in rules if rule["seed"] is not None}
    if len(seeds) > 1:
        raise UserError(f"{where}: sparsity: seeds {sorted(seeds)} in one run; one is offered.")
    older = older or any(rule["regex"] for rule in rules)
    found: dict[str, Any] = {"init_method": methods.pop(), "count": "round" if older else "truncate", **moves}
    amounts = Counter(json.dumps(amount) for amount in chosen.values())
    usual = json.loads(amounts.most_common(1)[0][0]) if chosen else 0.0
    changing = [amount for amount in chosen.values() if courses.is_course(amount)]
    if changing:  # the phase's own; layers that have none are named
        if any(amount != changing[0] for amount in changing):
            raise UserError(f"{where}: sparsity: several schedules in one run; one is offered.")
        usual = changing[0]
    found["sparsity"] = usual
    if others := {name: amount for name, amount in chosen.items() if amount != usual}:
        found["layers"] = _shortened(others, chosen)
    return found | ({"seed": seeds.pop()} if seeds else {})


def _rule(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, int | float) and not isinstance(entry, bool):
        entry = {"sparsity": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{where}: sparsity must be a number, a mapping or a list of mappings, not {entry!r}.")
    for key in entry:
        if key not in _SPARSITY_KEYS:
            raise UserError(f"{where}: unknown setting 'sparsity.{key}'.{did_you_mean(str(key), _SPARSITY_KEYS)}")
    algorithm = str(entry.get("algorithm", entry.get("type", "static"))).lower()
    known = ("static", *_MOVING)
    if algorithm not in known:
        raise UserError(f"{where}: sparsity.algorithm '{algorithm}' is not known.{did_you_mean(algorithm, known)}")
    for key in ("drop_fraction", "update"):
        if entry.get(key) is not None and algorithm == "static":
            raise UserError(f"{where}: sparsity.{key} belongs to masks that change; with static ones it means nothing.")
    if "sparsity" in entry and "schedule" in entry:
        raise UserError(f"{where}: sparsity.schedule is another word for sparsity.sparsity: give one of them.")
    amount = _amount(entry.get("sparsity", entry.get("schedule")), algorithm, where)
    method = entry.get("init_method", "random")
    if method not in INIT_METHODS:
        raise UserError(f"{where}: sparsity.init_method '{method}' is not offered.{did_you_mean(method, INIT_METHODS)}")
    regex = entry.get("param_name_patterns")
    filters = regex if regex is not None else entry.get("param_filter")
    if filters is not None:
        filters = [filters] if isinstance(filters, str) else filters
        if not isinstance(filters, list) or not all(isinstance(f, str) for f in filters):
            key = "param_filter" if regex is None else "param_name_patterns"
            raise UserError(f"{where}: sparsity.{key} must be a text or a list of texts, not {filters!r}.")
        for text in filters if regex is not None else ():
            _check_regex(text, where)
    moves = {key: entry[key] for key in ("drop_fraction", "update") if entry.get(key) is not None}
    return {"sparsity": amount, "init_method": method, "filters": filters, "regex": regex is not None,
            "seed": entry.get("seed"), "algorithm": algorithm, "moves": moves}  # fmt: skip


def _amount(amount: Any, algorithm: str, where: str) -> Any:
    """The sparsity of an entry: a number, or what it does over the steps."""
    if not courses.is_course(amount):
        if not isinstance(amount, int | float) or isinstance(amount, bool) or not 0 <= amount < 1:
            raise UserError(f"{where}: sparsity.sparsity must be a number in [0, 1), not {amount!r}.")
        if algorithm == "gmp":
            raise UserError(f"{where}: sparsity.algorithm 'gmp' needs a schedule: {amount} never rises.")
        return float(amount)
    if algorithm == "static":
        raise UserError(
            f"{where}: sparsity as a schedule belongs to masks that change; to densify in steps, give a phase "
            "of ours a `schedule`."
        )
    return courses.checked(f"{where}: sparsity.sparsity", amount, None, bounded=False)


def _moves(rules: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """What a phase says of masks that move, by the rules that make layers sparse; nothing of static ones."""
    moving = [rule for rule in rules if rule["algorithm"] != "static"]
    if not moving:
        return {}
    first = moving[0]
    for rule in rules:
        if rule["sparsity"] and (rule["algorithm"], rule["moves"]) != (first["algorithm"], first["moves"]):
            raise UserError(
                f"{where}: sparsity: '{first['algorithm']}' and '{rule['algorithm']}' in one run, or one of them in "
                "two ways; one is offered."
            )
    found = {"algorithm": first["algorithm"], "rules": "cstorch", "update": {"freq": 1}, **first["moves"]}
    update = courses.updates(f"{where}: sparsity.update", found["update"], 1 << 62)
    if "drop_fraction" in found:
        if first["algorithm"] == "gmp":
            raise UserError(f"{where}: sparsity.drop_fraction belongs to 'set' and 'rigl', not to 'gmp'.")
        drop = found["drop_fraction"]
        found["drop_fraction"] = courses.checked(f"{where}: sparsity.drop_fraction", drop, None, bounded=False)
    if 0 not in courses.update_steps(update, 1) and len({str(rule["sparsity"]) for rule in rules}) > 1:
        raise UserError(
            f"{where}: sparsity.update begins after step 0, so that masks are dense until then: that goes with one "
            "sparsity for all layers."
        )
    return found


@dataclass
class _Group:
    """A group of a regex: repeats in its longest alternative so far and in this one, and whether there are several."""

    longest: int = 0
    here: int = 0
    branches: bool = False


def _check_regex(text: str, where: str) -> None:
    """Refuses what is no regex, and one that backtracking could keep busy: repeats of repeats, or many in a row."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: sparsity.param_name_patterns: '{text}' is no regex: {error}.") from None
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", text)  # escapes and classes: a character each
    groups, closed, before = [_Group()], _Group(), ""
    for char in bare:
        group = groups[-1]
        if char == "(":
            groups.append(_Group())
        elif char == ")":
            closed = groups.pop()
            groups[-1].here += max(closed.longest, closed.here)
        elif char == "|":
            group.longest, group.here, group.branches = max(group.longest, group.here), 0, True
        elif char in "*+{":
            many = before == ")" and (closed.branches or closed.longest or closed.here)
            group.here += _REPEATS + 1 if many else 1
        elif char == "?" and before not in ("(", "*", "+", "?", "}"):
            group.here += 1
        before = char
    if max(groups[0].longest, groups[0].here) > _REPEATS:
        raise UserError(
            f"{where}: sparsity.param_name_patterns: '{text}' could take too long: expected at most {_REPEATS} "
            "repeats (*, +, ?, {}), and none of a group that holds one or has alternatives."
        )


def _matches(name: str, rule: Mapping[str, Any]) -> bool:
    """Whether a rule takes a weight of theirs, whose name begins with ``model.`` or not."""
    return rule["filters"] is None or any(_hit(name, text, rule["regex"]) for text in rule["filters"])


def _hit(name: str, text: str, regex: bool) -> bool:
    names = (name, f"model.{name}")
    return any(re.match(text, name) if regex else fnmatchcase(name, text) for name in names)


def _check_filters(rules: list[dict[str, Any]], n_layer: int, where: str, layers: Iterable[tuple[str, ...]]) -> None:
    """Refuses filters that take what is never sparse; one of several that takes none of `layers` is named in a line."""
    norms = [f"transformer_decoder.layers.{i}.{norm}.weight" for i in range(n_layer) for norm in _NORMS]
    names = [name for both in layers for name in both]
    for rule in rules:
        filters = rule["filters"] or []
        for never in (*_NEVER_SPARSE, *norms) if filters and rule["sparsity"] else ():
            if _matches(never, rule):
                raise UserError(
                    f"{where}: the filter {filters} also takes '{never}'; only projections and FFN "
                    "matrices are sparse here: narrow it, e.g. '*_dense_layer.weight' and '*linear_layer.weight'."
                )
        idle = [text for text in filters if not any(_hit(name, text, rule["regex"]) for name in names)]
        if names and 0 < len(idle) < len(filters):
            log.warning("%s: sparsity: the filter's %s takes no weight that can be sparse here.",
                        where, " and ".join(map(repr, idle)))  # fmt: skip


def _by_layer(rules: list[dict[str, Any]], n_layer: int, where: str, roles: Mapping[str, list[str]]) -> dict[str, Any]:
    """Sparsity of each of our layers."""
    names = {
        (i, ours, part): (f"transformer_decoder.layers.{i}.{part}.weight", f"h.{i}.{ours}.weight")
        for i in range(n_layer) for ours, parts in roles.items() for part in parts
    }  # fmt: skip
    _check_filters(rules, n_layer, where, names.values())
    chosen: dict[str, float] = {}
    used: set[int | None] = set()
    for i in range(n_layer):
        for ours, parts in roles.items():
            amounts = []
            for part in parts:
                both = names[i, ours, part]
                first = next((k for k, rule in enumerate(rules) if any(_matches(n, rule) for n in both)), None)
                amounts.append(0.0 if first is None else rules[first]["sparsity"])
                used.add(first)
            if any(amount != amounts[0] for amount in amounts):
                raise UserError(
                    f"{where}: sparsity gives Q, K and V of layer {i} {', '.join(map(str, amounts))}; they are one "
                    "matrix here and need one sparsity."
                )
            chosen[f"h.{i}.{ours}"] = amounts[0]
    for k, rule in enumerate(rules):
        if k not in used and n_layer:
            raise UserError(
                f"{where}: sparsity: the filter {rule['filters']} takes no weight that an earlier one has not taken; "
                "names are like 'transformer_decoder.layers.0.self_attn.proj_q_dense_layer.weight'."
            )
    return chosen


def _shortened(others: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """One glob for a role that has the same sparsity in every layer."""
    short: dict[str, Any] = {}
    for name, amount in others.items():
        role = name.split(".", 2)[2]
        same = all(a == amount for n, a in chosen.items() if n.split(".", 2)[2] == role)
        short[f"*.{role}" if same else name] = amount
    return short
