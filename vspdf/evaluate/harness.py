"""Tasks of lm-evaluation-harness on a model in memory, through its public API."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F

from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.evaluate.generate import Decoding, generate
from vspdf.model import GPT
from vspdf.parallel.world import ALONE, World

# The zero-shot tasks of the Cerebras-GPT and Variable SPDF papers, metric `acc`.
CEREBRAS7 = ("hellaswag", "piqa", "winogrande", "lambada_openai", "arc_easy", "arc_challenge", "openbookqa")
GROUPS = {"cerebras7": CEREBRAS7}


def evaluate_tasks(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    say: Callable[[str], None] = lambda line: None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Scores of a model on tasks, each by itself: a task whose data cannot be reached stops no other.

    Parameters
    ----------
    model, tokenizer : GPT, Tokenizer
    tasks : sequence of str
        Names of lm-evaluation-harness, of tasks in `folder`, or "cerebras7".
    folder : Path, optional
        A folder of task files (YAML) with their data; they come before the harness's own tasks of the same name. Paths
        in them are relative to the working directory or to the folder.
    few_shot : int, optional
        Examples before each question; default: the task's own number.
    limit : int, optional
        Only the first so many questions of a task.
    batch_size : int
        Sequences at a time.
    say : callable
        Receives progress, a line at a time.
    world : World
        Who shares the questions; each has all scores at the end.

    Returns
    -------
    dict
        `tasks`: by name, `metrics`, `samples`, `few_shot`, and `acc`: acc, or exact_match and the like for tasks
        without; `missing`: why, by name of what could not be evaluated; `average`: of `acc` over what was asked for,
        None where none was evaluated.

    Raises
    ------
    UserError
        If a task or a folder does not exist.
    """
    _offline_if_unreachable(say)
    _quiet()
    try:
        lm_eval = import_module("lm_eval")
        manager_class = import_module("lm_eval.tasks").TaskManager
    except ImportError:
        raise UserError("tasks need a package: `pip install lm-eval`, or vspdf's extra `eval`.") from None
    if folder is not None and not any(folder.rglob("*.y*ml")):
        raise UserError(f"'{folder}' holds no task: expected a folder with task files (*.yaml).{near_path(folder)}")
    names = list(dict.fromkeys(name for item in tasks for name in GROUPS.get(item, (item,))))
    local = manager_class(include_path=str(folder.resolve()), include_defaults=False) if folder else None
    managers = {name: local for name in names if local and name in local.all_tasks}
    if len(managers) < len(names):  # reading the harness's own thousands of task files takes seconds
        known = _own_tasks(manager_class)
        managers |= {name: known for name in names if name not in managers}
        for name in names:
            if name not in managers[name].all_tasks:
                raise UserError(f"no task '{name}'.{did_you_mean(name, [*GROUPS, *managers[name].all_tasks])}")
    adapter = _adapter(model, tokenizer, batch_size, say, world)
    found: dict[str, Any] = {}
    asked: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        say(f"task {number}/{len(names)}: {name}")
        for place in [None, folder] if managers[name] is local else [None]:
            try:
                with _inside(place):
                    result = lm_eval.simple_evaluate(
                        model=adapter, tasks=[name], num_fewshot=few_shot, limit=limit, bootstrap_iters=0,
                        log_samples=False, task_manager=managers[name], verbosity="ERROR",
                    )  # fmt: skip
            except UserError:
                raise
            except Exception as error:  # the harness and its data sets have no common base
                missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            else:
                missing.pop(name, None)
                rows = {task: _scores(result, task, scores) for task, scores in result["results"].items()}
                asked[name] = _asked(result, name, rows)
                found.update(rows)
                break
        if name in missing:
            say(f"task {name} was not evaluated: {missing[name]}")
    main = [score for name in names if (score := asked.get(name)) is not None]
    return {"tasks": found, "missing": missing, "average": sum(main) / len(main) if main else None}


def _asked(result: dict[str, Any], name: str, rows: dict[str, Any]) -> float | None:
    """The score of what was asked for: a group's own, or where it has none the mean of its tasks."""
    if rows.get(name, {}).get("acc") is not None:
        return rows[name]["acc"]
    groups = {group for group, members in (result.get("group_subtasks") or {}).items() if members}
    scores = [row["acc"] for task, row in rows.items() if task not in groups and row["acc"] is not None]
    return sum(scores) / len(scores) if scores else None


@cache
def _own_tasks(manager_class: Any) -> Any:
    return manager_class()


def _scores(result: dict[str, Any], task: str, scores: dict[str, Any]) -> dict[str, Any]:
    metrics = {key.partition(",")[0]: value for key, value in scores.items() if isinstance(value, int | float)}
    plain = {
        key: value for key, value in metrics.items() if not key.endswith("_stderr") and not key.startswith("sample_")
    }
    main = next((plain[key] for key in ("acc", "exact_match", "bleu", "f1") if key in plain), None)
    samples = result.get("n-samples", {}).get(task, {}).get("effective")
    return {"acc": main, "metrics": plain, "samples": samples, "few_shot": result.get("n-shot", {}).get(task)}


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def _offline_if_unreachable(say: Callable[[str], None]) -> None:
    """Without a network each data set would be tried for half a minute: once is enough, before the library starts."""
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if proxied or "HF_HUB_OFFLINE" in os.environ or "datasets" in sys.modules:
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        say(f"{host} cannot be reached ({error}): only data on this machine are used")
        os.environ["HF_HUB_OFFLINE"] = "1"


def _quiet() -> None:
    for name in ("lm_eval", "lm-eval", "datasets", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        import_module("datasets").utils.logging.disable_progress_bar()


def _adapter(model: GPT, tokenizer: Tokenizer, batch_size: int, say: Callable[[str], None], world: World) -> Any:
    """Our model behind the harness's interface; a class made here, since its base comes with an optional package."""
    base = import_module("lm_eval.api.model").TemplateLM
    window = model.shape.sequence_length

    class InMemory(base):  # type: ignore[misc,valid-type]
        @property
        def eot_token_id(self) -> int:
            return tokenizer.end_of_document

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            """Log-probability of each continuation, and whether greedy decoding would give it."""
            rows = [(context, continuation) for _, context, continuation in requests]
            return score_continuations(model, rows, batch_size, say, world)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-probability of whole texts, in windows that overlap by nothing."""
            sums = []
            for (text,) in [request.args for request in requests]:
                ids = [self.eot_token_id, *self.tok_encode(text)]
                rows = [
                    (ids[start : start + 1], ids[start + 1 : start + 1 + window])
                    for start in range(0, len(ids) - 1, window)
                ]
                sums.append(math.fsum(score for score, _ in score_continuations(model, rows, batch_size, world=world)))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = {}
            for number in range(world.rank, len(requests), world.size):
                context, how = requests[number].args
                stops = how.get("until") or []
                count = max(1, min(how.get("max_gen_toks", 256), window - 1))
                prompt = self.tok_encode(context)[-(window - count) :] or [self.eot_token_id]
                decoding = Decoding(
                    max_tokens=count, temperature=how.get("temperature", 0.0) if how.get("do_sample") else 0.0
                )
                text = tokenizer.decode(generate(model, [prompt], decoding, tokenizer.ends)[0])
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                texts[number] = text
            found = {number: text for mine in world.gather_things(texts) for number, text in mine.items()}
            return [found[number] for number in range(len(requests))]

    adapter = InMemory()
    adapter.tokenizer = None
    return adapter


@torch.no_grad()
def score_continuations(
    model: GPT,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    say: Callable[[str], None] = lambda line: None,
    world: World = ALONE,
) -> list[tuple[float, bool]]:
    """Log-probability of continuations after their contexts, and whether each token of them is the likeliest.

    Parameters
    ----------
    model : GPT
    rows : sequence of (context, continuation)
        Token ids; no context empty. Where both do not fit the model's window, the context loses its beginning; of a
        continuation longer than the window, the beginning is lost too.
    batch_size : int
    say : callable
        Receives progress, a line at a time.
    world : World
        Who shares the batches; each has all results at the end.
    """
    window = model.shape.sequence_length
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    results = dict[int, tuple[float, bool]]()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for start in range(world.rank * batch_size, len(order), world.size * batch_size):
        batch = order[start : start + batch_size]
        inputs = [[*rows[i][0], *rows[i][1]][-(window + 1) :][:-1] for i in batch]
        longest = max(map(len, inputs))
        tokens = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(ids)
        hidden = model.hidden(tokens.to(device))
        for row, i in enumerate(batch):
            targets = torch.tensor(list(rows[i][1])[-len(inputs[row]) :], dtype=torch.long, device=device)
            if not len(targets):
                continue
            logits = model.logits(hidden[row, len(inputs[row]) - len(targets) : len(inputs[row])]).float()
            score = -float(F.cross_entropy(logits, targets, reduction="sum"))
            results[i] = (score, bool((logits.argmax(-1) == targets).all()))
        done = start + len(batch)
        if done == len(order) or (done // batch_size) % 50 == 0:
            say(f"  {done:,}/{len(order):,} sequences")
    model.train(training)
    found = {i: result for mine in world.gather_things(results) for i, result in mine.items()}
    return [found.get(i, (0.0, True)) for i in range(len(rows))]
