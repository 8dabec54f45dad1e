"""Which model to train in a given time on this machine, dense or sparse: by laws that were measured, with their doubts.

What losses to expect is `vspdf.plan.law`'s; seconds come from blocks that are timed here.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vspdf.bench.calibrate import Calibration, calibrate, precisions
from vspdf.errors import UserError
from vspdf.plan import law
from vspdf.shapes import Shape

_ERROR = 0.03  # of the loss: d = 256 in four layers, which took no part in the fit, ended 3 % above it
_KNOWN = ((2.4e4, 1.6e6), (1.6e6, 2.2e7))  # weights and bytes between which models were measured
_WIDTHS = (48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
_TIMED = (64, 192, 512)  # widths of which a block is timed; others lie between, or beyond
_TOKENS, _LENGTH, _VOCABULARY = 1024, 128, 257
_SPARSITY = 0.75
_SEQUENCES = _TOKENS // _LENGTH  # a step
_LAST_RATE = 1e-4
_PASSES, _AGREE = 5, 1.05  # over all blocks, at most; two in which each takes as long, up to this, are enough

_Pace = Callable[[Shape, float], float]  # of a shape at a sparsity


class _Stage(NamedTuple):
    """Steps of one sparsity, and how they learn."""

    sparsity: float
    share: float  # of the steps
    rate: float  # peak learning rate, times the width
    end: float | None = None  # the last, times the width; None: `_LAST_RATE`


# As studies had it: rates are those that they chose ("frontier-256", "same-size"), or took ("multiplier").
_STAGES = {
    "dense": (_Stage(0.0, 1.0, 0.32),),
    "static": (_Stage(_SPARSITY, 1.0, 0.41),),
    "set": (_Stage(_SPARSITY, 1.0, 0.41),),
    "set-then-dense": (_Stage(_SPARSITY, 1 - law.DENSE_SHARE, 0.54, 0.13), _Stage(0.0, law.DENSE_SHARE, 0.19)),
}


@dataclass(frozen=True)
class Advice:
    """A model, and the loss to expect of it.

    Attributes
    ----------
    shape : Shape
    sparsity : float
        At first.
    method : str
        "dense", or one of `vspdf.plan.law.METHODS`: "static", "set" or "set-then-dense".
    precision : str
        "fp32" or "bf16", of `train.precision`.
    expected_loss, low, high : float
        Nats a byte on text like the standard library's, and between which the laws leave it.
    steps : int
        Of 8 sequences of 128 bytes.
    extrapolated : bool
        Whether it is larger, smaller, longer or shorter trained than what was measured.
    others : dict of str to (Shape, float)
        The best model of every method, and in bfloat16 ("dense in bf16") where the processor has it, and its loss.
    note : str
        On what made steps longer than they are alone, or how far timings lie apart; else empty.
    """

    shape: Shape
    sparsity: float
    method: str
    precision: str
    expected_loss: float
    low: float
    high: float
    steps: int
    extrapolated: bool
    others: dict[str, tuple[Shape, float]]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": _sizes(self.shape), "sparsity": self.sparsity, "method": self.method, "precision": self.precision,
            "expected_loss": self.expected_loss, "low": self.low, "high": self.high, "steps": self.steps,
            "extrapolated": self.extrapolated, "note": self.note,
            "others": {
                name: {"model": _sizes(shape), "expected_loss": loss} for name, (shape, loss) in self.others.items()
            },
        }  # fmt: skip

    def configuration(self) -> dict[str, Any]:
        """Settings of the run, as a YAML file for `vspdf train` has them, with the learning rates of studies."""
        width, every = self.shape.d_model, max(100, self.steps // 20)
        phases: list[dict[str, Any]] = []
        for stage in _STAGES[self.method]:
            steps = max(1, round(stage.share * self.steps))
            end = _LAST_RATE if stage.end is None else float(f"{stage.end / width:.2g}")
            phase: dict[str, Any] = {"steps": steps, "lr": float(f"{stage.rate / width:.2g}"), "lr_end": end}
            if stage.sparsity:
                phase |= {"sparsity": stage.sparsity, "s_mu_par": True}
                if self.method != "static":
                    phase |= {"algorithm": "set", "drop_fraction": {"type": "cosine", "init": 0.5}}
            phases.append(phase)
        return {
            "model": _sizes(self.shape) | {"init_std": float(f"{0.5 / math.sqrt(width):.2g}")},
            "data": {"corpus": "stdlib-all", "tokenizer": "bytes", "validation_fraction": 0.01, "repeat": True},
            "train": {
                "batch_size": _SEQUENCES,
                "precision": self.precision,
                "eval_every": every,
                "checkpoint_every": every,
                "log_every": every // 10,
            },
            "phases": phases,
        }

    def sentences(self) -> list[str]:
        """What to read."""
        best = f"{self.shape.n_layer} layers of width {self.shape.d_model}"
        masks = f"at {self.sparsity:.0%}, masks"
        how = {
            "dense": "dense", "static": f"{masks} static", "set": f"{masks} that SET moves",
            "set-then-dense": f"{masks} that SET moves, dense for the last third of the steps",
        }[self.method]  # fmt: skip
        rest = "; ".join(f"{name} {loss:.3f} (width {shape.d_model})" for name, (shape, loss) in self.others.items())
        beyond = " It extrapolates: nothing so large, or so long trained, was measured." if self.extrapolated else ""
        return [
            f"Advice: {best}, {how}, in {self.precision}, {self.steps:,} steps of {_TOKENS:,} bytes: a loss of "
            f"{self.expected_loss:.3f} nats a byte ({self.low:.3f} to {self.high:.3f}) on text like Python's standard "
            f"library.{beyond}",
            f"Best of each kind: {rest}. Differences below the interval are not told apart (docs/evidence.md).",
            *filter(None, [self.note]),
        ]


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        key: getattr(shape, key) for key in ("n_layer", "d_model", "n_head", "d_ff", "d_attention", "sequence_length")
    }


def advise(hours: float, progress: Callable[[str], None] = lambda line: None) -> Advice:
    """The model with the least expected loss among dense and sparse ones of many widths.

    Parameters
    ----------
    hours : float
        On this machine, all of its threads; above 0.
    """
    if not 0 < hours < math.inf:
        raise UserError(f"hours must be positive, not {hours}.")
    worth = law.worth()
    paces, note = _paces(progress)

    def kept(method: str, shape: Shape) -> float:
        """Weights of the layers on average over the steps."""
        return sum(stage.share * (1 - stage.sparsity) for stage in _STAGES[method]) * shape.linear

    def equal(method: str, weights: float, tokens: float) -> tuple[float, ...]:
        """Weights of the dense model that is as good: the least, as usual, the most."""
        return tuple(m * weights for m in worth[method].at(tokens / weights)) if method in worth else (weights,) * 3

    found: dict[tuple[str, str], tuple[float, Shape, float]] = {}
    for (precision, pace), (method, stages) in itertools.product(paces.items(), _STAGES.items()):
        for width in _WIDTHS:
            shape = _shape(width)
            tokens = hours * 3600 / sum(stage.share * pace(shape, stage.sparsity) for stage in stages)
            loss = law.loss(equal(method, kept(method, shape), tokens)[1], tokens)
            if (method, precision) not in found or loss < found[method, precision][0]:
                found[method, precision] = (loss, shape, tokens)
    method, precision = min(found, key=lambda kind: found[kind][0])
    loss, shape, tokens = found[method, precision]
    mine = kept(method, shape)
    first = _STAGES[method][0].sparsity
    all_of_them = [law.loss(size, tokens, fit) for size in equal(method, mine, tokens) for fit in range(law.FITS)]
    weights, text = _KNOWN
    beyond = not (weights[0] <= mine <= weights[1] and text[0] <= tokens <= text[1])
    doubt = 2 * _ERROR if beyond else _ERROR
    return Advice(
        shape, first, method, precision, loss, min(all_of_them) * (1 - doubt), max(all_of_them) * (1 + doubt),
        max(1, round(tokens / _TOKENS)), beyond,
        {name + " in bf16" * (how == "bf16"): (of, least) for (name, how), (least, of, _) in found.items()},
        note,
    )  # fmt: skip


def _shape(width: int) -> Shape:
    layers = next(n for least, n in ((1280, 12), (768, 8), (512, 4), (0, 2)) if width >= least)
    return Shape(layers, width, max(1, width // 64), 4 * width, _VOCABULARY, _LENGTH)


def _paces(progress: Callable[[str], None]) -> tuple[dict[str, _Pace], str]:
    """Of every precision, seconds a token of a training step; and a note on what made them longer, or doubtful.

    From blocks of three widths, timed here. What else a shared machine does comes and goes, by more than kinds of
    models differ: all blocks are timed one after the other, and that again until two such passes agree.
    """
    passes: list[dict[tuple[str, int], Calibration]] = []
    while len(passes) < 2 or (len(passes) < _PASSES and _apart(passes[-2:]) > _AGREE):
        progress(f"timing blocks of widths {', '.join(map(str, _TIMED))}, pass {len(passes) + 1}")
        passes.append(
            {
                (precision, width): calibrate(_shape(width), [_SPARSITY], _TOKENS, precision=precision)
                for precision, width in itertools.product(precisions(), _TIMED)
            }
        )
    note = next(iter(passes[0].values())).note  # later ones say of this work too
    if _apart(passes[-2:]) > _AGREE:
        note = f"{note} Blocks took up to {_apart(passes):.1f} times as long in one pass as in another.".strip()
    return {each: _pace([[one[each, width] for one in passes] for width in _TIMED]) for each in precisions()}, note


def _apart(passes: list[dict[tuple[str, int], Calibration]]) -> float:
    """How many times as long a block took in one pass as in another, at most."""
    columns = zip(*([s for each in one.values() for s in each.block_seconds.values()] for one in passes), strict=True)
    return max(max(column) / min(column) for column in columns)


def _pace(timed: list[list[Calibration]]) -> _Pace:
    """Seconds a token of a training step: medians of the passes at each width, and between widths."""

    median = statistics.median
    blocks = {
        s: [median(each.block_seconds[s] / each.tokens for each in passes) for passes in timed]
        for s in (0.0, _SPARSITY)
    }
    rest = [median(each.vocabulary_seconds / each.tokens for each in passes) for passes in timed]
    update = median(each.optimizer_seconds for passes in timed for each in passes)
    between = lambda width, column: math.exp(_line(math.log(width), np.log(_TIMED), np.log(column)))  # noqa: E731

    def seconds(shape: Shape, sparsity: float) -> float:
        block, vocabulary = between(shape.d_model, blocks[sparsity]), between(shape.d_model, rest)
        parameters = shape.parameters - sparsity * shape.linear
        return shape.n_layer * block + vocabulary + parameters * update / _TOKENS

    return seconds


def _line(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """Between points along lines, beyond them along the last."""
    i = min(max(int(np.searchsorted(xs, x)) - 1, 0), len(xs) - 2)
    return float(ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i]))
