"""Small models, and how they are trained for some steps."""

import pytest
import torch
import transformers
from torch import nn

import vspdf


@pytest.fixture
def llama():
    """A dense Llama of two layers, 14 matrices beside its head."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def one():
    """One dense layer."""

    def made(out_features=96, in_features=48):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(in_features, out_features))

    return made


@pytest.fixture(scope="session")
def sparse_one(one):
    """One sparse layer."""

    def made(sparsity=0.8, **how):
        model = one()
        vspdf.sparsify(model, sparsity, **how)
        return model

    return made


@pytest.fixture(scope="session")
def mlp():
    """Two dense layers, of 12 features and of 30."""

    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12))

    return made


@pytest.fixture(scope="session")
def adam_steps():
    """Steps of an optimizer on random inputs, always the same."""

    def taken(model, optimizer, count=3, width=12):
        generator = torch.Generator().manual_seed(1)
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(8, width, generator=generator)).square().mean().backward()
            optimizer.step()

    return taken
