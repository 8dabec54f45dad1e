"""Generation: the cache against none, beam search against transformers, batches against single prompts."""

import pytest
import torch
import transformers

from vspdf.errors import UserError
from vspdf.evaluate.generate import Decoding, beam_search, generate, sample
from vspdf.model import GPT, Cache
from vspdf.shapes import Shape
from vspdf.sparsity.surgery import sparsify

SHAPE = Shape(2, 32, 4, 64, 61, 48)
END = 60
MORE = [END, 3, 17]
PROMPTS = [[5, 9, 5, 9, 2], [7], [1, 2, 3, 1, 2, 3, 1, 2], [40, 41, 40], [3, 3, 3, 3, 3, 3]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    """Wide initial weights make logits that differ; a raised end makes answers of several lengths."""
    model = GPT(SHAPE, init_std=0.3, seed=3).eval()
    with torch.no_grad():
        model.wte.weight[END] *= 1.5
    return model


@pytest.fixture(scope="module")
def peer(model):
    """The same weights in transformers' GPT-2."""
    config = transformers.GPT2Config(
        n_layer=SHAPE.n_layer, n_embd=SHAPE.d_model, n_head=SHAPE.n_head, n_inner=SHAPE.d_ff,
        vocab_size=SHAPE.vocab_size, n_positions=SHAPE.sequence_length, activation_function="gelu",
        bos_token_id=END, eos_token_id=END, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    peer = transformers.GPT2LMHeadModel(config).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {name: t.T if name.endswith(linear) else t for name, t in model.state_dict().items()}
    missing, unexpected = peer.transformer.load_state_dict(tensors, strict=False)
    assert not unexpected and all("bias" in name for name in missing)
    return peer


def test_cached_logits_equal_uncached(model):
    tokens = torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(0))
    cache = Cache(model, torch.zeros(3, dtype=torch.long), 40)
    pieces = [model.logits(model.hidden(part, cache)) for part in tokens.split([7, 1, 1, 12, 19], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=2e-5)


def test_padded_rows_see_only_themselves(model):
    """Rows of three lengths, ending together, then single tokens: as if each were alone."""
    rows = [torch.arange(n) % 59 for n in (9, 4, 1)]
    more = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    cache = Cache(model, torch.tensor([0, 5, 8]), 12)
    padded = torch.stack([torch.cat((torch.full((9 - len(row),), 50), row)) for row in rows])
    logits = [model.logits(model.hidden(padded, cache))[:, -1]]
    logits += [model.logits(model.hidden(more[:, i : i + 1], cache))[:, -1] for i in range(3)]
    for b, row in enumerate(rows):
        alone = model(torch.cat((row, more[b]))[None])[0, -4:]
        torch.testing.assert_close(torch.stack([step[b] for step in logits]), alone, rtol=0, atol=2e-5)


def test_cache_rows_are_reordered(model):
    tokens = torch.tensor([[1, 2, 3], [1, 2, 9]])
    cache = Cache(model, torch.zeros(2, dtype=torch.long), 4)
    model.hidden(tokens, cache)
    cache.select(torch.tensor([1, 1]), begin=2)
    result = model.logits(model.hidden(torch.tensor([[4], [5]]), cache))[:, 0]
    expected = model(torch.tensor([[1, 2, 9, 4], [1, 2, 9, 5]]))[:, -1]
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


class NoRepeatInAnswer(transformers.LogitsProcessor):
    """transformers' own ban on repeated n-grams, shown the answer without the prompt: our convention."""

    def __init__(self, n, prompt):
        self.inner, self.prompt = transformers.NoRepeatNGramLogitsProcessor(n), prompt

    def __call__(self, ids, scores):
        return self.inner(ids[:, self.prompt :], scores)


def reference(peer, prompt, decoding, ends=(END,)):
    ids = torch.tensor([prompt])
    processors = [NoRepeatInAnswer(decoding.no_repeat_ngram, len(prompt))] if decoding.no_repeat_ngram else []
    result = peer.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=decoding.max_tokens, num_beams=decoding.beams,
        length_penalty=decoding.length_penalty, early_stopping=False, do_sample=False, eos_token_id=[*ends],
        pad_token_id=END, logits_processor=transformers.LogitsProcessorList(processors),
    )  # fmt: skip
    answer = result[0, len(prompt) :].tolist()
    return answer[: next((i for i, token in enumerate(answer) if token in ends), None)]


@pytest.mark.parametrize(
    ("beams", "penalty", "ngram"), [(10, 0.8, 4), (10, 0.8, 0), (10, 2.0, 2), (2, 0.8, 2), (3, 0.0, 3), (4, -1.0, 0)]
)
def test_beam_search_equals_transformers(model, peer, beams, penalty, ngram):
    decoding = Decoding(max_tokens=24, beams=beams, length_penalty=penalty, no_repeat_ngram=ngram)
    expected = [reference(peer, prompt, decoding) for prompt in PROMPTS]
    assert generate(model, PROMPTS, decoding, [END], batch_size=3) == expected
    if penalty < 2:
        assert len({len(answer) for answer in expected}) > 1  # some end early, or the test shows little


@pytest.mark.parametrize("beams", [1, 3])
def test_any_of_several_ends_is_one(model, peer, beams):
    decoding = Decoding(max_tokens=20, beams=beams, no_repeat_ngram=0)
    one, several = (generate(model, PROMPTS, decoding, ends) for ends in ([END], MORE))
    assert several == [reference(peer, prompt, decoding, MORE) for prompt in PROMPTS] and several != one


def test_without_an_end_beams_run_to_the_limit(model, peer):
    decoding = Decoding(max_tokens=9, beams=4, no_repeat_ngram=0)
    peer.generation_config.eos_token_id = None
    try:
        ids = torch.tensor([PROMPTS[2]])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, num_beams=4, do_sample=False
        )
    finally:
        peer.generation_config.eos_token_id = END
    assert beam_search(model, [PROMPTS[2]], decoding, []) == [expected[0, 8:].tolist()]


def test_greedy_equals_transformers(model, peer):
    decoding = Decoding(max_tokens=20, no_repeat_ngram=0)
    assert generate(model, PROMPTS, decoding, [END]) == [reference(peer, prompt, decoding) for prompt in PROMPTS]


@pytest.mark.parametrize("sparsity", [0.0, 0.5], ids=["dense", "sparse"])
@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
def test_batches_equal_single_prompts(how, sparsity):
    model = GPT(SHAPE, init_std=0.3, seed=5)
    if sparsity:
        sparsify(model, sparsity, backend="reference")
    decoding = Decoding(16, beams=5 if how == "beams" else 1, temperature=0.7 if how == "sampled" else 0.0, seed=4)
    together = generate(model, PROMPTS, decoding, [END], batch_size=5)
    assert together == generate(model, PROMPTS, decoding, [END], batch_size=2)
    assert together[0] == generate(model, PROMPTS[:1], decoding, [END])[0]
    assert model.training


def test_sampling_follows_the_distribution(model):
    """Frequencies of the first token over many seeds; another seed gives another text."""
    decoding = Decoding(max_tokens=1, temperature=1.0)
    drawn = sample(model, [PROMPTS[0]] * 4000, decoding, [])
    counts = torch.bincount(torch.tensor([answer[0] for answer in drawn]), minlength=61) / 4000
    expected = model(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 0.04
    texts = [generate(model, [PROMPTS[0]], Decoding(20, temperature=3.0, seed=seed), []) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_goes_beyond_the_window(model):
    """A full window keeps its later half; until then the text is that of one forward pass a token."""
    text = [1, 2, 3]
    answer = generate(model, [text], Decoding(max_tokens=100), [])[0]
    assert len(answer) == 100
    for token in answer[:46]:
        window = text if len(text) < 49 else text[-24:]
        assert token == int(model(torch.tensor([window]))[0, -1].argmax())
        text = [*text, token]
    long = list(range(50)) * 2
    assert len(generate(model, [long, [1]], Decoding(max_tokens=5), [])[0]) == 5


def test_what_cannot_be_continued(model):
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(model, [[1], []], Decoding(4), [END])
    with pytest.raises(UserError, match=r"prompt 1 has 40 tokens: with an answer of up to 9 .* window of 48"):
        generate(model, [[1] * 40], Decoding(9, beams=2), [END])
    assert generate(model, [], Decoding(4), [END]) == []
    with pytest.raises(UserError, match="49 tokens are more than"):
        model.hidden(torch.zeros(1, 49, dtype=torch.long))
