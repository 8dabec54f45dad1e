"""The dense model against Hugging Face's GPT-2, its init, and what it refuses."""

import math

import pytest
import torch
import transformers
from torch import nn

from vspdf.data.samples import ValidationBatch
from vspdf.errors import UserError
from vspdf.evaluate.loss import evaluate
from vspdf.model import GPT, Cache
from vspdf.shapes import Shape

SHAPE = Shape(n_layer=2, d_model=32, n_head=4, d_ff=96, vocab_size=61, sequence_length=24)


def test_it_is_gpt2_with_exact_gelu():
    model = GPT(SHAPE, init_std=0.1)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_inner=96, vocab_size=61, n_positions=24, activation_function="gelu"
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for name in state:
        if ".attn.c_" in name or ".mlp.c_" in name:
            state[name] = state[name].T if name.endswith("weight") else state[name]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    theirs.tie_weights()
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5)


def test_a_later_token_changes_nothing_before_it():
    model = GPT(SHAPE, init_std=0.1)
    tokens = torch.randint(61, (1, 24))
    changed = tokens.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 61
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :15], b[:, :15])
    assert not torch.allclose(a[:, 15:], b[:, 15:])


def test_init_is_truncated_scaled_and_seeded():
    model = GPT(Shape(4, 128, 4, 512, 500, 64), init_std=0.02, seed=3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("ln_" in name and name.endswith("weight"))))
            continue
        std = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
        assert parameter.abs().max() <= 2 * std
        assert parameter.std().item() == pytest.approx(0.88 * std, rel=0.03)  # a normal cut at two deviations
    other = GPT(Shape(4, 128, 4, 512, 500, 64), init_std=0.02, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not torch.equal(GPT(Shape(4, 128, 4, 512, 500, 64), seed=4).wte.weight, model.wte.weight)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"model.n_head = 5 does not divide model.d_model = 32"):
        GPT(Shape(2, 32, 5, 96, 61, 24))
    with pytest.raises(UserError, match=r"25 tokens are more than the model's sequence_length of 24"):
        GPT(SHAPE)(torch.zeros(1, 25, dtype=torch.long))


class Held:
    """Held-out text of known size, in the form that a dataset gives it."""

    def validation_batches(self, batch_size, max_tokens=0):
        generator = torch.Generator().manual_seed(0)
        for size, target_bytes in ((batch_size, 100), (1, 30)):
            tokens = torch.randint(61, (size, 11), generator=generator)
            yield ValidationBatch(tokens[:, :-1], tokens[:, 1:], target_bytes)


def test_evaluation_weighs_batches_by_tokens_and_bytes():
    model = GPT(SHAPE, init_std=0.5).train()
    result = evaluate(model, Held(), 4)
    with torch.no_grad():
        nats = [float(model(b.tokens, b.targets)) * b.targets.numel() for b in Held().validation_batches(4)]
    assert result.loss == pytest.approx(sum(nats) / 50, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / 130, rel=1e-5)
    assert model.training


def test_attention_may_be_narrower_than_the_model():
    shape = Shape(2, 32, 4, 96, 61, 24, head_dim=4)
    model = GPT(shape)
    assert model.h[0].attn.c_attn.weight.shape == (48, 32) and model.h[0].attn.c_proj.weight.shape == (32, 16)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear) == shape.linear
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens).backward()
    cache = Cache(model, torch.zeros(2, dtype=torch.int64), 24)
    parts = [model.hidden(part, cache) for part in tokens.split([10, 1, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(tokens), rtol=1e-4, atol=1e-5)
    assert Shape(2, 32, 4, 96, 61, 24).d_attention == 32
