"""Text from a model: greedy, sampled, or by beam search, in batches, with a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vspdf.errors import UserError
from vspdf.model import GPT, Cache

Tokens = list[int]
MOST_BEAMS = 1000


@dataclass(frozen=True)
class Decoding:
    """The way that the next token is chosen.

    The defaults of beam search are those of the LoRA paper's data-to-text experiments (arXiv:2106.09685).
    """

    max_tokens: int = 64  # of an answer
    beams: int = 1  # above 1: beam search, else sampling
    # A finished answer is worth its log-probability over length ** length_penalty, its end counted.
    length_penalty: float = 0.8
    # No sequence of so many tokens twice in an answer; 0: off. The prompt does not count: names are to be repeated.
    no_repeat_ngram: int = 4
    temperature: float = 0.0  # of sampling; 0: the likeliest token (greedy)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what no text can be made with.

        Raises
        ------
        UserError
            Naming the setting in backticks.
        """
        for key, least, most in (
            ("max_tokens", 1, None), ("beams", 1, MOST_BEAMS), ("no_repeat_ngram", 0, None), ("seed", 0, None),
        ):  # fmt: skip
            value = getattr(self, key)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < least or (most is not None and value > most):
                expected = (
                    f"{least} or more" if most is None else f"{least} to {most:,}, each costs as much as an answer"
                )
                raise UserError(f"`{key}` {value}: expected {expected}.")
        for key in ("length_penalty", "temperature"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (key == "temperature" and value < 0):
                also = " of 0 or more" if key == "temperature" else ""
                raise UserError(f"`{key}` {value}: expected a finite number{also}.")


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: Collection[int],
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tokens]:
    """Answers to prompts, in their order; each is the same whatever else is in its batch, up to rounding.

    Parameters
    ----------
    model : GPT
    prompts : sequence of token sequences
        None empty. For beam search, each with room for an answer: prompt and `max_tokens` fit the model's window.
        Sampling goes beyond it: whenever the window is full, the later half of it is kept.
    decoding : Decoding
    ends : collection of int
        Tokens that end an answer, none of them part of it.
    batch_size : int
        Prompts at a time.
    progress : callable
        Called with the number of answers done.

    Raises
    ------
    UserError
        If a prompt is empty or too long.
    """
    window = model.shape.sequence_length
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: give at least one token.")
        if decoding.beams > 1 and len(prompt) + decoding.max_tokens > window:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens: with an answer of up to {decoding.max_tokens} that is more "
                f"than the model's window of {window}."
            )
    training = model.training
    model.eval()
    try:
        answers: list[Tokens] = [[] for _ in prompts]
        done = 0
        for batch in _batches([len(prompt) for prompt in prompts], batch_size, window - decoding.max_tokens):
            chosen = [list(prompts[i]) for i in batch]
            if decoding.beams > 1:
                results = beam_search(model, chosen, decoding, ends)
            else:
                results = sample(model, chosen, decoding, ends, batch)
            for i, result in zip(batch, results, strict=True):
                answers[i] = result
            done += len(batch)
            progress(done)
        return answers
    finally:
        model.train(training)


def _batches(lengths: Sequence[int], size: int, room: int) -> list[list[int]]:
    """Indices of prompts of similar length together; those without room for an answer alone."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    fitting = [i for i in order if lengths[i] <= room]
    batches = [fitting[start : start + size] for start in range(0, len(fitting), size)]
    return batches + [[i] for i in order if lengths[i] > room]


def _prefill(model: GPT, prompts: Sequence[Tokens], capacity: int) -> tuple[Cache, Tensor]:
    """A cache that holds the prompts, ending together, and the logits [B, V] of what follows."""
    longest = max(map(len, prompts))
    device = model.wte.weight.device
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    cache = Cache(model, padding, capacity)
    return cache, _next(model, tokens, cache)


def _next(model: GPT, tokens_BT: Tensor, cache: Cache) -> Tensor:
    return model.logits(model.hidden(tokens_BT, cache)[:, -1]).float()


@torch.no_grad()
def sample(
    model: GPT, prompts: Sequence[Tokens], decoding: Decoding, ends: Collection[int],
    numbers: Sequence[int] | None = None,
) -> list[Tokens]:  # fmt: skip
    """One answer a prompt, token by token; `numbers` name the prompts, so that each has random numbers of its own."""
    window = model.shape.sequence_length
    rows = [list(prompt[-window:]) for prompt in prompts]
    answers: list[Tokens] = [[] for _ in prompts]
    sources = [_source(decoding.seed, n) for n in (numbers or range(len(prompts)))]
    live = list(range(len(prompts)))
    cache, logits = _prefill(model, rows, min(window, max(map(len, rows)) + decoding.max_tokens))
    for step in range(decoding.max_tokens):
        if decoding.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            logits = logits.double()
            logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes infinities of them
            cumulated = (logits / decoding.temperature).softmax(-1).cumsum(-1)
            points = torch.stack([torch.rand(1, generator=sources[i], dtype=torch.float64) for i in live])
            chosen = torch.searchsorted(cumulated, points.to(cumulated) * cumulated[:, -1:])[:, 0]
            chosen = chosen.clamp(max=logits.shape[-1] - 1)
        tokens = chosen.tolist()
        keep = [k for k, token in enumerate(tokens) if token not in ends]
        live, tokens = [live[k] for k in keep], [tokens[k] for k in keep]
        for i, token in zip(live, tokens, strict=True):
            answers[i].append(token)
        if not live or step + 1 == decoding.max_tokens:
            break
        if cache.length - int(cache.padding_B.min()) == window:
            latest = [(rows[i] + answers[i])[-max(1, window // 2) :] for i in live]
            cache, logits = _prefill(model, latest, window)
            continue
        if len(keep) < len(chosen):
            cache.select(torch.tensor(keep))
        logits = _next(model, torch.tensor(tokens, device=logits.device)[:, None], cache)
    return answers


def _source(seed: int, number: int) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, number]).generate_state(1)[0]  # torch's generator takes 32 bits
    return torch.Generator().manual_seed(int(mixed))


@torch.no_grad()
def beam_search(model: GPT, prompts: Sequence[Tokens], decoding: Decoding, ends: Collection[int]) -> list[Tokens]:
    """The best answer to each prompt that a beam search finds.

    Notes
    -----
    Of the ``(1 + ends) · beams`` likeliest continuations (``2 · beams`` at least), those among the first `beams` that
    end are answers; the likeliest `beams` that do not end go on. A prompt is done when it has `beams` answers and none
    that goes on scores above the worst of them at its present length, or at `max_tokens`. transformers' ``generate``
    does the same under ``early_stopping=False``, but for counting n-grams of the prompt.
    """
    beams, penalty = decoding.beams, decoding.length_penalty
    begin = max(map(len, prompts))
    cache, logits = _prefill(model, prompts, begin + decoding.max_tokens)
    cache.repeat(beams)
    logits = logits.repeat_interleave(beams, 0)
    device, vocabulary = logits.device, logits.shape[-1]
    stops = torch.tensor([*ends], dtype=torch.long, device=device)
    found: list[list[tuple[float, Tokens]]] = [[] for _ in prompts]  # the best `beams` answers of each prompt
    live = list(range(len(prompts)))
    tokens_NbT = torch.empty((len(prompts), beams, 0), dtype=torch.long, device=device)
    scores_Nb = torch.full((len(prompts), beams), -1e9, device=device)
    scores_Nb[:, 0] = 0.0  # at first all beams are the same one
    for length in range(1, decoding.max_tokens + 1):
        logprobs = logits.log_softmax(-1)
        _ban_repeats(logprobs, tokens_NbT.flatten(0, 1), decoding.no_repeat_ngram)
        totals = (scores_Nb[..., None] + logprobs.view(len(live), beams, vocabulary)).flatten(1)
        top, index = totals.topk(min(max(2, 1 + len(ends)) * beams, totals.shape[1]))
        parent, token = index // vocabulary, index % vocabulary
        longer = torch.cat((tokens_NbT.gather(1, parent[..., None].expand(-1, -1, length - 1)), token[..., None]), 2)
        ended = torch.isin(token, stops)
        answered = ended if length < decoding.max_tokens else torch.ones_like(ended)
        for row, column in answered[:, :beams].nonzero().tolist():
            answer = longer[row, column].tolist()
            score = float(top[row, column]) / length**penalty
            pool = found[live[row]]
            pool.append((score, answer[:-1] if ended[row, column] else answer))
            pool.sort(key=lambda item: -item[0])
            del pool[beams:]
        if length == decoding.max_tokens:
            break
        scores_Nb, kept = (top - 1e9 * ended).topk(beams)
        best = (scores_Nb[:, 0] / length**penalty).tolist()
        going = [row for row, i in enumerate(live) if len(found[i]) < beams or best[row] > found[i][-1][0]]
        if not going:
            break
        tokens_NbT = longer.gather(1, kept[..., None].expand(-1, -1, length))
        rows = torch.arange(len(live), device=device)[:, None] * beams + parent.gather(1, kept)
        cache.select(rows.flatten(), begin)  # beams of a prompt share its columns
        if len(going) < len(live):
            rest = torch.tensor(going, device=device)
            live, tokens_NbT, scores_Nb = [live[row] for row in going], tokens_NbT[rest], scores_Nb[rest]
            cache.select((rest[:, None] * beams + torch.arange(beams, device=device)).flatten())
        logits = _next(model, tokens_NbT[:, :, -1].reshape(-1, 1), cache)
    return [pool[0][1] for pool in found]


def _ban_repeats(logprobs_RV: Tensor, tokens_RT: Tensor, n: int) -> None:
    """Forbids, in place, the tokens that would complete an n-gram a row already has."""
    if not n or tokens_RT.shape[1] < n:
        return
    grams = tokens_RT.unfold(1, n, 1)  # [R, T - n + 1, n]
    last = tokens_RT[:, tokens_RT.shape[1] - n + 1 :]
    rows, places = (grams[..., :-1] == last[:, None]).all(-1).nonzero(as_tuple=True)
    logprobs_RV[rows, grams[rows, places, -1]] = -torch.inf
