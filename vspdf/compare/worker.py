"""One run of a study, in a process of its own: trains, evaluates, and for a task answers and scores.

What is known at the end is kept in the run's directory; what is there already is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from vspdf.config import loading, resolve
from vspdf.config.settings import Config
from vspdf.data import pairs
from vspdf.data.text import Dataset, prepare
from vspdf.errors import Diverged, Interrupted, UserError
from vspdf.evaluate.answers import _scored
from vspdf.evaluate.loss import evaluate
from vspdf.interop import checkpoints, hugging_face
from vspdf.interop.checkpoints import Loaded
from vspdf.kernels.hardware import device
from vspdf.model import GPT
from vspdf.runs.folder import START, Run
from vspdf.runs.writer import Writer
from vspdf.train.trainer import train


def work() -> None:
    """Does what the first line of the input asks for; a signal comes at the input's end."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    from vspdf.kernels.hardware import keep_freed_memory

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


def _work(config: Config, order: dict[str, Any]) -> None:
    folder = Path(config.run_dir or "")
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
        data: Dataset | pairs.Pairs
        if config.start:
            assert loaded.tokenizer is not None
            data = pairs.prepare(config.data, config.seed, loaded.tokenizer)
        else:
            data = prepare(config.data, config.model.sequence_length or 0, config.seed)
        for part, text in {"val": data, **({"test": data.for_test()} if order["test"] else {})}.items():
            if f"{part}_loss" in result:  # of a trial that is now a result
                continue
            found = evaluate(model, text, config.train.micro_batch_size or 1, precision=config.train.precision)
            result[f"{part}_loss"], result[f"{part}_bits_per_byte"] = found
        if order["task"] and order["test"]:
            result |= _scored(loaded, config, order["task"], folder)
    except Diverged as error:
        result = {"diverged": str(error)}
    Writer(folder).evaluation(result)


def _drawn(config: Config, folder: Path) -> Loaded:
    """The initial weights of a seed, kept where fine-tuning finds them."""
    assert config.model.sequence_length is not None
    if not folder.exists():
        data = prepare(config.data, config.model.sequence_length, config.seed)
        config.model.vocab_size = config.model.vocab_size or data.vocab_size
        shape = resolve.model_shape(config.model)
        model = GPT(shape, config.model.init_std, seed=config.seed, activation=config.model.activation)
        draft = folder.with_name(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        hugging_face.write_hugging_face(model, data.tokenizer, draft)
        draft.rename(folder)
    return checkpoints.load(folder)
