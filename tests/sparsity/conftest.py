import pytest
import torch
import transformers


@pytest.fixture
def llama():
    """A dense Llama of two layers, 14 matrices beside its head."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)
