"""The ``sparsity`` block of the Cerebras stack's configurations, of either generation, as settings of a phase."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from vspdf.errors import UserError, did_you_mean
from vspdf.shapes import MOST_LAYERS
from vspdf.sparsity.schedule import INIT_METHODS

# Our layers, and the weights of theirs that make up each.
ROLES = {
    "attn.c_attn": [f"self_attn.proj_{x}_dense_layer" for x in "qkv"],
    "attn.c_proj": ["self_attn.proj_output_dense_layer"],
    "mlp.c_fc": ["ffn.ffn.0.linear_layer"],
    "mlp.c_proj": ["ffn.ffn.1.linear_layer"],
}
_NEVER_SPARSE = (
    "embedding_layer.word_embeddings.weight",
    "lm_head.weight",
    "transformer_decoder.layers.0.norm1.weight",
)
_SPARSITY_KEYS = ("algorithm", "type", "sparsity", "schedule", "init_method", "param_filter", "param_name_patterns",
                  "seed", "drop_fraction", "update")  # fmt: skip
_REPEATS = 4  # in one alternative of a regex: more could take hours on a name that does not match
_DYNAMIC = ("gmp", "set", "rigl", "dynamic")


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

    Parameters
    ----------
    block : None, float, dict or list of dict
        Static sparsity; of a list the first entry whose filter matches a weight counts.
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
        For what is not static, and for filters that our layers cannot follow.
    """
    if block is None or block == {} or block == []:
        return {}
    entries = block if isinstance(block, list) else [block]
    rules = [_rule(entry, where) for entry in entries]
    chosen = _by_layer(rules, n_layer, where, roles)
    methods = {rule["init_method"] for rule in rules if rule["sparsity"]} or {"random"}
    if len(methods) > 1:
        raise UserError(f"{where}: sparsity: init_method {' and '.join(sorted(methods))} in one run; one is offered.")
    seeds = {rule["seed"] for rule in rules if rule["seed"] is not None}
    if len(seeds) > 1:
        raise UserError(f"{where}: sparsity: seeds {sorted(seeds)} in one run; one is offered.")
    older = older or any(rule["regex"] for rule in rules)
    found: dict[str, Any] = {"init_method": methods.pop(), "count": "round" if older else "truncate"}
    usual = Counter(chosen.values()).most_common(1)[0][0] if chosen else 0.0
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
    if algorithm in _DYNAMIC:
        raise UserError(
            f"{where}: sparsity.algorithm '{algorithm}' drops and regrows weights during training, which is not "
            "offered: masks are static here, and phases only add weights."
        )
    if algorithm != "static":
        raise UserError(f"{where}: sparsity.algorithm '{algorithm}' is not known.{did_you_mean(algorithm, ['static'])}")
    for key in ("drop_fraction", "update"):
        if entry.get(key) is not None:
            raise UserError(f"{where}: sparsity.{key} belongs to masks that change; with static ones it means nothing.")
    amount = entry.get("sparsity", entry.get("schedule"))
    if isinstance(amount, dict | list):
        raise UserError(
            f"{where}: sparsity as a schedule belongs to masks that change; to densify in steps, give a phase "
            "of ours a `schedule`."
        )
    if not isinstance(amount, int | float) or isinstance(amount, bool) or not 0 <= amount < 1:
        raise UserError(f"{where}: sparsity.sparsity must be a number in [0, 1), not {amount!r}.")
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
    return {"sparsity": float(amount), "init_method": method, "filters": filters, "regex": regex is not None,
            "seed": entry.get("seed")}  # fmt: skip


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


def _matches(name: str, rule: Mapping[str, Any], where: str) -> bool:
    """Whether a rule takes a weight of theirs, whose name begins with ``model.`` or not."""
    if rule["filters"] is None:
        return not any(name.endswith(never) for never in _NEVER_SPARSE)
    for text in rule["filters"]:
        if rule["regex"]:
            hit = any(re.match(text, prefix + name) for prefix in ("", "model."))
        else:
            hit = any(fnmatchcase(prefix + name, text) for prefix in ("", "model."))
        if hit:
            return True
    return False


def _by_layer(
    rules: list[dict[str, Any]], n_layer: int, where: str, roles: Mapping[str, list[str]]
) -> dict[str, float]:
    """Sparsity of each of our layers."""
    if n_layer > MOST_LAYERS:
        raise UserError(f"{where}: {n_layer:,} layers; expected at most {MOST_LAYERS:,}.")
    for rule in rules:
        for never in _NEVER_SPARSE:
            if rule["sparsity"] and _matches(never, rule, where):
                raise UserError(
                    f"{where}: the filter {rule['filters']} also takes '{never}'; only projections and FFN "
                    "matrices are sparse here: narrow it, e.g. '*_dense_layer.weight' and '*linear_layer.weight'."
                )
    chosen: dict[str, float] = {}
    used: set[int | None] = set()
    for i in range(n_layer):
        for ours, parts in roles.items():
            amounts = []
            for part in parts:
                name = f"transformer_decoder.layers.{i}.{part}.weight"
                names = (name, f"h.{i}.{ours}.weight")
                first = next((k for k, rule in enumerate(rules) if any(_matches(n, rule, where) for n in names)), None)
                amounts.append(0.0 if first is None else rules[first]["sparsity"])
                used.add(first)
            if len(set(amounts)) > 1:
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


def _shortened(others: Mapping[str, float], chosen: Mapping[str, float]) -> dict[str, float]:
    """One glob for a role that has the same sparsity in every layer."""
    short: dict[str, float] = {}
    for name, amount in others.items():
        role = name.split(".", 2)[2]
        same = {a for n, a in chosen.items() if n.split(".", 2)[2] == role}
        short[f"*.{role}" if len(same) == 1 else name] = amount
    return short
