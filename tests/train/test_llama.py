"""A Llama through every verb: trained, stopped and resumed, counted, converted, simulated, reported."""

import json

import pytest
import torch
import transformers

from vspdf.config import loading
from vspdf.interop import checkpoints
from vspdf.ledger import flops_per_token
from vspdf.runs.folder import Run
from vspdf.train.trainer import train

LLAMA = ["model.norm=rms", "model.position=rope", "model.mlp=swiglu", "model.bias=false", "model.tie=false",
         "model.n_kv_head=2", "model.d_ff=48", "phases.0.s_mu_par=true"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """A finished run."""
    folder = tmp_path_factory.mktemp("llama")
    train(loading.load(tiny_config(folder), LLAMA))
    return folder / "run"


def test_seven_matrices_of_a_block_are_sparse_and_counted(run):
    done = Run(run)
    masks = done.masks(0)
    assert {name.split(".", 2)[2] for name in masks} == {
        "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    shape = done.shape
    assert sum(mask.size for mask in masks.values()) == shape.linear
    for phase in done.summary["phases"]:
        expected = flops_per_token(shape, phase["sparsity"], "spdf") * phase["tokens"]
        assert phase["flops"]["useful"] == pytest.approx(expected, rel=5e-3)
        assert phase["flops"]["dense"] == flops_per_token(shape, 0.0, "spdf") * phase["tokens"]


def test_a_run_in_two_parts_is_one_run(run, tiny, tmp_path):
    config = loading.load(tiny, [*LLAMA, "train.checkpoint_every=7", f"run_dir={tmp_path}/parts"])
    lines = []

    def stop(line):
        lines.append(line)
        if line.startswith("step 10/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, say=stop)
    train(config, resume=True)
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (run, tmp_path / "parts")]  # fmt: skip
    assert losses[0] == losses[1]


def test_it_is_a_llama_elsewhere(run, tmp_path, vspdf):
    assert vspdf("convert", run, tmp_path / "hf")[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.model_type == "llama"
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(checkpoints.load(run).model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_verbs_that_read_a_run_read_a_llamas(run, vspdf):
    for verb in (["eval", run], ["generate", run, "--prompt", "import", "--tokens", 5], ["report", run],
                 ["simulate", "step", "--run", run], ["plan", "--model", run / "config.yaml"]):  # fmt: skip
        status, out, err = vspdf(*verb)
        assert status == 0 and out, (verb, err)
