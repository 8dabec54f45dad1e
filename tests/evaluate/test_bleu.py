"""BLEU against hand-computed values and against a small independent multi-bleu."""

import json
import math
import random
from collections import Counter

import pytest

from vspdf.errors import UserError
from vspdf.evaluate.bleu import PROTOCOLS, corpus_bleu, read_references


def multi_bleu(hypotheses, references):
    """Moses' multi-bleu from its definition: clipped n-grams, closest reference, an empty line has no words."""
    correct, total, hyp_length, ref_length = [0] * 4, [0] * 4, 0, 0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words = [w for w in hypothesis.replace("\t", " ").split(" ") if w]
        split = [[w for w in text.replace("\t", " ").split(" ") if w] for text in texts]
        hyp_length += len(words)
        best = None
        for reference in split:
            key = (abs(len(reference) - len(words)), len(reference))
            best = key if best is None or key < best else best
        ref_length += best[1]
        for n in range(1, 5):
            grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            limit = Counter()
            for reference in split:
                limit |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
            correct[n - 1] += sum((grams & limit).values())
            total[n - 1] += sum(grams.values())
    if not all(correct):
        return 0.0
    penalty = 1.0 if hyp_length >= ref_length else math.exp(1 - ref_length / hyp_length)
    return 100 * penalty * math.exp(sum(math.log(c / t) for c, t in zip(correct, total, strict=True)) / 4)


def test_by_hand():
    # 1-grams 5 of 6 (the second "the" is clipped), 2-grams 3 of 5, 3-grams 2 of 4, 4-grams 1 of 3.
    score = corpus_bleu(["the cat sat on the mat"], [["The cat sat on a mat", "a cat sat on the dog today there"]])
    assert score.precisions == pytest.approx([500 / 6, 60, 50, 100 / 3])
    assert (score.hypothesis_length, score.reference_length, score.brevity_penalty) == (6, 6, 1)
    assert score.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_brevity_penalty_takes_the_closest_reference_and_the_shorter_of_two():
    references = ["a b c d e f g h", "a b c", "a b c d e f g"]
    score = corpus_bleu(["a b c d e"], [references])
    assert score.reference_length == 3 and score.brevity_penalty == 1
    assert corpus_bleu(["a b c d e"], [["a b c d e f g", "a b c", ""]]).reference_length == 3
    assert corpus_bleu(["a"], [["a b c", ""]]).reference_length == 0
    score = corpus_bleu(["a b c d e"], [["a b c d e f g h", "a b c d e f g"]])
    assert score.brevity_penalty == pytest.approx(math.exp(1 - 7 / 5))
    assert score.bleu == pytest.approx(100 * math.exp(1 - 7 / 5))


def corpus(seed, rows, empty=0.3):
    rng = random.Random(seed)
    text = lambda low: " ".join(rng.choices([*"abc.,", "The", "the", "dog", "runs,", "3.5"], k=rng.randint(low, 14)))  # noqa: E731
    hypotheses = [text(0) for _ in range(rows)]
    return hypotheses, [[text(1) if rng.random() > empty else "" for _ in range(3)] for _ in range(rows)]


@pytest.mark.parametrize("seed", range(6))
def test_equals_multi_bleu(seed):
    """Missing references, hypotheses without any, empty hypotheses: to the digits that floats have."""
    hypotheses, references = corpus(seed, rows=1 + 8 * seed * seed)
    if seed == 0:
        hypotheses, references = ["the dog runs, a b c"], [["the dog runs, a b", "", ""]]
    score = corpus_bleu(hypotheses, references)
    assert score.bleu == pytest.approx(multi_bleu(hypotheses, references), abs=1e-9)
    kept = [(h, [t for t in r if t]) for h, r in zip(hypotheses, references, strict=True) if any(r)]
    assert score.bleu_without_missing == pytest.approx(multi_bleu(*zip(*kept, strict=True)), abs=1e-9)


def test_only_ascii_white_space_splits():
    hypothesis = "1\u00a0000 km of\u2028road or so\x85 it is\x1fsaid"
    assert corpus_bleu([hypothesis], [[hypothesis.replace("\u00a0", " ")]]).bleu < 100
    assert corpus_bleu([hypothesis], [[hypothesis]]).hypothesis_length == 7
    assert corpus_bleu(["a b\tc  d"], [[" a\tb c d\r"]]).bleu == pytest.approx(100)


def test_nothing_matches():
    assert corpus_bleu(["a b c d e"], [["v w x y z"]]).bleu == 0
    assert corpus_bleu(["", ""], [["v w"], ["x"]]).bleu == 0


def test_lora_protocol():
    """Lower case, single signs as tokens, the first six references only."""
    references = ["Jeff Daniels played, in (1982) 3.5 films."]
    score = corpus_bleu(["jeff daniels played , in ( 1982 ) 3 . 5 films ."], [references], "lora")
    assert score.bleu == pytest.approx(100) and score.hypothesis_length == 13 and score.references[-1] == 1
    seven = [f"nothing of the kind {i}" for i in range(6)] + references
    assert corpus_bleu(["jeff daniels played"], [seven], "lora").bleu == 0
    assert corpus_bleu(["it's snake_case"], [["it ' s snake_case x"]], "lora").hypothesis_length == 4


def test_mteval():
    """Case does not count; 13a splits signs off words but leaves numbers whole; orders without a match are smoothed."""
    score = corpus_bleu(
        ["The pub, near Zizzi, costs 3.50 pounds."], [["the Pub , near zizzi , costs 3.50 pounds ."]], "mteval-13a"
    )
    assert score.bleu == pytest.approx(100) and score.hypothesis_length == 10
    smoothed = corpus_bleu(["a b c d"], [["a x c d"]], "mteval-13a")
    assert smoothed.precisions == pytest.approx([75, 100 / 3, 25, 25])  # 0 of 2 counts as 1/2, 0 of 1 as 1/4


@pytest.mark.parametrize(
    ("hypotheses", "references", "protocol", "message"),
    [
        (["a"], [["a"], ["b"]], "multi-bleu", "1 hypotheses, but references for 2"),
        ([], [], "multi-bleu", "no hypothesis"),
        (["a"], [["", " "]], "multi-bleu", "hypothesis 1 has no reference"),
        (["a", "b"], [["a"], []], "lora", "hypothesis 2 has no reference"),
        (["a"], [["a"]], "multi", "protocol 'multi' is not known. Did you mean 'multi-bleu'"),
    ],
    ids=["counts", "nothing", "no reference", "no reference for one", "protocol"],
)
def test_what_cannot_be_scored(hypotheses, references, protocol, message):
    with pytest.raises(UserError, match=message):
        corpus_bleu(hypotheses, references, protocol)


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_files_of_the_command(tmp_path, vspdf):
    hypotheses = write(tmp_path / "h.txt", ["the dog runs here today", "a cat sits there now ."])
    first = write(tmp_path / "r0", ["the dog runs here now", "a cat sits there ."])
    second = write(tmp_path / "r1", ["", "a cat sat there now ."])
    status, out, _ = vspdf("bleu", hypotheses, first, second, "--json")
    expected = multi_bleu(
        ["the dog runs here today", "a cat sits there now ."],
        [["the dog runs here now", ""], ["a cat sits there .", "a cat sat there now ."]],
    )
    body = json.loads(out)
    assert status == 0 and body["bleu"] == pytest.approx(expected)
    assert {"precisions", "brevity_penalty", "hypothesis_length", "reference_length"} <= set(body)
    status, out, _ = vspdf("bleu", hypotheses, first, second)
    assert status == 0 and out.startswith(f"BLEU = {expected:.2f}, ")


def test_wrong_line_counts_are_one_line(tmp_path, vspdf):
    hypotheses = write(tmp_path / "h.txt", ["a", "b"])
    short = write(tmp_path / "r0", ["a"])
    status, out, err = vspdf("bleu", hypotheses, short, short)
    assert (status, out) == (2, "")
    assert err.strip() == f"vspdf: error: '{short}' has 1 lines, the hypotheses have 2: expected as many."
    status, _, err = vspdf("bleu", hypotheses, tmp_path / "r1")
    assert status == 2 and "not found" in err


def test_references_in_groups_and_in_task_files(tmp_path):
    grouped = write(tmp_path / "e2e.txt", ["one", "two", "", "three", "", ""])
    assert read_references([grouped], 2) == [["one", "two"], ["three"]]
    lines = write(tmp_path / "pairs.jsonl", [json.dumps({"context": c, "completion": c * 2}) for c in "aab"])
    assert read_references([lines, write(tmp_path / "r", ["x", "y"])], 2) == [["aa", "aa", "x"], ["bb", "y"]]


ANSWERS = ["the dog runs here today", "a cat sits there now ."]
OBJECTS = [json.dumps({"context": f"c{i}", "completion": text}) for i, text in enumerate(ANSWERS)]
BARS = [f"c{i}||{text}" for i, text in enumerate(ANSWERS)]
TASK_FILES = {
    "r.jsonl": OBJECTS, "r.ndjson": OBJECTS, "e2e.txt": BARS, "bars": [*BARS, ""],
    "r.csv": ["mr,ref", *(f"name[{i}],{text}" for i, text in enumerate(ANSWERS))],
    "r.json": [json.dumps([{"tripleset": [["a", "b", "c"]], "annotations": [{"text": t}]} for t in ANSWERS])],
}  # fmt: skip


@pytest.mark.parametrize("name, lines", TASK_FILES.items(), ids=TASK_FILES)
def test_a_task_file_is_known_by_its_ending_or_its_bars(tmp_path, vspdf, name, lines):
    status, out, err = vspdf("bleu", write(tmp_path / "h.txt", ANSWERS), write(tmp_path / name, lines), "--json")
    assert status == 0 and json.loads(out)["bleu"] == pytest.approx(100), err


def test_lines_of_code_stay_lines(tmp_path):
    lines = ["if a || b:", "return"]
    assert read_references([write(tmp_path / "r.txt", lines)], 2) == [[line] for line in lines]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_score_is_above_a_hundred(protocol):
    """The root of the product of four times 100 % is 100.00000000000004 in sacrebleu."""
    lines = ["the cat sat on the mat today", "a second line that is the same"]
    score = corpus_bleu(lines, [[line] for line in lines], protocol)
    assert score.bleu == score.bleu_without_missing == pytest.approx(100, abs=1e-9) and score.bleu <= 100
    assert max(score.precisions) <= 100
