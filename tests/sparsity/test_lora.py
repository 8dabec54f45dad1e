"""Low-rank adapters, peft's: on a dense model whose base becomes sparse, and on one that is sparse already."""

import logging

import pytest
import torch

import vspdf
from vspdf.sparsity.layer import sparse_layers

TOKENS = torch.arange(8)[None]
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed: no LoRA test")


@pytest.mark.filterwarnings("ignore")
def test_lora_adapters_stay_dense_and_the_frozen_base_is_taken(llama, peft):
    model = peft.get_peft_model(llama, peft.LoraConfig(**LORA))
    patterns = vspdf.sparsify(model, 0.9)
    assert len(patterns) == 14 and not any("lora_" in name for name in patterns)
    assert not any(layer.values.requires_grad for layer in sparse_layers(model).values())
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["IA3", "LoHa", "AdaLora", "Vera"])
def test_other_adapters_on_a_sparse_model_merge_within_the_mask(kind, llama, peft):
    options = {"IA3": {"feedforward_modules": []}, "AdaLora": {"init_r": 6, "total_step": 10}}.get(kind, {})
    patterns = vspdf.sparsify(llama, 0.9)
    tuned = peft.get_peft_model(llama, getattr(peft, f"{kind}Config")(target_modules=["q_proj"], **options))
    tuned(TOKENS, labels=TOKENS).loss.backward()
    merged = tuned.merge_and_unload()
    assert {key: layer.pattern for key, layer in sparse_layers(merged).items()} == patterns


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["some", "all-linear"])
def test_lora_on_a_sparse_model_trains_and_merges_within_the_mask(targets, llama, peft, caplog):
    patterns = vspdf.sparsify(llama, 0.9)
    tuned = peft.get_peft_model(llama, peft.LoraConfig(**{**LORA, "target_modules": targets}))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    tuned(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    name = next(iter(patterns))
    layer = tuned.base_model.model.get_submodule(name)
    expected = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach() * patterns[name].mask()
    with caplog.at_level(logging.WARNING, "vspdf"):
        merged = tuned.merge_and_unload()
    assert {key: layer.pattern for key, layer in sparse_layers(merged).items()} == patterns
    torch.testing.assert_close(merged.get_submodule(name).weight.detach(), expected.as_subclass(torch.Tensor))
    assert "dropped, the mask stays" in caplog.text
