"""Verbs for what comes after pre-training: texts and their scores."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vspdf.cli.console import Json, Progress, emit, only, say, show, tell
from vspdf.errors import UserError, one_of, require
from vspdf.parallel.environment import from_environment, refuse

if TYPE_CHECKING:
    from vspdf.data.tokenizer import Tokenizer
    from vspdf.evaluate.generate import Decoding
    from vspdf.model import GPT
    from vspdf.runs.folder import Run

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]


def generate(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run, a checkpoint, or a Hugging Face folder.")],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; default: a document's beginning.")] = None,
    input: Annotated[Path | None, typer.Option(help="One prompt a line, or a task file (DART, ...).")] = None,
    output: Annotated[Path | None, typer.Option(help="Answers, one a line; default: stdout.")] = None,
    format: Annotated[str, typer.Option(help="Of --input: lines, dart, webnlg, e2e, jsonl.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts of --input.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="At most, of an answer; 64, or 200 after --prompt.")
    ] = None,
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
    from vspdf.evaluate import answers
    from vspdf.evaluate.generate import Decoding
    from vspdf.files import make_folder, must_be_new, write_whole

    refuse("generate", "run it by itself")
    one_of("`overlong`", overlong, answers.OVERLONG)
    if output:
        must_be_new(output)
    require(not output or input is not None, "`output` goes with `input`; text after `prompt` goes to stdout.")
    model, tokenizer, state = _with_tokenizer(path, device)
    task = state.get("task")
    prompts = answers.read_prompts(input, format, task, limit, say) if input else answers.one_prompt(prompt, task, say)
    decoding = Decoding(
        max_tokens=max_tokens or (64 if input else 200), beams=beams or (10 if input and prompts.answering else 1),
        length_penalty=length_penalty, no_repeat_ngram=no_repeat_ngram,
        temperature=temperature if temperature is not None else (0.0 if input else 0.8), seed=seed,
    )  # fmt: skip
    _refuse_idle(context, decoding, input)
    started = time.perf_counter()
    if input:
        found = answers.answer(
            model, tokenizer, prompts, decoding, overlong=overlong, batch_size=batch_size, say=say,
            progress=Progress(len(prompts.texts), "answers"),
        )  # fmt: skip
    else:
        found = answers.go_on(model, tokenizer, prompts, decoding, overlong=overlong, say=say)
    seconds = time.perf_counter() - started
    if output:
        make_folder(output.parent)
        write_whole(output, "".join(f"{line}\n" for line in found.lines))
    texts = {"output": str(output)} if output else {"texts": found.lines}
    body = {"checkpoint": str(path), "step": state["step"], "answers": len(found.lines), "tokens": found.tokens,
            "seconds": seconds, "decoding": asdict(decoding), **texts}  # fmt: skip
    emit(body) if as_json else _print_answers(body)


def _refuse_idle(context: typer.Context, decoding: Decoding, input: Path | None) -> None:
    """Refuses options of `generate` that would change nothing beside the others."""
    searching, drawing = decoding.beams > 1, decoding.beams == 1 and decoding.temperature > 0
    only(input is None, "is not read beside `input`, which holds the prompts", context, "prompt")
    only(input is not None, "goes with `input`", context, "format", "limit", "batch_size")
    only(searching, "is for beam search: `beams` above 1", context, "length_penalty", "no_repeat_ngram")
    only(not searching, "is for sampling: `beams` 1", context, "temperature")
    only(drawing, "is for sampling: `beams` 1 and a `temperature` above 0", context, "seed")
    only(searching or input is not None, "is for beam search and `input`: sampling has no end", context, "overlong")


def _print_answers(body: dict[str, Any]) -> None:
    if "texts" in body:
        return tell(*body["texts"])
    mean = body["tokens"] / body["answers"]
    tell("wrote {answers:,} answers of {0:.1f} tokens on average to {output} in {seconds:,.1f} s".format(mean, **body))


def _with_tokenizer(path: Path, device: str) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Model, tokenizer and state of a checkpoint for what needs words."""
    from vspdf.interop import checkpoints

    model, tokenizer, state = checkpoints.load(path, device=device)
    if tokenizer is None:
        raise UserError(f"'{path}' has no tokenizer: put a tokenizer.json beside its weights.")
    return model, tokenizer, state


def evaluate(
    context: typer.Context,
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
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time; default at most 8, or as many as the run took.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Loss and bits per byte of a checkpoint on its run's held-out text or on a text of yours, or its scores on tasks.

    `vspdf eval runs/quickstart`

    `vspdf eval cerebras-gpt-111m/ --text wikitext-2-test.txt`

    `vspdf eval cerebras-gpt-111m/ --tasks cerebras7`

    `vspdf eval runs/mine --tasks my_task --task-folder tasks/`
    """
    import torch

    from vspdf.evaluate import harness, held_out
    from vspdf.interop import checkpoints

    names = [name for part in tasks.split(",") if (name := part.strip())]
    require(bool(names) or not tasks, f"`tasks` '{tasks}': expected names of tasks with commas between them.")
    require(bool(names) or not task_folder, "`task_folder` goes with `tasks`: name the tasks in it.")
    require(not (text and names), "`text` and `tasks` are two evaluations: give one of them.")
    only(bool(names), "goes with `tasks`", context, "few_shot", "limit")

    with from_environment() as world:
        tell, progress = (say, _tokens) if world.first else (lambda line: None, lambda total: lambda done: None)
        if world.threads:
            torch.set_num_threads(world.threads)
        if names or text:
            model, tokenizer, state = world.together(lambda: _with_tokenizer(path, device))
            body: dict[str, Any] = {"checkpoint": str(path), "step": state["step"]}
        if names:
            body |= harness.evaluate_tasks(
                model, tokenizer, names, folder=task_folder, few_shot=few_shot, limit=limit,
                batch_size=batch_size or 8, say=tell, world=world,
            )  # fmt: skip
        elif text:
            loss, body["text"] = held_out.on_text(model, tokenizer, text, batch_size, progress, world)
        else:
            loaded, (folder, run) = world.together(lambda: (checkpoints.load(path, device=device), _run_of(path)))
            body = {"checkpoint": str(folder), "step": loaded.state["step"]}
            loss = held_out.on_run(
                loaded.model, loaded.tokenizer, run.config, run.manifest, progress, batch_size, world
            )
        if not names:
            body |= {"val_loss": loss.loss, "val_bits_per_byte": loss.bits_per_byte}
        if not world.first:
            return
    if as_json:
        emit(body)
    else:
        _print_tasks(body) if names else _print_loss(body)
    if names and not body["tasks"]:
        raise UserError("no task could be evaluated: see above which data could not be reached.")


def _tokens(total: int) -> Progress:
    return Progress(total, "tokens")


def _run_of(path: Path) -> tuple[Path, Run]:
    """The checkpoint that a path means, and its run."""
    from vspdf.interop import checkpoints
    from vspdf.runs import checkpoint
    from vspdf.runs.folder import of_checkpoint

    if checkpoints.kind(path) == "checkpoint":
        folder = checkpoint.resolve(path)
        if (run := of_checkpoint(folder)).configured:
            return folder, run
    raise UserError(f"'{path}' has no run with held-out text: give `text` FILE, or `tasks`.")


def _print_loss(body: dict[str, Any]) -> None:
    where = "all held-out text"
    if "text" in body:
        where = "{name} ({bytes:,} bytes, {tokens:,} tokens in windows of {window:,}; documents: {documents:,})".format(
            **body["text"]
        )
    tell("{checkpoint}: {val_loss:.4f} nats/token, {val_bits_per_byte:.4f} bits/byte on ".format(**body) + where)


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
    show(table)
    for name, why in body["missing"].items():
        tell(f"{name} was not evaluated: {why}")


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
    tell(*lines)
