"""Verbs for what comes after pre-training: texts and their scores."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vspdf.cli.console import Json, _Progress, _say, emit, out
from vspdf.errors import Interrupted, UserError, did_you_mean
from vspdf.evaluate.answers import _fitted

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]


def generate(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; 'def ' if not given.")] = None,
    input: Annotated[Path | None, typer.Option(help="One prompt a line, or a task file (DART, ...).")] = None,
    output: Annotated[Path | None, typer.Option(help="Answers, one a line; default: stdout.")] = None,
    format: Annotated[str, typer.Option(help="Of --input: lines, dart, webnlg, e2e, jsonl.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts of --input.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="At most, of an answer; 64, or 200 after --prompt.")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="1: greedy or sampling; default 10 for task files.")] = None,
    length_penalty: Annotated[float, typer.Option(help="Of beam search.")] = 0.8,
    no_repeat_ngram: Annotated[int, typer.Option(min=0, help="Of beam search, within an answer; 0: off.")] = 4,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: greedy; 0.8 after --prompt.")] = None,
    overlong: Annotated[str, typer.Option(help="Prompts that leave no room for an answer: refuse or cut.")] = "refuse",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    seed: int = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Text from a checkpoint, sparse or dense: sampled after a prompt, or by beam search for a task file.

    `vspdf generate runs/quickstart --prompt "import "`

    `vspdf generate runs/dart --input dart-test.xml --output answers.txt`
    """
    from vspdf.data import tasks
    from vspdf.evaluate.generate import Decoding
    from vspdf.evaluate.generate import generate as run
    from vspdf.interop import checkpoints

    if overlong not in ("refuse", "cut"):
        raise UserError(f"--overlong '{overlong}' is not known.{did_you_mean(overlong, ['refuse', 'cut'])}")
    if output and output.exists():
        raise UserError(f"'{output}' exists already: nothing is overwritten; name another or move it away.")
    if output and not input:
        raise UserError("--output goes with --input; text after --prompt goes to stdout.")
    model, tokenizer, state = checkpoints.load(path, device=device)
    if tokenizer is None:
        raise UserError(f"'{path}' has no tokenizer: put a tokenizer.json beside its weights.")
    # A model that was fine-tuned here, and a task file, have an end of document between context and answer.
    task = state.get("task")
    lower = bool(task and task["lower_relations"])
    if prompt is None:
        if task and not input:
            raise UserError(f"'{path}' was fine-tuned to answer: give --prompt a context, or --input a task file.")
        prompt = "def "
    if lower and (input or tasks.lowered(prompt) != prompt):
        _say("relations of triples are in lower case, as in the fine-tuning (data.lower_relations)")
    if input:
        examples = tasks.read(input, format, lower_relations=lower)[:limit]
        answering = bool(task) or any(example.references for example in examples) or format not in ("auto", "lines")
        texts = [example.context for example in examples]
    else:
        answering, texts = bool(task), [tasks.lowered(prompt) if lower else prompt]
    decoding = Decoding(
        max_tokens=tokens or (64 if input else 200), beams=beams or (10 if input and answering else 1),
        length_penalty=length_penalty, no_repeat_ngram=no_repeat_ngram,
        temperature=temperature if temperature is not None else (0.0 if input else 0.8), seed=seed,
    )  # fmt: skip
    prompts = [tokenizer.encode(text).tolist() for text in texts]
    if not answering and not all(prompts):
        number = next(i for i, ids in enumerate(prompts, 1) if not ids)
        what = f"prompt {number} of '{input}'" if input else "the prompt"
        raise UserError(f"{what} is empty: give at least one character{'' if input else ' with --prompt'}.")
    if input or decoding.beams > 1:
        room = model.shape.sequence_length - decoding.max_tokens - answering
        prompts = _fitted(prompts, room, overlong, keep_end=not answering, say=_say)
    if answering:
        prompts = [[*ids, tokenizer.end_of_document] for ids in prompts]
    started = time.perf_counter()
    try:
        answers = run(
            model, prompts, decoding, tokenizer.end_of_document, batch_size,
            progress=_Progress(len(prompts), "answers") if input else lambda done: None,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted("stopped; no answer was written.") from None
    seconds = time.perf_counter() - started
    if input:
        lines = [" ".join(tokenizer.decode(answer).split()) for answer in answers]
    else:
        lines = [texts[0] + (" " if answering else "") + tokenizer.decode(answers[0]).lstrip(" " if answering else "")]
    if output:
        from vspdf.files import write_whole

        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, "".join(f"{line}\n" for line in lines))
    count = sum(map(len, answers))
    body: dict[str, Any] = {
        "checkpoint": str(path), "step": state["step"], "answers": len(answers), "tokens": count, "seconds": seconds,
        "decoding": asdict(decoding), **({"output": str(output)} if output else {"texts": lines}),
    }  # fmt: skip
    if as_json:
        emit(body)
    elif output:
        out.print(
            f"wrote {len(answers):,} answers of {count / len(answers):.1f} tokens on average to {output} in "
            f"{seconds:,.1f} s",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    else:
        for line in lines:
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run, a checkpoint, or a Hugging Face folder.")],
    tasks: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of lm-evaluation-harness, or cerebras7: the seven zero-shot tasks.")
    ] = "",
    text: Annotated[
        str, typer.Option(metavar="FILE", help="Text of your own instead: a file, a folder, or FILE.jsonl.")
    ] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Task files (YAML) of your own, with their data.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples first; default: what the task says.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Loss and bits per byte of a checkpoint on its run's held-out text or on a text of yours, or its scores on tasks.

    `vspdf eval runs/quickstart`

    `vspdf eval cerebras-gpt-111m/ --text wikitext-2-test.txt`

    `vspdf eval cerebras-gpt-111m/ --tasks cerebras7`

    `vspdf eval runs/mine --tasks my_task --task-folder tasks/`
    """
    from vspdf.interop import checkpoints

    names = [name for name in tasks.split(",") if name]
    if task_folder and not names:
        raise UserError("--task-folder goes with --tasks: name the tasks in it.")
    if text and names:
        raise UserError("--text and --tasks are two evaluations: give one of them.")
    loaded = checkpoints.load(path, device=device)
    if loaded.tokenizer is None and (text or names):
        raise UserError(f"'{path}' has no tokenizer: put a tokenizer.json beside its weights.")
    body: dict[str, Any] = {"checkpoint": str(path), "step": loaded.state["step"]}
    if not names:
        _on_text(path, loaded, text, batch_size, body)
    else:
        from vspdf.evaluate.harness import evaluate_tasks

        assert loaded.tokenizer is not None
        body |= evaluate_tasks(
            loaded.model, loaded.tokenizer, names, folder=task_folder, few_shot=few_shot, limit=limit,
            batch_size=batch_size, say=_say,
        )  # fmt: skip
    if as_json:
        emit(body)
    elif "val_loss" in body:
        figures = f"{body['val_loss']:.4f} nats/token, {body['val_bits_per_byte']:.4f} bits/byte"
        where = "all held-out text"
        if text:
            where = "{name} ({bytes:,} bytes, {tokens:,} tokens; documents: {documents:,})".format(**body["text"])
        out.print(f"{body['checkpoint']}: {figures} on {where}", markup=False, highlight=False, soft_wrap=True)
    else:
        _print_tasks(body)
    if names and not body["tasks"]:
        raise UserError("no task could be evaluated: see above which data could not be reached.")


def _on_text(path: Path, loaded: Any, text: str, batch_size: int, body: dict[str, Any]) -> None:
    """Adds loss and bits per byte on `text`, or on what the run held out."""
    from vspdf.data import pairs
    from vspdf.data.text import Dataset, Text, prepare
    from vspdf.evaluate.loss import evaluate as run
    from vspdf.interop import checkpoints
    from vspdf.runs import checkpoint
    from vspdf.runs.folder import of_checkpoint

    window = loaded.model.shape.sequence_length
    if text:
        own = Text.read(text, loaded.tokenizer, window)
        result = run(loaded.model, own, batch_size, progress=_Progress(own.source["tokens"], "tokens"))
        body |= {"text": own.source, "val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}
        return
    folder = checkpoint.resolve(path) if checkpoints.kind(path) == "checkpoint" else None
    if folder is None or not of_checkpoint(folder).configured:
        raise UserError(f"'{path}' has no run with held-out text: give --text FILE, or --tasks.")
    settings = of_checkpoint(folder).config
    held: Dataset | pairs.Pairs
    progress = lambda done: None  # noqa: E731
    if settings.start:
        held = pairs.prepare(settings.data, settings.seed, loaded.tokenizer)
    else:
        held = prepare(settings.data, window, settings.seed)
        progress = _Progress(held.manifest["validation"]["tokens"], "tokens")
    if held.manifest["corpus"]["sha256"] != loaded.state["corpus"]["sha256"]:
        name = settings.data.path or settings.data.corpus
        raise UserError(f"the corpus '{name}' has changed since {folder} was written.")
    batch_size = settings.train.micro_batch_size or 1
    result = run(loaded.model, held, batch_size, precision=settings.train.precision, progress=progress)
    body |= {"checkpoint": str(folder), "val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}


def _print_tasks(body: dict[str, Any]) -> None:
    table = Table(title=body["checkpoint"], title_justify="left")
    for column in ("task", "metric", "value", "few-shot", "questions"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, row in body["tasks"].items():
        for i, (metric, value) in enumerate(row["metrics"].items()):
            cells = (f"{row['few_shot']}", f"{row['samples']:,}") if i == 0 and row["samples"] else ("", "")
            table.add_row(name if i == 0 else "", metric, f"{value:.4f}", *cells)
    for name in body["missing"]:
        table.add_row(name, "", "not evaluated", "", "")
    if body["average"] is not None:
        table.add_section()
        count = sum(row["acc"] is not None for row in body["tasks"].values())
        table.add_row(f"average of {count}", "acc", f"{body['average']:.4f}", "", "", style="bold")
    out.print(table)
    for name, why in body["missing"].items():
        out.print(f"{name} was not evaluated: {why}", markup=False, highlight=False, soft_wrap=True)


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
    from vspdf.data import tasks
    from vspdf.evaluate.bleu import PROTOCOLS, corpus_bleu, read_references

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
