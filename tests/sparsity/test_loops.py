"""Phases in loops of others: called more often than needed, only where due, by other ways of taking a step, sharded."""

import json
import logging
import subprocess
import sys

import accelerate
import pytest
import torch

import vspdf
from vspdf.errors import UserError

STEPS = 35


def moving(algorithm, **more):
    return vspdf.Phases([vspdf.Phase(sparsity=0.75, steps=100, algorithm=algorithm, update={"freq": 10}, **more)])


def trained(phases, model, calls):
    """A model after some steps; `calls` has `at` called before one."""
    phases.start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        calls(phases, step, lambda step=step: phases.at(step, model, optimizer))
        model(torch.randn(8, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        phases.step(optimizer)
        optimizer.zero_grad()
    return model


CALLS = {
    "four times a step": lambda phases, step, at: [at() for _ in range(4)],
    "where due": lambda phases, step, at: phases.due(step) and at(),
}


@pytest.mark.parametrize("algorithm", ["set", "rigl", "gmp"])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_called_more_often_or_only_where_due_is_the_same_run(calls, algorithm, mlp):
    more = {"schedule": "power", "sparsity_end": 0.9} if algorithm == "gmp" else {}
    found, wanted = moving(algorithm, **more), moving(algorithm, **more)
    once = trained(wanted, mlp(), lambda phases, step, at: at())
    other = trained(found, mlp(), calls)
    assert found.turnover.updates == wanted.turnover.updates == 3
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), other.parameters(), strict=True))


def test_masks_have_changed_the_first_time_a_step_is_asked_about(mlp):
    model, phases = mlp(), vspdf.Phases([(0.75, 2), (0.0, 2)])
    phases.start(model)
    assert phases.due(2) and phases.at(2, model)
    assert not phases.due(2) and not phases.at(2, model)


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled before": lambda model: torch.compile(model, backend="eager"),
    "DDP": torch.nn.parallel.DistributedDataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
def test_a_wrapper_of_the_model_may_be_handed_over(algorithm, wrap, mlp, group):
    found = []
    for wrapped in (False, True):
        moves = {} if algorithm == "static" else {"algorithm": algorithm, "update": {"freq": 2}}
        first = vspdf.Phase(sparsity=0.75, steps=6, layers={"0": 0.5}, **moves)
        model, phases = mlp(), vspdf.Phases([first, vspdf.Phase(sparsity=0.25, steps=9)])
        net = WRAPPERS[wrap](model) if wrapped else model
        phases.start(net if wrap == "compiled before" else model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(8):
            phases.at(step, model if wrap == "compiled before" else net, optimizer)
            model(torch.randn(8, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            phases.step(optimizer)
            optimizer.zero_grad()
        found.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("asks", ["at", "due"])
def test_steps_that_go_back_are_refused(asks, mlp):
    model, phases = mlp(), vspdf.Phases([(0.75, 6), (0.25, 4)])

    def ask(step):
        return phases.at(step, model) if asks == "at" else phases.due(step)

    phases.start(model)
    for step in range(8):
        phases.at(step, model)
    with pytest.raises(UserError, match=r"step 0 comes after step 7\. Steps count over the whole training, not"):
        ask(0)
    assert not ask(7) and not ask(8)
    state = model.state_dict()
    phases.restore(again := mlp(), state, 7)
    with pytest.raises(UserError, match="step 0 comes after step 7"):
        ask(0)
    phases.at(7, again)
    phases.start(mlp())
    assert not ask(0)


def test_an_update_that_was_passed_over_is_named_once(mlp, caplog):
    model, phases = mlp(), moving("set")
    phases.start(model)
    with caplog.at_level(logging.WARNING, "vspdf"):
        for step in range(0, 60, 3):
            phases.at(step, model)
    assert [record.getMessage() for record in caplog.records] == [
        "Phases.at was not called for step 10, where masks were to move: they stayed."
    ]


# -- ramps of revived weights -----------------------------------------------------------------------------------------

WAYS = {
    "optimizer.step": lambda phases, optimizer: optimizer.step(),
    "a GradScaler": lambda phases, optimizer: torch.amp.GradScaler("cpu", enabled=False).step(optimizer),
    "phases.step": lambda phases, optimizer: phases.step(optimizer),
}


@pytest.mark.parametrize("step", WAYS.values(), ids=WAYS)
def test_revived_weights_ramp_up_whoever_takes_the_step(step, mlp):
    model, phases = mlp(), vspdf.Phases([(0.75, 5), (0.0, 20)], revived_warmup=9)
    phases.start(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    phases.at(5, model, optimizer)
    optimizer.register_step_post_hook(lambda *_: None)  # somebody's, after ours
    for i in range(12):
        before = model[0].weight.detach().clone()
        model(torch.ones(8, 12)).sum().backward()
        revived, gradient = ~phases.before["0"].mask(), model[0].weight.grad.clone()
        step(phases, optimizer)
        optimizer.zero_grad()
        ramp = torch.where(revived, min(1.0, (i + 1) / 10), 1.0)
        torch.testing.assert_close(before - model[0].weight, 0.1 * gradient * ramp, rtol=1e-4, atol=1e-6)
    phases.at(6, model, optimizer)
    assert phases.revived.done == 9 and not optimizer._optimizer_step_pre_hooks


def test_a_ramp_goes_on_with_parameters_that_were_assigned(mlp):
    model, phases = mlp(), vspdf.Phases([(0.75, 5), (0.0, 20)], revived_warmup=9)
    phases.start(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    phases.at(5, model, optimizer)
    state, ramp = model.state_dict(), phases.ramp
    again, later = mlp(), vspdf.Phases([(0.75, 5), (0.0, 20)], revived_warmup=9)
    later.restore(again, state, 6, ramp)
    again.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    start = again[0].weight.detach().clone()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again(torch.ones(8, 12)).sum().backward()
    revived = ~phases.before["0"].mask()
    later.step(optimizer)
    moved = (again[0].weight - start)[revived]
    torch.testing.assert_close(moved, -0.01 * again[0].weight.grad[revived], rtol=1e-4, atol=1e-6)


# -- accelerate -------------------------------------------------------------------------------------------------------

PASSES_OVER = {
    "rigl": [vspdf.Phase(algorithm="rigl", sparsity=0.75, steps=20, update={"freq": 2})],
    "a ramp": [(0.75, 2), vspdf.Phase(steps=20, revived_warmup=3)],
}


@pytest.mark.parametrize("stages", PASSES_OVER.values(), ids=PASSES_OVER)
def test_calls_that_accelerate_passes_over_are_no_steps(stages, mlp):
    """Four micro-batches of one step: what is trained is what a loop without accelerate trains."""
    found, state = [], accelerate.state.GradientState
    for wrapped in (False, True):
        state._reset_state()
        made = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
        model, phases = mlp(), vspdf.Phases(stages)
        phases.start(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        used = made.prepare(optimizer) if wrapped else optimizer
        for batch in range(28):
            with made.accumulate(model):
                phases.at(batch // 4, model, used)
                x = torch.randn(8, 12, generator=torch.Generator().manual_seed(batch))
                (model(x).square().mean() / 4).backward()
                if wrapped or made.sync_gradients:
                    phases.step(used)
                    used.zero_grad()
        found.append((phases.revived and phases.revived.done, list(model.parameters())))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_step_that_accelerates_scaler_skips_is_none(mlp):
    model, phases = mlp(), vspdf.Phases([(0.75, 2), (0.0, 20)], revived_warmup=9)
    phases.start(model)
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = accelerate.optimizer.AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    done = []
    for step, factor in enumerate([1.0, 1.0, 1.0, float("inf"), 1.0]):
        phases.at(step, model, optimizer)
        scaler.scale(model(torch.ones(8, 12)).sum() * factor).backward()
        phases.step(optimizer)
        optimizer.zero_grad()
        done.append(phases.revived and phases.revived.done)
    assert done == [None, None, 1, 1, 2]


# -- sharded ----------------------------------------------------------------------------------------------------------

SHARDED = """
import json, torch, vspdf
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh, found = init_device_mesh("cpu", (1,)), {}
for algorithm in ("set", "rigl"):
    for shard in (False, True):
        torch.manual_seed(0)
        moving = vspdf.Phase(sparsity=0.75, steps=30, algorithm=algorithm, update={"freq": 10})
        phases = vspdf.Phases([moving, (0.0, 10)], revived_warmup=4)
        model = nn.Sequential(nn.Linear(48, 64))
        phases.start(model)
        if shard:
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if shard:
            try:
                vspdf.evolve(model, optimizer, 0.3)
            except vspdf.UserError as error:
                found["refused"] = str(error)
        for step in range(33):
            if phases.due(step):
                with vspdf.gathered(model, optimizer):
                    phases.at(step, model, optimizer)
            model(torch.randn(2, 48, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            phases.step(optimizer)
            optimizer.zero_grad()
        with vspdf.gathered(model):
            found[f"{algorithm} {shard}"] = [phases.revived.done, model[0].weight.flatten().tolist()]
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_a_sharded_model_moves_its_masks_where_it_is_gathered():
    run = subprocess.run([sys.executable, "-P", "-c", SHARDED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert "the weights are sharded over processes" in found["refused"]
    for algorithm in ("set", "rigl"):
        assert found[f"{algorithm} True"] == found[f"{algorithm} False"] and found[f"{algorithm} True"][0] == 3
