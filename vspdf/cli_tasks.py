"""Verbs for what comes after pre-training: texts and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vspdf.console import Json, emit, out


def bleu(
    hypotheses: Annotated[Path, typer.Argument(help="One text a line.")],
    references: Annotated[
        list[Path],
        typer.Argument(
            metavar="REF...",
            help="Files of as many lines (empty: no reference there), or task files: XML, JSON, JSONL.",
        ),
    ],
    protocol: Annotated[str, typer.Option(help="multi-bleu, lora (DART) or mteval-13a (E2E).")] = "multi-bleu",
    as_json: Json = False,
) -> None:
    """Corpus BLEU of generated text with several references.

    `vspdf bleu answers.txt reference0.lex reference1.lex reference2.lex`

    `vspdf bleu answers.txt dart-test.xml --protocol lora`
    """
    from vspdf import tasks
    from vspdf.bleu import PROTOCOLS, corpus_bleu, read_references

    texts = tasks.read_lines(hypotheses)
    score = corpus_bleu(texts, read_references(references, len(texts)), protocol)
    if as_json:
        emit(score.to_json())
        return
    ratio = score.hypothesis_length / score.reference_length if score.reference_length else 0.0
    counts = ", ".join(f"{n:,}" for n in score.references)
    lines = [
        f"BLEU = {score.bleu:.2f}, {'/'.join(f'{p:.1f}' for p in score.precisions)} (BP={score.brevity_penalty:.3f}, "
        f"ratio={ratio:.3f}, hyp_len={score.hypothesis_length}, ref_len={score.reference_length})",
        f"{score.hypotheses:,} hypotheses; with 0, 1, 2, ... references: {counts}",
        f"{score.protocol}: {PROTOCOLS[score.protocol]} ({score.signature})",
    ]
    if f"{score.bleu_without_missing:.2f}" != f"{score.bleu:.2f}":
        lines.append(
            "multi-bleu takes an empty reference for one of no words, which counts here; "
            f"without missing references BLEU = {score.bleu_without_missing:.2f}."
        )
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
