"""Corpus BLEU with several references, computed by sacrebleu, under three published protocols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from vspdf.data import tasks
from vspdf.errors import UserError, did_you_mean

PROTOCOLS = {
    "multi-bleu": "text as it is, split at white space, as Moses' multi-bleu.perl",
    "lora": "lower-cased, every character that is no letter, digit or _ a token, six references: the LoRA paper's DART",
    "mteval-13a": "lower-cased, tokenised and smoothed as NIST's mteval-v13a.pl: the E2E challenge",
}
LORA_REFERENCES = 6

# Perl splits bytes at ASCII white space alone, Python at these characters too: they pass sacrebleu in disguise.
_OTHER_SPACE = {
    code: 0xF0000 + code for code in range(0x3001) if chr(code).isspace() and chr(code) not in " \t\n\r\f\v"
}

_MATCHES_NOTHING = chr(0xF0000)


@dataclass(frozen=True)
class Bleu:
    """A corpus score; BLEU and precisions in percent, lengths in tokens."""

    protocol: str
    bleu: float
    precisions: list[float]  # of 1-grams to 4-grams
    brevity_penalty: float
    hypothesis_length: int
    reference_length: int  # of the closest reference of each hypothesis
    # With missing references left out of the closest length, and hypotheses without any left out altogether.
    bleu_without_missing: float
    hypotheses: int
    references: list[int]  # how many hypotheses have 0, 1, 2, ... references
    signature: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], protocol: str = "multi-bleu") -> Bleu:
    """BLEU-4 of a corpus.

    Parameters
    ----------
    hypotheses : sequence of str
    references : sequence of sequences of str
        Texts for each hypothesis; an empty one is a missing reference.
    protocol : {"multi-bleu", "lora", "mteval-13a"}

    Raises
    ------
    UserError
        If the numbers differ, there is nothing to score, or, but for multi-bleu, a hypothesis has no reference.

    Notes
    -----
    multi-bleu: Koehn et al., Moses. The script takes an empty line for a reference of no words, which lowers the
    reference length where a hypothesis is less than half as long as its shortest reference; so does `bleu` here, and
    `bleu_without_missing` does not. lora: Hu et al., arXiv:2106.09685, which pads to six references by repeating the
    first; mteval-13a: NIST, as sacrebleu reproduces it (Post, WMT 2018).
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol '{protocol}' is not known.{did_you_mean(protocol, PROTOCOLS)}")
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} hypotheses, but references for {len(references)}: expected as many.")
    if not hypotheses:
        raise UserError("no hypothesis: expected at least one line.")
    if protocol == "multi-bleu":
        hypotheses = [text.translate(_OTHER_SPACE) for text in hypotheses]
        references = [[text.translate(_OTHER_SPACE) for text in texts] for texts in references]
    present = [[text for text in texts if text.strip()] for texts in references]
    missing = [number for number, texts in enumerate(present, 1) if not texts]
    if missing and (protocol != "multi-bleu" or len(missing) == len(present)):
        raise UserError(
            f"hypothesis {missing[0]} has no reference ({len(missing)} without): expected at least one for each."
        )
    if protocol == "lora":
        hypotheses = [_lora(text) for text in hypotheses]
        present = [[_lora(text) for text in texts[:LORA_REFERENCES]] for texts in present]
        present = [texts + texts[:1] * (LORA_REFERENCES - len(texts)) for texts in present]
    mteval = protocol == "mteval-13a"
    scorer = _sacrebleu().BLEU(
        lowercase=mteval, tokenize="13a" if mteval else "none", smooth_method="exp" if mteval else "none", force=True
    )

    def score(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> Any:
        most = max(map(len, answers))
        return scorer.corpus_score(
            list(texts), [[row[i] if i < len(row) else None for row in answers] for i in range(most)]
        )

    pairs = [(text, texts) for text, texts in zip(hypotheses, present, strict=True) if texts]
    final = without_missing = score(*zip(*pairs, strict=True))
    if protocol == "multi-bleu" and any(not all(text.strip() for text in texts) for texts in references):
        if missing:
            final = score(hypotheses, [texts or [_MATCHES_NOTHING] for texts in present])
        closest = sum(
            min((len(text.split()) for text in texts), key=lambda n: (abs(n - size), n), default=0)
            for size, texts in zip((len(text.split()) for text in hypotheses), references, strict=True)
        )
        final = scorer.compute_bleu(list(final.counts), list(final.totals), final.sys_len, closest)
    counts = [len(texts) for texts in present]
    return Bleu(
        protocol, min(100.0, final.score), list(final.precisions), final.bp, final.sys_len, final.ref_len,
        min(100.0, without_missing.score),
        len(hypotheses), [counts.count(n) for n in range(max(counts) + 1)], str(scorer.get_signature()),
    )  # fmt: skip


def _lora(text: str) -> str:
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())


def _sacrebleu() -> Any:
    try:
        return import_module("sacrebleu.metrics")
    except ImportError:
        raise UserError("BLEU needs a package: `pip install sacrebleu`, or vspdf's extra `eval`.") from None


def read_references(paths: Sequence[str | Path], count: int) -> list[list[str]]:
    """References of `count` hypotheses, from files.

    Each is a file of `count` lines (an empty line: no reference there), or a task file of `count` examples (see
    `tasks.is_task_file`). A single file may also hold them in groups, one reference a line and an empty line after
    each group, as the E2E challenge does.

    Raises
    ------
    UserError
        If a file has another number of lines; the message names it and both numbers.
    """
    found: list[list[str]] = [[] for _ in range(count)]
    for path in map(Path, paths):
        columns: list[Sequence[str]]
        if tasks.is_task_file(path):
            columns, what = [example.references for example in tasks.read(path)], "examples"
        else:
            lines = tasks.read_lines(path)
            columns, what = [[line] for line in lines], "lines"
            if len(lines) != count and len(paths) == 1:
                groups = [list(group) for blank, group in groupby(lines, lambda line: not line.strip()) if not blank]
                if len(groups) == count:
                    columns = [*groups]
        if len(columns) != count:
            raise UserError(f"'{path}' has {len(columns)} {what}, the hypotheses have {count}: expected as many.")
        for texts, more in zip(found, columns, strict=True):
            texts.extend(more)
    return found
