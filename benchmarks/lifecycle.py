"""The whole life cycle, small, on real data: sparse and dense pre-training, conversion, fine-tuning on DART, BLEU.

    python benchmarks/lifecycle.py DATA [--out FOLDER] [--until STAGE]

DATA holds text/ (English *.txt files to pre-train on) and dart/ with dart-v1.1.1-full-dev.json and -full-test.xml.
Every stage is a `vspdf` command that is printed before it runs; a stage whose result is in FOLDER is not run again, so
a stopped script goes on where it was. The dev triples stand in for DART's training split, a part of them held out, and
the first 200 of the test set for all of it: the figures say whether the life cycle works, and compare with nothing
published.

The names in the test set are new to the model, so the task is to copy them, and copying is a circuit that a model has
to learn. Plain text does not teach it in minutes, so text (`documents`) and pairs (`pairs`) are rewritten. The score
that has to be beaten is that of the triples themselves; what their text would score without the separators, which no
reader would call an answer either, is shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

PRETRAIN = """
name: lifecycle
model: {n_layer: 2, d_model: 128, n_head: 4, sequence_length: 128, init_std: 0.04}
data: {tokenizer: "bpe:2048", repeat: true}
optimizer: {lr: 3.0e-3}
train:
  {batch_size: 8, eval_every: 500, eval_tokens: 16384, checkpoint_every: 500, sample_tokens: 40, measure_dense: 0}
phases:
  - {name: sparse, sparsity: 0.9, steps: 1000, lr_multiple: 2}
  - {name: dense, steps: 10000, warmup_steps: 100}
"""
FINETUNE = [
    "optimizer.lr=1.5e-3", "train.batch_size=16", "train.checkpoint_every=200", "phases.0.steps=1800",
    "phases.0.warmup_steps=100", "data.overlong=drop",
]  # fmt: skip
EDGES = ".,;:!?()"
READINGS = 4  # of the text, each with other phrases
EXCHANGES = (6, 36)  # of a pair, each with other names; more of those from tables, which are few
TEST_ITEMS = 200
ANSWER_TOKENS = 48
LENGTH_PENALTIES = (0.8, 1.0, 1.2)


def vspdf(*arguments: object) -> dict[str, Any]:
    """Runs a verb as a user would; returns what `--json` prints."""
    words = [str(argument) for argument in arguments]
    print("$ vspdf", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-c", "from vspdf.cli import main; main()", *words, "--json"]
    # In a session of its own: an interrupt reaches it once, through here, and it ends in its own way.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            text = process.communicate()[0]
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
    if process.returncode:
        sys.exit(f"stopped with status {process.returncode}; the same command goes on from here.")
    return json.loads(text)


class Stages:
    """Results by stage, kept in a file, with the seconds each took."""

    def __init__(self, folder: Path, until: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.until = folder / "lifecycle.json", until
        self.done: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, work: Any) -> dict[str, Any]:
        if name not in self.done:
            started = time.perf_counter()
            result = work()
            # A stage that went on from where it was stopped knows better than this clock.
            seconds = max(time.perf_counter() - started, result.pop("work_seconds", 0.0))
            self.done[name] = {"seconds": seconds, **result}
            draft = self.path.with_suffix(".draft")
            draft.write_text(json.dumps(self.done, indent=1))
            draft.replace(self.path)
        if name == self.until:
            sys.exit(0)
        return self.done[name]


def sentences(folder: Path) -> list[list[str]]:
    """Words of the sentences of 4 to 24 words; WikiText's marks taken out."""
    text = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r" ([.,;:!?)])|([(]) ", r"\1\2", text.replace("<unk>", "X"))
    found = [s.split() for line in text.splitlines() for s in re.split(r"(?<=[.!?;]) +", line) if line[:2] != " ="]
    return [words for words in found if 4 <= len(words) <= 24]


def cut(words: list[str], random: Random) -> list[tuple[int, int]]:
    """Up to five phrases of one to four words, in order, with a word between two of them."""
    cuts, begin = [], random.randrange(3)
    while begin < len(words) and len(cuts) < 5:
        end = min(begin + random.choice((1, 1, 2, 2, 3, 4)), len(words))
        cuts.append((begin, end))
        begin = end + 1 + random.randrange(5)
    return cuts


def phrase(phrases: list[str], random: Random) -> str:
    """A phrase; its figures are other ones half of the time."""
    text = random.choice(phrases)
    return re.sub(r"\d", lambda _: random.choice("0123456789"), text) if random.random() < 0.5 else text


def documents(text: list[list[str]], target: Path) -> None:
    """Writes what a small model learns from to copy names, which DART is about: phrases, and a sentence that has them.

    The phrases stand in place of the sentence's own, so that only copying foretells them.
    """
    random = Random(0)
    phrases = [" ".join(words[i:j]).strip(EDGES) for words in text for i, j in cut(words, random)]
    with target.open("w") as stream:
        for words in chain.from_iterable(random.sample(text, len(text)) for _ in range(READINGS)):
            given, sentence, end = [], [], 0
            for i, j in cut(words, random):
                given.append(phrase(phrases, random))
                last = words[j - 1]
                sentence += [*words[end:i], given[-1] + last[len(last.rstrip(EDGES)) :]]
                end = j
            random.shuffle(given)
            context = "".join(f"{p} | " if n % 3 == 2 else f"{p} : " for n, p in enumerate(given))[:-3]
            stream.write(json.dumps({"text": f" {context}\n {' '.join(sentence + words[end:])}"}) + "\n")


def pairs(dart: Path, text: list[list[str]], out: Path) -> None:
    """Writes DART's dev triples for training, EXCHANGES times, and a tenth held out, as JSONL.

    In the training part, subjects and objects that the reference names are exchanged most of the time, on both sides,
    for those of other entries or for phrases of the text. Of the pairs that DART has from E2E, one in ten is taken:
    they are two thirds of this split, know few names, and E2E is a task of its own.
    """
    random = Random(0)
    entries = json.loads(dart.read_text())
    names = [name for entry in entries for s, _, o in entry["tripleset"] for name in (s, o) if not name.startswith("[")]
    names += [" ".join(words[i:j]).strip(EDGES) for words in random.sample(text, 8000) for i, j in cut(words, random)]
    with (out / "dart-train.jsonl").open("w") as train, (out / "dart-held-out.jsonl").open("w") as held_out:
        for n, entry in enumerate(entries):
            held = n % 10 == 9
            for note in entry["annotations"]:
                if note["source"] == "e2e" and random.random() < 0.9:
                    continue
                for _ in range(1 if held else EXCHANGES[note["source"].startswith("Wiki")]):
                    triples, answer = entry["tripleset"], note["text"].strip()
                    if not held:
                        triples, answer = exchanged(triples, answer, names, random)
                    context = " | ".join(f"{s} : {r.lower()} : {o}" for s, r, o in triples)
                    (held_out if held else train).write(
                        json.dumps({"context": f" {context}", "completion": answer}) + "\n"
                    )


def exchanged(triples: list[list[str]], answer: str, names: list[str], random: Random) -> tuple[list[list[str]], str]:
    """Triples and their text with other names in both."""
    own = {name for s, _, o in triples for name in (s, o)}
    new = {}
    for name in sorted(own, key=lambda name: (-len(name), name)):  # longest first; a set's order is chance
        where = r"(?<!\w)" + re.escape(name.strip('"')) + r"(?!\w)"
        if re.search(where, answer, re.IGNORECASE) and random.random() < 0.7:
            answer = re.sub(where, f"\0{len(new)}\0", answer, flags=re.IGNORECASE)  # so that it is not found in another
            new[name] = phrase(names, random)
    fresh = list(new.values())
    answer = re.sub("\0(\\d+)\0", lambda found: fresh[int(found[1])], answer)
    return [[new.get(s, s), r, new.get(o, o)] for s, r, o in triples], answer


def pretrain(data: Path, out: Path) -> dict[str, Any]:
    settings = out / "pretrain.yaml"
    settings.write_text(PRETRAIN)
    corpus = out / "documents.jsonl"
    documents(sentences(data / "text"), corpus)
    resume = ["--resume"] if (out / "pretrain" / "config.yaml").exists() else []
    summary = vspdf("train", settings, f"data.corpus={corpus}", f"run_dir={out / 'pretrain'}", *resume)
    keys = ("model", "corpus", "phases", "flops", "val_loss", "val_bits_per_byte", "hardware", "versions")
    return {"work_seconds": summary["seconds"], **{key: summary[key] for key in keys}}


def convert(out: Path) -> dict[str, Any]:
    """To Hugging Face and back; logits of all three on held-out-like text."""
    import torch
    from transformers import AutoModelForCausalLM

    from vspdf.interop import checkpoints

    for source, target in (("pretrain", "hugging-face"), ("hugging-face", "back")):
        if not (out / target).exists():
            vspdf("convert", out / source, out / target)
    ours, back = checkpoints.load(out / "pretrain").model.eval(), checkpoints.load(out / "back").model.eval()
    theirs = AutoModelForCausalLM.from_pretrained(out / "hugging-face").eval()
    tokens = torch.randint(
        ours.shape.vocab_size, (4, ours.shape.sequence_length), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        exact = ours(tokens)
        return {
            "largest_logit": float(exact.abs().max()),
            "difference_to_transformers": float((theirs(tokens).logits - exact).abs().max()),
            "difference_after_the_way_back": float((back(tokens) - exact).abs().max()),
        }


def finetune(data: Path, out: Path) -> dict[str, Any]:
    resume = ["--resume"] if (out / "dart" / "config.yaml").exists() else []
    pairs(data / "dart" / "dart-v1.1.1-full-dev.json", sentences(data / "text"), out)
    paths = [f"data.path={out / 'dart-train.jsonl'}", f"data.validation_path={out / 'dart-held-out.jsonl'}"]
    summary = vspdf("finetune", out / "back", "dart-small", *paths, f"run_dir={out / 'dart'}", *FINETUNE, *resume)
    lines = [json.loads(line) for line in (out / "dart" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    keys = ("tokens", "val_loss", "val_bits_per_byte", "flops")
    result = {"work_seconds": summary["seconds"], **{key: summary[key] for key in keys}}
    return {**result, "steps": summary["phases"][0]["steps"], "val_losses": losses}


def contexts(examples: list[Any], target: Path) -> None:
    """Writes one a line, after a space as in training: a name has the same tokens there as in an answer."""
    target.write_text("".join(f" {example.context.strip()}\n" for example in examples))


def generate(data: Path, out: Path, start: str, answers: str, *how: object) -> dict[str, Any]:
    from vspdf.data import tasks

    test = data / "dart" / "dart-v1.1.1-full-test.xml"
    contexts(tasks.read(test, lower_relations=True)[:TEST_ITEMS], out / "test.txt")
    body = answer(out, start, "test.txt", answers, *how)
    return {key: body[key] for key in ("answers", "tokens", "decoding")}


def answer(out: Path, start: str, questions: str, answers: str, *how: object) -> dict[str, Any]:
    (out / answers).unlink(missing_ok=True)
    common = ["--format", "lines", "--tokens", ANSWER_TOKENS, "--overlong", "cut", *how]
    return vspdf("generate", out / start, "--input", out / questions, "--output", out / answers, *common)


def length_penalty(out: Path) -> dict[str, Any]:
    """The one whose answers to held-out triples score best."""
    from vspdf.data import tasks
    from vspdf.evaluate.bleu import corpus_bleu

    held_out = tasks.read(out / "dart-held-out.jsonl")[:TEST_ITEMS]
    contexts(held_out, out / "held-out.txt")
    scores = {}
    for penalty in LENGTH_PENALTIES:
        answer(out, "dart", "held-out.txt", "held-out-answers.txt", "--length-penalty", penalty)
        answers = tasks.read_lines(out / "held-out-answers.txt")
        scores[str(penalty)] = corpus_bleu(answers, [example.references for example in held_out], "lora").bleu
    return {"bleu": scores, "best": max(scores, key=lambda penalty: scores[penalty])}


def score(data: Path, out: Path) -> dict[str, Any]:
    """BLEU of the answers, and of two ways to copy the triples."""
    from vspdf.data import tasks
    from vspdf.evaluate.bleu import corpus_bleu

    examples = tasks.read(data / "dart" / "dart-v1.1.1-full-test.xml")[:TEST_ITEMS]
    contexts = [example.context for example in examples]
    words = [
        re.sub(r"\[TABLECONTEXT\]|\[TITLE\]|_", " ", text).replace(" : ", " ").replace(" | ", " . ")
        for text in contexts
    ]
    texts = {
        "triples copied": contexts,
        "triples copied, separators and table marks taken out": words,
        "before fine-tuning": tasks.read_lines(out / "before.txt"),
        "after fine-tuning": tasks.read_lines(out / "after.txt"),
    }
    references = [example.references for example in examples]
    result: dict[str, Any] = {"references": sum(map(len, references))}
    for name, answers in texts.items():
        result[name] = {p: corpus_bleu(answers, references, p).to_json() for p in ("lora", "multi-bleu")}
    own = result["after fine-tuning"]["lora"]["bleu"]
    result["beats"] = [name for name in texts if own > result[name]["lora"]["bleu"]]
    result["examples"] = [
        {"context": contexts[i], "answer": texts["after fine-tuning"][i], "reference": references[i][0]}
        for i in range(0, TEST_ITEMS, TEST_ITEMS // 8)
    ]
    return result


def table(done: dict[str, Any]) -> str:
    pre, tuned, length, bleu = done["pretrain"], done["finetune"], done["length"], done["bleu"]
    model, versions, hardware = pre["model"], pre["versions"], pre["hardware"]
    saved = 1 - pre["flops"]["executed"] / pre["flops"]["dense"]
    steps = ", ".join(f"{p['steps']} steps {p['name']} (validation {p['val_loss']:.3f})" for p in pre["phases"])
    there, back = (done["convert"][f"difference_{way}"] for way in ("to_transformers", "after_the_way_back"))
    decoding = f"{done['after']['tokens'] / TEST_ITEMS:.1f} tokens an answer, beam search of 10"
    losses = f"held-out loss {tuned['val_losses'][0]:.3f} -> {tuned['val_loss']:.3f}"
    results = {
        "pretrain": f"{model['parameters'] / 1e6:.1f}M parameters; {steps}; {saved:.1%} of FLOPs skipped",
        "convert": f"to Hugging Face and back: logits differ by at most {there:.1e} (transformers), {back:.1e} (back)",
        "before": f"the first {TEST_ITEMS} of the test set",
        "finetune": f"{tuned['steps']} steps, {tuned['tokens']:,} tokens; {losses}",
        "length": f"penalty {length['best']}, chosen on held-out triples: BLEU "
        + ", ".join(f"{bleu:.1f} at {penalty}" for penalty, bleu in length["bleu"].items()),
        "after": f"the first {TEST_ITEMS} of the test set, {decoding}",
    }
    rows = [("stage", "seconds", "result"), ("---", "---:", "---")]
    rows += [(name, f"{done[name]['seconds']:.0f}", result) for name, result in results.items()]
    rows.append(("all", f"{sum(stage['seconds'] for stage in done.values()):.0f}", ""))
    scores = [("BLEU", "LoRA protocol", "multi-bleu, case kept"), ("---", "---:", "---:")]
    names = [name for name in bleu if isinstance(bleu[name], dict) and "lora" in bleu[name]]
    scores += [(name, *(f"{bleu[name][p]['bleu']:.2f}" for p in ("lora", "multi-bleu"))) for name in names]
    note = (
        f"{hardware['cpu']}, {hardware['threads']} threads; Python {versions['python']}, torch {versions['torch']}, "
        f"vspdf {versions['vspdf']}. Not comparable with published scores: dev triples in place of the training split, "
        f"{TEST_ITEMS} of 5,097 test items, a model of some million parameters."
    )
    tables = ["\n".join("| " + " | ".join(row) + " |" for row in part) for part in (rows, scores)]
    shown = [f"    {x['context']}\n    -> {x['answer']}\n    (reference: {x['reference']})" for x in bleu["examples"]]
    return "\n\n".join([*tables, note, "Examples:", *shown]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with text/ and dart/")
    parser.add_argument("--out", type=Path, default=Path("runs/lifecycle"))
    parser.add_argument(
        "--until", help="stop after this stage: pretrain, convert, before, finetune, length, after or bleu"
    )
    options = parser.parse_args()
    for needed in ("text", "dart/dart-v1.1.1-full-dev.json", "dart/dart-v1.1.1-full-test.xml"):
        if not (options.data / needed).exists():
            parser.error(f"'{options.data / needed}' not found")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stages = Stages(options.out, options.until)
    data, out = options.data, options.out
    stages.run("pretrain", lambda: pretrain(data, out))
    stages.run("convert", lambda: convert(out))
    stages.run("before", lambda: generate(data, out, "back", "before.txt"))
    stages.run("finetune", lambda: finetune(data, out))
    best = stages.run("length", lambda: length_penalty(out))["best"]
    stages.run("after", lambda: generate(data, out, "dart", "after.txt", "--length-penalty", best))
    stages.run("bleu", lambda: score(data, out))
    text = table(stages.done)
    (out / "lifecycle.md").write_text(text)
    print(text)
    if not {"triples copied", "before fine-tuning"} <= set(stages.done["bleu"]["beats"]):
        sys.exit("the fine-tuned model does not beat both copying the triples and the model before fine-tuning.")


if __name__ == "__main__":
    main()
