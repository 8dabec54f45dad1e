"""Loops of one's own on two processes: DistributedDataParallel, FSDP2 and torch's own checkpoints, at a switch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.interop import checkpoints, sharded
from vspdf.model import GPT
from vspdf.runs.checkpoint import model_tensors
from vspdf.shapes import Shape
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.surgery import sparsify
from vspdf.train.trainer import train

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import json, logging, sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vspdf
from vspdf.errors import UserError
from vspdf.model import GPT
from vspdf.runs.checkpoint import model_tensors
from vspdf.shapes import Shape

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, folder, found = dist.get_rank(), sys.argv[1], {}
said = []
logging.getLogger("vspdf").addFilter(lambda record: said.append(record.getMessage()) or True)


def refusal(run):
    try:
        run()
    except UserError as error:
        return str(error)
    return "not refused"


def trained(net, optimizer, steps):
    losses = []
    for step in steps:
        chance = torch.Generator().manual_seed(step)
        x, y = (torch.randint(257, (4, 16), generator=chance)[rank::2] for _ in "xy")
        loss = net(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def made():
    model = GPT(Shape(2, 32, 4, 128, 257, 16), 0.02, 0)
    vspdf.sparsify(model, 0.9)
    return model


def optimized(model):
    return torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-3)


# wrapped
model = made()
phases = vspdf.Phases([(0.9, 3), (0.5, 3), (0.0, 3)])
phases.start(model)
optimizer = optimized(model)
net = DistributedDataParallel(model)
losses = trained(net, optimizer, range(3))
for start in (3, 6):
    assert phases.due(start) and not phases.due(start - 1)
    phases.at(start, model, optimizer)
    found.setdefault("stale", refusal(lambda: net(*torch.zeros(2, 1, 4, dtype=torch.long))))
    net = DistributedDataParallel(model)
    losses += trained(net, optimizer, range(start, start + 3))
found["ddp"], found["heard"] = losses, list(said)
weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

# sharded
model = made()
phases.__init__([(0.9, 3), (0.5, 3), (0.0, 3)])
phases.start(model)
for block in model.h:
    fully_shard(block)
fully_shard(model, reshard_after_forward=False)
optimizer = optimized(model)
losses = trained(model, optimizer, range(3))
found["refused"] = {
    "densify": refusal(lambda: vspdf.densify(model, optimizer)),
    "set_sparsity": refusal(lambda: vspdf.set_sparsity(model, 0.5, optimizer)),
    "at": refusal(lambda: phases.at(3, model, optimizer)),
    "weight": refusal(lambda: model.h[0].mlp.c_fc.weight),
    "checkpoint": refusal(lambda: model_tensors(model)),
}
dense = GPT(Shape(1, 32, 4, 128, 257, 16), 0.02, 0)
fully_shard(dense)
found["refused"]["sparsify"] = refusal(lambda: vspdf.sparsify(dense, 0.5))
dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/dcp")
with vspdf.gathered(model, optimizer) as whole:
    assert whole is model and type(model) is GPT
    if rank == 0:
        from safetensors.torch import save_file
        save_file(model_tensors(model), f"{folder}/whole.safetensors")
for start in (3, 6):
    with vspdf.gathered(model, optimizer):
        phases.at(start, model, optimizer)
    kinds = {type(p).__name__ for p in model.parameters()}
    kinds |= {type(s["exp_avg"]).__name__ for s in optimizer.state.values()}
    assert kinds == {"DTensor"} and len(optimizer.state) == len(list(model.parameters()))
    losses += trained(model, optimizer, range(start, start + 3))
found["fsdp"] = losses
with vspdf.gathered(model):
    found["same weights"] = all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())

# each process with masks of its own
model = made()
fully_shard(model)
def differently():
    with vspdf.gathered(model):
        vspdf.evolve(model, None, 0.3, seed=rank)
found["refused"]["evolve"] = refusal(lambda: vspdf.evolve(model, None, 0.3))
found["differ"] = refusal(differently)
if rank == 0:
    with open(f"{folder}/found.json", "w") as file:
        json.dump(found, file)
dist.destroy_process_group()
"""


def torchrun(*arguments):
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *map(str, arguments),
    ]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def found(folder):
    (folder / "child.py").write_text(CHILD)
    torchrun(folder / "child.py", folder)
    return json.loads((folder / "found.json").read_text())


def test_a_reducer_of_before_a_switch_is_found_and_refused(found):
    assert "wrap the model anew, net = DistributedDataParallel(model)" in found["stale"]
    assert len(found["heard"]) == 2 and "DistributedDataParallel was made before" in found["heard"][0]


def test_sharded_through_the_phases_is_as_wrapped(found):
    assert found["fsdp"] == found["ddp"] and found["same weights"]


def test_processes_that_leave_other_masks_are_refused(found):
    assert "gathered: the processes have given the model different masks" in found["differ"]


@pytest.mark.parametrize("verb", ["densify", "set_sparsity", "evolve", "at", "weight", "checkpoint", "sparsify"])
def test_what_needs_whole_weights_says_so(found, verb):
    assert "with vspdf.gathered(model, optimizer):" in found["refused"][verb]
    assert "sparsify before fully_shard" in found["refused"][verb]


def test_dcp_checkpoints_are_read_by_one_process(found, folder):
    model = sharded.load_model(folder / "dcp", Shape(2, 32, 4, 128, 257, 16))
    assert len(sparse_layers(model)) == 8
    whole, ours = load_file(folder / "whole.safetensors"), model_tensors(model)
    assert whole.keys() == ours.keys() and all(torch.equal(whole[name], ours[name]) for name in whole)


def test_older_dcp_states_which_have_no_shapes_are_read_by_the_length_of_the_bias():
    model = torch.nn.Sequential(torch.nn.Linear(12, 30), torch.nn.Linear(30, 12, bias=False))
    sparsify(model, 0.5)
    weights = {f"{i}.weight": model[i].weight.detach() for i in (0, 1)}
    state = model.state_dict()
    assert all(torch.equal(sharded.dense(state, "a folder")[name], weight) for name, weight in weights.items())
    older = {name: tensor[:-16] if name.endswith("_extra_state") else tensor for name, tensor in state.items()}
    with pytest.raises(UserError, match="the shape of sparse layer '1' is not known: it has no bias"):
        sharded.dense(older, "a folder")
    older = {name: tensor for name, tensor in older.items() if name.startswith("0")}
    assert torch.equal(sharded.dense(older, "a folder")["0.weight"], weights["0.weight"])


def test_init_from_a_dcp_checkpoint(found, folder, tiny, tmp_path):
    settings = loading.load(
        tiny, [f"init_from={folder}/dcp", "phases=[{sparsity: 0.9, steps: 1, lr: 1.0e-9, lr_end: 0}]"]
    )
    train(settings, say=lambda line: None)
    ours, theirs = model_tensors(checkpoints.load(tmp_path / "run").model), load_file(folder / "whole.safetensors")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_a_dcp_checkpoint_becomes_a_file_or_a_dense_checkpoint(found, folder, vspdf, refused, tmp_path, tiny):
    status, out, _ = vspdf("convert", folder / "dcp", tmp_path / "dense.safetensors", "--json")
    assert status == 0 and len(json.loads(out)["layers"]) == 8
    whole, plain = load_file(folder / "whole.safetensors"), load_file(tmp_path / "dense.safetensors")
    weight = plain["model.h.0.mlp.c_fc.weight"]
    assert weight.shape == (128, 32) and torch.equal(weight[weight != 0], whole["h.0.mlp.c_fc.values"])
    refused("does not say what model it is of: put the config.yaml of a run", "convert", folder / "dcp", tmp_path / "x")


def test_a_dcp_index_that_would_run_code_is_refused(folder, found, tmp_path):
    import pickle
    import shutil

    shutil.copytree(folder / "dcp", tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(GPT))
    with pytest.raises(
        UserError, match=r"is no whole checkpoint of torch\.distributed\.checkpoint: it names vspdf\.model\.GPT"
    ):
        sharded.read(tmp_path / "dcp")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_examples(name):
    """As one process, which is quicker; what two do differently is tested above."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    lines = subprocess.run(run, env=told, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    first, *_, last = (float(line.split("loss ")[1].split(",")[0]) for line in lines)
    assert len(lines) == 3 and last < first
