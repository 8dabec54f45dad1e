"""What is asked of layers by their names: sparsities, masks, files of masks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from typing import TypeAlias

from torch import nn

from vspdf.errors import UserError, check_sparsity, percent_meant, require
from vspdf.kernels.ops import require_pattern
from vspdf.pattern import Pattern
from vspdf.sparsity.amounts import plain_name
from vspdf.sparsity.kinds import is_conv1d

Amount: TypeAlias = "float | Pattern | str | PathLike[str]"  # a sparsity, a mask, or a file of masks by layer


class MaskFile:
    """The masks of a file, by layer."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.files = import_module("vspdf.interop.mask_files")
        self.path, self.masks = path, self.files.by_layer(path)
        self.used: dict[str, str] = {}  # names of masks, "" of one that is all layers', by layers that were asked for

    def of(self, name: str) -> float | Pattern:
        """The mask of a layer, and 0.0 where the file has none of it; one without a name is every layer's.

        What stands before the names in one of the two (``transformer.``) is no difference, as long as it is the same
        before all.

        Raises
        ------
        UserError
            If several may be meant.
        """
        patterns, plain = self.masks.patterns, plain_name(name)
        key = "" if "" in patterns else self._key(plain)
        if key is None or key not in patterns:
            return 0.0
        if key and self.used and (first := next(iter(self.used.items()))):
            before = _beginnings(*first)
            if before != _beginnings(plain, key) and before == ("", ""):
                return 0.0  # the file names layers as the model does, and this one is not among them
            if before != _beginnings(plain, key):
                raise UserError(
                    f"'{self.path}': its '{first[1]}' would be the model's '{first[0]}', and its '{key}' '{plain}': "
                    "what stands before names must be the same for all. Give the file to the layers that are meant, "
                    "as {GLOB: FILE}."
                )
        self.used[plain] = key
        return patterns[key]

    def _key(self, name: str) -> str | None:
        """Which of the file's names is a layer's, weights without a mask among them."""
        names = [*self.masks.patterns, *sorted(self.masks.dense)]
        if name in names:
            return name
        near = sorted(self.files.alike(names, name), key=len)
        longer = [key for key in near if len(key) > len(name)]
        if not longer:
            return near[-1] if near else None
        # all of a model lies deeper in the file: the least that stands before it, if it stands before the others too
        least = longer[0].removesuffix(name)
        if all(key.startswith(least) for key in longer):
            return longer[0]
        raise UserError(
            f"'{self.path}': the mask of '{name}' may be that of {' or '.join(longer[:4])}: give a file whose names "
            "are the model's."
        )

    def check_sparsities(self, amounts: Mapping[str, float]) -> None:
        """Raises UserError unless the masks of the first phase's layers have the sparsities that it speaks of."""
        for name, amount in amounts.items():
            mask = self.of(name) if amount else 0.0
            found = mask.sparsity if isinstance(mask, Pattern) else 0.0
            require(
                abs(found - amount) <= 0.005,
                f"phases.0.init_file: '{name}' has a sparsity of {found:.2%} in '{self.path}', and is to have "
                f"{amount:.2%}: give the sparsity that its mask has, by `layers` where they differ.",
            )

    def check_used(self, layers: Mapping[str, nn.Module]) -> None:
        """Raises UserError if `of` has found a mask for none of the layers, or one of which it is not told how it lies.

        That is a square one beside a weight, of transformers' Conv1D, whose weights are [in, out].
        """
        if not self.used:
            theirs, ours = list(self.masks.patterns)[:3], list(layers)[:3]
            raise UserError(
                f"'{self.path}' names no layer of the model: it has masks of {', '.join(theirs)}, the model has "
                f"{', '.join(ours)}."
            )
        for name, module in layers.items():
            key = self.used.get(plain_name(name))
            if key in self.masks.unsure and is_conv1d(module):
                raise UserError(
                    f"'{self.path}': nothing tells whether its mask of '{name}' is [in, out], as the weight of a "
                    "Conv1D: give the whole state_dict, or a Pattern."
                )


def _beginnings(name: str, key: str) -> tuple[str, str]:
    """What stands before a layer's name in the model alone, and in the file alone."""
    return ("", key.removesuffix(name)) if key.endswith(name) else (name.removesuffix(key), "")


def read_amounts(sparsity: Amount | Mapping[str, Amount]) -> dict[str, float | Pattern | MaskFile]:
    """Amounts by glob, each checked; files are read."""
    rules: dict[str, float | Pattern | MaskFile] = {}
    for glob, amount in (sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}).items():
        if isinstance(amount, (str, PathLike)) and not percent_meant(str(amount)):
            rules[glob] = MaskFile(amount)
            continue
        if getattr(amount, "shape", ()) != ():  # a mask, not a number
            require_pattern(amount)
        if not isinstance(amount, Pattern):  # text is refused there
            check_sparsity("sparsity" if glob == "*" else f"the sparsity of '{glob}'", amount)  # type: ignore[arg-type]
        rules[glob] = amount  # type: ignore[assignment]
    return rules
