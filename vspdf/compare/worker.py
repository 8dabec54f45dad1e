"""One run of a study, in a process of its own: trains, evaluates, and for a task answers and scores.

What is known at the end is kept in the run's directory; what is there already is not made again.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vspdf.config import loading, resolve
from vspdf.config.resolved import ResolvedConfig, ResolvedTask
from vspdf.data import pairs, source
from vspdf.data.text import prepare
from vspdf.errors import Diverged, Interrupted, UserError
from vspdf.evaluate import answers
from vspdf.evaluate.generate import Decoding
from vspdf.evaluate.loss import evaluate
from vspdf.files import new_whole
from vspdf.interop import checkpoints, hugging_face
from vspdf.interop.checkpoints import Loaded
from vspdf.kernels.hardware import device, keep_freed_memory
from vspdf.model import GPT
from vspdf.runs.folder import START, Run
from vspdf.runs.writer import Writer
from vspdf.train.trainer import train

# Without the working folder among the places of modules, where a user's random.py would be taken for Python's; with
# the place where this process has found vspdf.
_PROGRAM = "import sys; sys.path = [*filter(None, sys.path), sys.argv[1]]; import vspdf.compare.worker as w; w.work()"
_PLACE = str(Path(__file__).parents[2])


def start(order: dict[str, Any], log: Path, inherited: Sequence[int] = ()) -> subprocess.Popen[str]:
    """A process that does `work`, and says in the file `log` what goes wrong. It inherits open files by number."""
    with open(log, "w") as errors:
        # A session of its own: Ctrl-C reaches this process alone, which stops its workers once and in order.
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, _PLACE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=errors, text=True, pass_fds=inherited, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it is dead already, as its status will say
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    return process


def close(process: subprocess.Popen[str]) -> None:
    """Has a process of `start` end soon, with a checkpoint."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def work() -> None:
    """Does what the first line of the input asks for; a signal comes at the input's end."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # the study's process is dead
        sys.exit(130)
    order = json.loads(line)
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    keep_freed_memory()
    try:
        _work(loading.build(order["config"], "the study"), order)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        sys.exit(130)


def _stop_at_the_end_of_input() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _work(config: ResolvedConfig, order: dict[str, Any]) -> None:
    folder = Path(config.run_dir)
    run = Run(folder)
    result = run.evaluation
    if config.train.threads:  # the trainer sets it back when it is done
        torch.set_num_threads(config.train.threads)
    try:
        if order["untrained"]:
            loaded = _drawn(config, folder / START)
        else:
            if not run.finished:
                train(config, resume=run.configured, say=lambda line: None)
                result["load_average"] = os.getloadavg()[0]
            loaded = checkpoints.load(folder, config.train.backend)
        model = loaded.model.to(device(config.train.device, "train.device"))
        data = source.prepare(config, loaded.tokenizer)
        if not order["untrained"]:
            source.check_unchanged(data, config, run.manifest)
        for part, text in {"val": data, **({"test": data.for_test()} if order["test"] else {})}.items():
            if f"{part}_loss" in result:  # of a trial that is now a result
                continue
            found = evaluate(model, text, config.train.micro_batch_size, precision=config.train.precision)
            if not all(map(math.isfinite, found)):
                raise Diverged(f"the loss on held-out text ({part}) is {found[0]}")
            result[f"{part}_loss"], result[f"{part}_bits_per_byte"] = found
        if config.task and order["test"]:
            result |= _answered(loaded, config.task, order["task"], folder)
    except Diverged as error:
        result = {"diverged": str(error)}
    Writer(folder).evaluation(result)


def _answered(loaded: Loaded, data: ResolvedTask, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Answers the test part of a task, keeps the answers, and scores them."""
    assert loaded.tokenizer is not None
    examples = pairs.parts(data)["test"]
    prompts = answers.Prompts([example.context for example in examples], answering=True)
    lines = answers.answer(loaded.model, loaded.tokenizer, prompts, Decoding(**task["decoding"])).lines
    digest = Writer(folder).answers(lines)
    return answers.scored(lines, examples, task["protocol"]) | {"answers_sha256": digest}


def _drawn(config: ResolvedConfig, folder: Path) -> Loaded:
    """The initial weights of a seed, kept where fine-tuning finds them."""
    if not folder.exists():
        data = prepare(config.data, config.model.sequence_length, config.seed)
        shape = resolve.model_shape(config.model, data.vocab_size)
        model = GPT(shape, config.model.init_std, config.seed, config.model.output_init_std)
        with new_whole(folder) as whole:
            hugging_face.write_hugging_face(model, data.tokenizer, whole)
    return checkpoints.load(folder)
