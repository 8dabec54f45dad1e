"""Sparse models that Hugging Face saves: what `from_pretrained` gives back is the same function."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torch_checkpoint

import vspdf
from vspdf.errors import UserError
from vspdf.sparsity.layer import SparseLinear

TOKENS = torch.arange(8)[None]


@pytest.fixture
def small(llama):
    def made(kind):
        model = llama if kind == "Llama" else transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=97, n_embd=24, n_head=4, n_layer=2, n_positions=32)
        )  # fmt: skip
        return model.eval()

    return made


@pytest.mark.parametrize("kind", ["Llama", "GPT-2 (Conv1D)"])
def test_save_pretrained_while_sparse_is_the_same_function(kind, small, tmp_path):
    model = small(kind)
    patterns = vspdf.sparsify(model, 0.8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert vspdf.sparsify(again, 0.5, init_method="from_zeros") == patterns
    vspdf.densify(model)
    model.save_pretrained(tmp_path / "dense")  # as ever


@pytest.mark.parametrize(
    "change",
    [lambda m: vspdf.evolve(m, None, 0.3), lambda m: vspdf.set_sparsity(m, 0.25), vspdf.densify],
    ids=["moved", "grown", "dense"],
)
@pytest.mark.parametrize("kind", ["Llama", "GPT-2 (Conv1D)"])
def test_save_pretrained_of_an_earlier_state_goes_by_the_masks_of_that_state(kind, change, small, tmp_path):
    model = small(kind)
    vspdf.sparsify(model, 0.5)
    best, wanted = copy.deepcopy(model.state_dict()), model(TOKENS).logits
    change(model)
    model.save_pretrained(tmp_path, state_dict=best)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(TOKENS).logits, wanted)


def test_save_pretrained_refuses_states_that_do_not_fit(llama, tmp_path):
    vspdf.sparsify(llama, 0.5)
    name, whole = "model.layers.0.mlp.up_proj", llama.state_dict()
    refused = {
        f"'{name}.values' has 1023 weights, the pattern beside it 1024": {
            f"{name}.values": whole[f"{name}.values"][1:]
        },
        f"'{name}.values' comes without its pattern": {f"{name}._extra_state": None},
        "holds a sparse layer 'away', the model has no": {"away.values": torch.ones(1), "away._extra_state": whole},
    }
    for said, changes in refused.items():
        state = {key: value for key, value in {**whole, **changes}.items() if value is not None}
        with pytest.raises(UserError, match=said):
            llama.save_pretrained(tmp_path, state_dict=state)


def checkpointed(model):
    """Each of its blocks forms its activations anew in the backward pass."""
    torch_checkpoint.apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer"
    )
    return model


def test_a_checkpointed_model_is_saved_and_goes_on(llama, tmp_path, caplog):
    fresh, phases = copy.deepcopy(llama), vspdf.Phases([vspdf.Phase(sparsity=0.5, steps=9, layers={"*up_proj": 0.8})])
    plain = phases.start(copy.deepcopy(llama))
    model = phases.start(checkpointed(llama.eval()))
    state, wanted = model.state_dict(), model(TOKENS).logits
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    with caplog.at_level(logging.INFO, "vspdf"):
        model.save_pretrained(tmp_path)
    assert "save_pretrained: 14 sparse layers are written with a dense weight" in caplog.text
    torch.testing.assert_close(type(llama).from_pretrained(tmp_path)(TOKENS).logits, wanted)
    for again in (checkpointed(copy.deepcopy(fresh)), fresh):
        phases.restore(again, state, 3)
        again.load_state_dict(state)
        assert torch.equal(again.eval()(TOKENS).logits, wanted)


BEGIN = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
tokens = torch.arange(8)[None]
"""
COMES = {
    "unpickled": """
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
""",
    "put in by hand": """
import vspdf
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
mlp = model.model.layers[0].mlp
mlp.up_proj = vspdf.SparseLinear.from_linear(mlp.up_proj, vspdf.Pattern.random((32, 16), 0.5))
""",
}
END = """
assert hasattr(model.model.layers[0].mlp.up_proj, "values")
model.save_pretrained(sys.argv[1])
again = LlamaForCausalLM.from_pretrained(sys.argv[1])
torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
"""


@pytest.mark.parametrize("comes", COMES.values(), ids=COMES)
def test_save_pretrained_in_a_process_that_never_called_sparsify(comes, llama, tmp_path):
    vspdf.sparsify(llama.eval(), 0.5)
    torch.save(llama, tmp_path / "model.pt")
    run = [sys.executable, "-P", "-c", BEGIN + comes + END, str(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


class OfTheHub(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.layers(x)


def test_a_model_of_the_hubs_mixin_is_saved_while_sparse(tmp_path):
    model, x = OfTheHub(), torch.randn(4, 8)
    vspdf.sparsify(model, 0.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(OfTheHub.from_pretrained(tmp_path)(x), model(x))
    assert isinstance(model.layers[0], SparseLinear)
