"""Every option of every verb moves something or is refused: a table with a case for each, checked against the verbs."""

import pytest
import typer

from vspdf.cli import app

ONES = "--shapes 8x16x16 --sparsity 0.5 --rounds 1 --threads 1 --no-peers"
MASKS = "--rounds 1 --threads 1 --no-peers"
SMALL_STEP = (
    "--n-layer 1 --d-model 16 --n-head 2 --sequence-length 8 --batch-size 1 --sparsity 0.5 --rounds 1 --threads 1"
)
SPMM = "--format coo --grid 4x4 --n 8 --k 8 --m 8 --density 50"
SQUARE = "--grid 4x4 --n 16"
LINE = "--pes 8 --elements 16 --group 4"
LAYER = "--tokens 64 --in 64 --out 64"
MACHINE = {"--machine": "--machine {machine}", "--set": "--set alu_cycles=3 --set hop_cycles=9"}
PICTURES = {"--trace": "--trace t.json", "--plot": "--plot p.html"}
AGGREGATE = {"--level": "--level aggregate"}

# verb: (arguments, {option: what is added to them; or (other arguments, what is added to these)})
CASES = {
    "train": ("{config}", {"--resume": "--resume"}),
    "finetune": ("{run} {tuning} data.path={pairs} run_dir=run", {"--resume": "--resume"}),
    "eval": (
        "{run}",
        {
            "--tasks": ("{run} --task-folder {tasks}", "--tasks own"),
            "--text": "--text {text}",
            "--task-folder": ("{run} --tasks own", "--task-folder {tasks}"),
            "--few-shot": ("{run} --tasks own --task-folder {tasks}", "--few-shot 1"),
            "--limit": ("{run} --tasks own --task-folder {tasks}", "--limit 1"),
            "--batch-size": "--batch-size 1",
            "--device": "--device cuda:99",
        },
    ),
    "report": ("{run}", {"--output": "--output mine.html"}),
    "generate": (
        "{run} --tokens 8",
        {
            "--prompt": "--prompt water",
            "--input": "--input {lines}",
            "--output": ("{run} --tokens 4 --input {lines}", "--output answers.txt"),
            "--format": ("{run} --tokens 4 --input {lines}", "--format jsonl"),
            "--limit": ("{run} --tokens 4 --input {lines}", "--limit 1"),
            "--tokens": "--tokens 3",
            "--beams": "--beams 3",
            "--length-penalty": ("{tuned} --prompt x --beams 4 --tokens 8", "--length-penalty 9"),
            "--no-repeat-ngram": ("{run} --beams 2 --tokens 16 --prompt x", "--no-repeat-ngram 1"),
            "--temperature": "--temperature 0",
            "--overlong": ("{run} --beams 2 --tokens 16 --prompt xxxxxxxxxxxxxxxxxxxxxxxxx", "--overlong cut"),
            "--batch-size": ("{run} --tokens 4 --input {same}", "--batch-size 1"),
            "--seed": "--seed 1",
            "--device": "--device cuda:99",
        },
    ),
    "bleu": ("{lines} {references}", {"--protocol": "--protocol mteval-13a"}),
    "compare": (
        "{study} --minutes 0",
        {
            "--runs": "--runs elsewhere",
            "--jobs": "--jobs 3",
            "--minutes": ("toy --results", "--minutes 1"),
            "--arms": "--arms dens",
            "--add-to": "--add-to {study}",
            "--results": ("{study} --minutes 0", "--results"),
            "--plot": ("toy --results", "--plot p.svg"),
        },
    ),
    "validate": (
        "--case V1",
        {
            "--case": "--case V6",
            "--machine": ("--case V6", "--machine {machine}"),
            "--set": ("--case V6", "--set alu_cycles=2"),
            "--level": ("--case V6", "--level aggregate"),
        },
    ),
    "convert": (
        "{run} out",
        {"--to": "--to dense", "--tokenizer": ("{wordless} out", "--tokenizer {run}/tokenizer.json")},
    ),
    "plan": (
        "--model gpt2-small",
        {
            "--model": "--model gpt3-xl",
            "--sparsity": "--sparsity 0.5",
            "--effective": "--effective 0.5",
            "--split": ("--model gpt2-small --effective 0.5", "--split fixed-budget"),
            "--phases": "--phases 0.9:100,0:10",
            "--steps": "--steps 1000",
            "--batch-size": "--batch-size 7",
            "--sequence": "--sequence 512",
            "--convention": "--convention spdf",
            "--causal": "--causal",
            "--save": "--save 0.3",
            "--memory": "--memory 1.5",
            "--hours": ("--model {config}", "--hours 1"),
            "--time": ("--model {config}", "--time"),
            "--machines": ("--model {config}", "--machines 2"),
            "--network": ("--model {config} --machines 2", "--network 1"),
            "--write": "--write mine.yaml",
        },
    ),
    "info": ("", {}),
    "simulate layer": (
        LAYER,
        {
            "--tokens": "--tokens 99",
            "--in": "--in 128",
            "--out": "--out 128",
            "--sparsity": "--sparsity 0.5",
            "--run": ("--layer h.0.mlp.c_fc", "--run {run}"),
            "--mask": (LAYER, "--mask {mask}"),
            "--layer": ("--run {run} --layer h.0.mlp.c_fc", "--layer h.0.attn.c_proj"),
            "--plot": "--plot p.png",
            **MACHINE,
            "--level": "--level event",
        },
    ),
    "simulate step": (
        "--model gpt2-small --batch 8",
        {
            "--model": "--model gpt3-xl",
            "--run": ("", "--run {run}"),
            "--batch": "--batch 9",
            "--sequence": "--sequence 512",
            "--systems": "--systems 2",
            "--sparsity": "--sparsity 0.5",
            "--tokens": "--tokens 1e9",
            "--sweep": "--sweep batch=8,16",
            "--plot": ("--model gpt2-small --batch 8 --sweep batch=8,16", "--plot p.png"),
            **MACHINE,
            "--level": "--level event",
            "--details": "--details",
        },
    ),
    "simulate scale": (
        "--model gpt2-small --batch 16 --systems 1,2",
        {
            "--model": "--model gpt3-xl",
            "--run": ("", "--run {run} --systems 1,2"),
            "--systems": "--systems 1,4",
            "--batch": "--batch 32",
            "--weak": "--weak",
            "--sequence": "--sequence 512",
            "--sparsity": "--sparsity 0.5",
            "--plot": "--plot p.png",
            **MACHINE,
        },
    ),
    "simulate machines": ("", {}),
    "simulate spmm": (
        SPMM,
        {
            "--format": "--format csr",
            "--grid": "--grid 2x4",
            "--n": "--n 16",
            "--k": "--k 16",
            "--m": "--m 9",
            "--density": "--density 90",
            "--nnz-per-pe": "--nnz-per-pe 4",
            "--seed": "--seed 7",
            **PICTURES,
            **MACHINE,
            **AGGREGATE,
        },
    ),
    "simulate gemm": (
        SQUARE,
        {
            "--grid": "--grid 2x2",
            "--n": "--n 20",
            "--algorithm": "--algorithm summa",
            "--dtype": "--dtype fp16",
            "--seed": "--seed 7",
            **PICTURES,
            **MACHINE,
            **AGGREGATE,
        },
    ),
    "simulate gemv": (
        SQUARE,
        {
            "--grid": "--grid 2x2",
            "--n": "--n 20",
            "--algorithm": "--algorithm summa",
            "--dtype": "--dtype fp32",
            "--seed": "--seed 7",
            **PICTURES,
            **MACHINE,
            **AGGREGATE,
        },
    ),
    "simulate reduce": (
        LINE,
        {
            "--pes": "--pes 12",
            "--elements": "--elements 20",
            "--group": "--group 2",
            "--everywhere": "--everywhere",
            **PICTURES,
            **MACHINE,
            **AGGREGATE,
        },
    ),
    "bench linear": (
        ONES,
        {
            "--shapes": "--shapes 8x16x32",
            "--sparsity": "--sparsity 0.9",
            "--threads": "--threads 2",
            "--rounds": "--rounds 2",
            "--seconds": (ONES.replace("--rounds 1", ""), "--seconds 0"),
            "--peers": "--peers",
            "--candidate": "--candidate vspdf.kernels.reference:Nothing",
            "--dtype": "--dtype bfloat16",
            "--mask": "--mask {mask}",
            "--tokens": (f"{MASKS} --mask {{mask}} --tokens 8", "--tokens 9"),
            "--pattern": "--pattern banded",
            "--compare": "--compare {study}",
            "--roofline": "--roofline",
            "--list": "--list",
            "--csv": "--csv rows.csv",
            "--plot": "--plot p.svg",
            "--device": "--device tpu",
            "--tune": "--tune",
        },
    ),
    "bench update": (
        "--shape 64x16x16 --sparsity 0.5 --rounds 1 --threads 1",
        {
            "--shape": "--shape 64x32x16",
            "--sparsity": "--sparsity 0.9",
            "--drop-fraction": "--drop-fraction 0.1",
            "--threads": "--threads 2",
            "--rounds": "--rounds 2",
            "--csv": "--csv rows.csv",
        },
    ),
    "bench decode": (
        "--model {run} --sparsity 0.5 --rounds 1 --tokens 1 --context 4",
        {
            "--model": "--model llama-tiny",
            "--sparsity": "--sparsity 0.9",
            "--dtype": "--dtype float32",
            "--batch-size": "--batch-size 2",
            "--context": "--context 5",
            "--tokens": "--tokens 2",
            "--threads": "--threads 2",
            "--rounds": "--rounds 2",
            "--csv": "--csv rows.csv",
        },
    ),
    "bench step": (
        SMALL_STEP,
        {
            "--n-layer": "--n-layer 2",
            "--d-model": "--d-model 32",
            "--n-head": "--n-head 1",
            "--sequence-length": "--sequence-length 9",
            "--batch-size": "--batch-size 2",
            "--sparsity": "--sparsity 0.9",
            "--threads": "--threads 2",
            "--rounds": "--rounds 2",
            "--seconds": (SMALL_STEP.replace("--rounds 1", "--seconds 0"), "--seconds 1"),
            "--dtype": "--dtype bfloat16",
            "--compile": "--compile",
            "--compare": "--compare {study}",
            "--csv": "--csv rows.csv",
        },
    ),
    "bench suite": (
        "--tiny --sections memory",
        {
            "--output": "--output there",
            "--name": "--name mine",
            "--sections": ("--tiny --sections memory", "--sections plans"),
            "--tiny": ("--sections roofline", "--tiny"),
        },
    ),
}

# Options that would change nothing beside others: (arguments, what is said).
REFUSED = {
    "dense stores all": ("simulate spmm --format dense --grid 4x4 --n 8 --k 8 --m 8 --density 5", "--density is for"),
    "dense pads nothing": ("simulate spmm --format dense --grid 4x4 --n 8 --k 8 --m 8 --nnz-per-pe 2", "--nnz-per-pe"),
    "more than stored": ("simulate spmm --format coo --grid 4x4 --n 8 --k 8 --m 8 --nnz-per-pe 2", "has 4 non-zeros"),
    "values unseen": (f"simulate gemm {SQUARE} --level aggregate --seed 1", "--seed draws the values that the event"),
    "a run's own mask": ("simulate layer --run {run} --layer h.0.mlp.c_fc --sparsity 0.5", "leave --sparsity away"),
    "a run's own size": ("simulate layer --run {run} --layer h.0.mlp.c_fc --in 3", "leave --in away"),
    "no run": (f"simulate layer {LAYER} --layer h.0.mlp.c_fc", "--layer is one of a --run or of a --mask file"),
    "no tasks": ("eval {run} --limit 3", "--limit goes with --tasks"),
    "no input": ("generate {run} --batch-size 3", "--batch-size goes with --input"),
    "two prompts": ("generate {run} --input {lines} --prompt x", "--prompt is not read beside --input"),
    "no beams": ("generate {run} --length-penalty 1", "--length-penalty is for beam search"),
    "beams draw nothing": ("generate {run} --beams 2 --tokens 4 --seed 1", "--seed is for sampling"),
    "greedy draws nothing": ("generate {run} --temperature 0 --seed 1", "--seed is for sampling"),
    "nothing is run": ("compare toy --results --jobs 2", "--jobs is for running"),
    "nothing is added": ("compare toy --results --add-to results.json", "--add-to is for running"),
    "one stage": ("plan --model gpt2-small --sparsity 0.5 --split add-on", "there is one stage"),
    "own stages": ("plan --model quickstart --split add-on", "there is one stage"),
    "a file has no words": ("convert {text} x.pt --tokenizer {run}/tokenizer.json", "leave --tokenizer away"),
    "no such precision here": (f"bench linear {ONES} --dtype fp16", "on a CPU float32 and bfloat16 are timed"),
}  # fmt: skip


def verbs(group=None, path=()):
    for name, command in (group or typer.main.get_command(app.app)).commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


OPTIONS = {verb: [p.opts[0] for p in command.params if p.opts[0].startswith("--")] for verb, command in verbs()}


def rows():
    for verb, (_, options) in CASES.items():
        for option in options:
            yield verb, option


def test_every_option_has_a_case():
    assert {verb: sorted(options) for verb, options in OPTIONS.items()} == {
        verb: sorted([*options, *(["--json"] if "--json" in OPTIONS.get(verb, ()) else [])])
        for verb, (_, options) in CASES.items()
    }


@pytest.mark.parametrize("verb, option", list(rows()), ids=lambda word: word)
def test_an_option_moves_something(observe, verb, option):
    usual, options = CASES[verb]
    case = options[option]
    arguments, added = (usual, case) if isinstance(case, str) else case
    if "--tasks" in f"{arguments} {added}":
        pytest.importorskip("lm_eval")
    before = arguments if option == "--resume" else None
    plain = " --json" if "--json" in OPTIONS[verb] else ""
    first = observe(verb, arguments + plain, before)
    second = observe(verb, f"{arguments} {added}{plain}", before)
    assert first != second, f"{option} changes nothing: {first}"
    assert first[0] == 0 or second[0] == 0, f"refused with and without it: {first[4]} {second[4]}"


@pytest.mark.parametrize("verb", [verb for verb, options in OPTIONS.items() if "--json" in options])
def test_json_is_one_object(observe, verb):
    arguments = CASES[verb][0]
    status, out, *_ = observe(verb, f"{arguments} --json")
    assert status == 0 and isinstance(out, dict)
    assert not isinstance(observe(verb, arguments)[1], dict)


@pytest.mark.parametrize("arguments, said", REFUSED.values(), ids=REFUSED)
def test_what_would_change_nothing_is_refused(observe, arguments, said):
    words = arguments.split()
    verb = " ".join(words[: 2 if words[0] in ("simulate", "bench") else 1])
    status, _, left, _, last = observe(verb, arguments.removeprefix(verb))
    assert status == 2 and said in last[0] and not left
