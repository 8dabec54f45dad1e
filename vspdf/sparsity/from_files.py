"""What is asked of layers by their names: sparsities, masks, files of masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from os import PathLike
from typing import TypeAlias

from vspdf.errors import UserError, check_sparsity, percent_meant
from vspdf.kernels.ops import require_pattern
from vspdf.pattern import Pattern
from vspdf.sparsity.amounts import plain_name

Amount: TypeAlias = "float | Pattern | str | PathLike[str]"  # a sparsity, a mask, or a file of masks by layer


class MaskFile:
    """The masks of a file, by layer."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.files = import_module("vspdf.interop.mask_files")
        self.path, self.found = path, self.files.read_all(path)
        self.used = False

    def of(self, name: str) -> float | Pattern:
        """The mask of a layer, and 0.0 where the file has none of it; one mask alone is every layer's."""
        if len(self.found) == 1:
            self.used = True
            return next(iter(self.found.values()))
        try:
            pattern = self.files.named(self.found, plain_name(name), self.path)
        except UserError:
            return 0.0
        self.used = True
        return pattern

    def check_used(self, layers: Iterable[str]) -> None:
        """Raises UserError if `of` has found a mask for none of the layers it was asked for."""
        if not self.used:
            theirs, ours = list(self.found)[:3], list(layers)[:3]
            raise UserError(
                f"'{self.path}' names no layer of the model: it has masks of {', '.join(theirs)}, the model has "
                f"{', '.join(ours)}."
            )


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
