"""Models of transformers, and how any model's logits are asked for."""

import pytest
import torch
import transformers


@pytest.fixture(scope="session")
def logits():
    """Logits of our models and of transformers', without gradients."""

    def of(model, tokens):
        with torch.no_grad():
            out = model.eval()(tokens)
        return out if torch.is_tensor(out) else out.logits

    return of


@pytest.fixture(scope="session")
def some_tokens():
    """Three sequences, always the same."""
    return lambda vocab_size=257, length=16: torch.randint(
        vocab_size, (3, length), generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="session")
def theirs():
    """A random GPT-2 of transformers with every parameter drawn; on request its folder is written."""

    def made(folder, save=True, **settings):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, n_inner=96, vocab_size=61, n_positions=24, bos_token_id=1, eos_token_id=1,
            **settings,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if save:
            model.save_pretrained(folder)
        return model.eval()

    return made
