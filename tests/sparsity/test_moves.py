"""Phases whose masks move: every algorithm against a masked-dense loop in float64, and resumed."""

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import vspdf
from vspdf import ledger
from vspdf.pattern import kept_count
from vspdf.sparsity import evolve as moving
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.scores import DenseGradients

SIZES = {"0": (30, 12), "2": (12, 30)}
RATE, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.95), 1e-9


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12)).to(dtype)


def batch(step, part):
    x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2 * step + part))
    return x * torch.linspace(0.1, 3, 12)  # columns of different size: RigL's scores are normalised by them


def loss(model, step, part):
    x = batch(step, part)
    return (model(x) - x.roll(1, 1)).square().mean() / 2


def adamw(model):
    return torch.optim.AdamW(vspdf.parameter_groups(model, DECAY), lr=RATE, betas=BETAS, eps=EPS)


def loop(phases, model, optimizer, steps):
    for step in steps:
        phases.at(step, model, optimizer)
        for part in range(2):  # micro-batches
            loss(model, step, part).backward()
        phases.step(optimizer)
        optimizer.zero_grad()


class Reference:
    """Dense weights under masks, AdamW by hand, and the rules of moving masks in the plainest words."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        vspdf.densify(self.model)
        layers = sparse_layers(model)
        self.masks = {
            name: layers[name].pattern.mask() if name in layers else torch.ones(SIZES[name], dtype=torch.bool)
            for name in SIZES
        }
        self.moments = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in self.model.parameters()}

    def step(self, step):
        inputs = {}
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: inputs.setdefault(name, []).append(args[0].detach())
            )
            for name in SIZES
        ]
        self.model.zero_grad()
        for part in range(2):
            loss(self.model, step, part).backward()
        for hook in hooks:
            hook.remove()
        self.gradients = {name: self.model.get_submodule(name).weight.grad.clone() for name in SIZES}
        self.rms = {name: torch.cat(x).square().mean(0).sqrt() for name, x in inputs.items()}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                mask = self.masks[name.split(".")[0]] if p.dim() == 2 else True
                first, second = self.moments[p]
                gradient = p.grad * mask
                first.mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient)
                second.mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient**2)
                p.mul_(1 - RATE * DECAY * (p.dim() == 2))
                unbiased = [m / (1 - b ** (step + 1)) for m, b in zip((first, second), BETAS, strict=True)]
                p.sub_(RATE * unbiased[0] / (unbiased[1].sqrt() + EPS))

    @torch.no_grad()
    def move(self, step, fraction, sparsity, algorithm, share=0.25):
        for name, mask in self.masks.items():
            weight = self.model.get_submodule(name).weight
            flat, target = mask.view(-1), kept_count(mask.numel(), sparsity)
            old = flat.clone()
            keep = min(int(flat.sum()), target)
            keep -= int(fraction * keep)
            order = sorted(flat.nonzero().view(-1).tolist(), key=lambda at: (abs(weight.view(-1)[at]), at))
            flat[order[: len(order) - keep]] = False
            count, random = target - keep, np.random.default_rng([7, step, zlib.crc32(name.encode())])
            drawn = count if algorithm == "set" else int(share * count)
            taken = old.clone()
            if algorithm == "rigl":
                score = (self.gradients[name].abs() / self.rms[name]).view(-1)
                free = sorted((~old).nonzero().view(-1).tolist(), key=lambda at: (-score[at], at))
                flat[free[: count - drawn]] = taken[free[: count - drawn]] = True
            if algorithm != "gmp":
                flat[torch.from_numpy(moving.draw(taken.numpy(), drawn, random))] = True
            stays = (old & flat).view(mask.shape)
            for tensor in (weight, *self.moments[weight]):
                tensor.mul_(stays)


POWER = lambda a, b, u: b + (a - b) * (1 - u) ** 3  # noqa: E731
ALGORITHMS = {
    "set": (
        {"algorithm": "set", "sparsity": 0.75, "drop_fraction": {"type": "cosine", "init": 0.5, "half_period": 40},
         "update": {"freq": 5, "stop": 40}},
        lambda step: (0.25 * (1 + math.cos(math.pi * step / 40)), 0.75),
    ),
    "rigl": (
        {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 5, "stop": 40}},
        lambda step: (0.3, 0.75),
    ),
    "gmp": (
        {"algorithm": "gmp", "sparsity": 0.0, "schedule": "power", "sparsity_end": 0.75,
         "update": {"freq": 5, "stop": 40}},
        lambda step: (0.0, round(POWER(0.0, 0.75, step / 35), 12)),
    ),
    "GraNet": (
        {"algorithm": "rigl", "sparsity": 0.5, "schedule": "linear", "sparsity_end": 0.75,
         "update": {"freq": 5, "stop": 40}},
        lambda step: (0.3, round(0.5 + 0.25 * step / 35, 12)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("settings, rule", ALGORITHMS.values(), ids=ALGORITHMS)
def test_fifty_steps_equal_a_masked_dense_loop(settings, rule):
    model, phases = mlp(), vspdf.Phases([vspdf.Phase(steps=50, **settings)], seed=7)
    phases.start(model)
    reference, optimizer = Reference(model), adamw(model)
    for step in range(50):
        if step and step % 5 == 0 and step < 40:
            reference.move(step, *rule(step), settings["algorithm"])
        loop(phases, model, optimizer, [step])
        reference.step(step)
    for name, layer in sparse_layers(model).items():
        mask = reference.masks[name]
        assert torch.equal(layer.pattern.mask(), mask), name
        weight = reference.model.get_submodule(name).weight.detach()
        torch.testing.assert_close(layer.to_linear().weight.detach(), weight * mask, rtol=1e-9, atol=1e-12)
    assert len(sparse_layers(model)) == 2 and phases.sparsity == pytest.approx(rule(35)[1])
    assert phases.turnover.updates == (6 if settings["algorithm"] == "gmp" else 7)  # the first of GMP makes the masks


STOPS = (3, 5, 10, 12, 40, 41)


@pytest.mark.parametrize("settings, rule", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_loop_that_was_stopped_anywhere_ends_in_the_same_weights(settings, rule):
    stages = [vspdf.Phase(steps=44, **settings), (0.0, 6)]
    model, phases = mlp(), vspdf.Phases(stages, seed=7)
    phases.start(model)
    optimizer, saved = adamw(model), {}
    for step in range(50):
        if step in STOPS:
            saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        loop(phases, model, optimizer, [step])
    assert not sparse_layers(model)
    for stop, (weights, moments) in saved.items():
        again, phases = mlp(), vspdf.Phases(stages, seed=7)
        phases.restore(again, weights, stop)
        again.load_state_dict(weights)
        optimizer = adamw(again)
        optimizer.load_state_dict(moments)
        loop(phases, again, optimizer, range(stop, 50))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), stop


def from_dense(wrap=lambda model: model, **options):
    """A model pruned from dense up to a step, and one that was restored there."""
    stages = [vspdf.Phase(steps=50, **ALGORITHMS["gmp"][0])]
    model, phases = wrap(mlp()), vspdf.Phases(stages, **options)
    phases.start(model)
    for step in range(12):
        phases.at(step, model)
    again = wrap(mlp())
    vspdf.Phases(stages, **options).restore(again, model.state_dict(), 12)
    return [list(sparse_layers(each).values()) for each in (model, again)]


def test_layers_that_become_sparse_take_backend_and_memory_of_the_phases():
    for layers in from_dense(backend="cpu", memory="low"):
        assert [(layer.backend, layer.memory) for layer in layers] == [("cpu", "low")] * 2


def test_compiled_models_become_sparse_and_are_restored_as_others_are():
    plain, compiled = from_dense(), from_dense(torch.compile)
    patterns = [[layer.pattern for layer in layers] for layers in (*plain, *compiled)]
    assert patterns == [patterns[0]] * 4 and len(patterns[0]) == 2 and patterns[0][0].sparsity > 0.4


def test_the_ledger_counts_the_dense_gradient_as_executed_on_update_steps_only():
    model, phases = mlp(), vspdf.Phases([vspdf.Phase(steps=20, algorithm="rigl", sparsity=0.75, update={"freq": 4})])
    phases.start(model)
    optimizer, seen = adamw(model), {}
    for step in range(9):
        with ledger.counting() as tally:
            loop(phases, model, optimizer, [step])
        if "scores" in tally.products:
            seen[step] = tally.products["scores"]
    assert list(seen) == [3, 7]  # the steps before updates 4 and 8
    for count in seen.values():
        assert (count.dense, count.useful, count.executed) == (0, 0, 2 * 16 * (360 + 360))


def test_a_loop_of_plain_optimizer_steps_moves_masks_too():
    ends = []
    for own in (True, False):
        model, phases = (
            mlp(),
            vspdf.Phases([vspdf.Phase(steps=20, algorithm="rigl", sparsity=0.75, update={"freq": 4})]),
        )
        phases.start(model)
        optimizer = adamw(model)
        for step in range(10):
            phases.at(step, model, optimizer)
            loss(model, step, 0).backward()
            phases.step(optimizer) if own else optimizer.step()
            optimizer.zero_grad()
        ends.append([layer.pattern for layer in sparse_layers(model).values()])
    assert ends[0] == ends[1]


def test_masks_of_the_cerebras_stack_start_dense_and_never_get_denser_than_asked():
    rules = {"rules": "cstorch", "count": "truncate", "drop_fraction": 0.3, "update": {"freq": 4, "start": 4}}
    model, phases = mlp(), vspdf.Phases([vspdf.Phase(steps=40, algorithm="set", sparsity=0.9, **rules)])
    phases.start(model)
    optimizer, found = adamw(model), []
    for step in range(30):
        loop(phases, model, optimizer, [step])
        found.append(round(phases.sparsity * 720) if sparse_layers(model) else 0)
    kept = [720]
    while kept[-1] > 70:
        kept.append(2 * max(35, int(0.7 * (kept[-1] // 2))))  # int((1 - 0.9) * 360) are to be left of each
    assert [720 - n for n in found[::4]] == (kept + [70] * 8)[:8]
    assert phases.stages[0].sparsity == 0.0 and phases.stages[1].start == 4


SLOW = {
    "a late start": ({"sparsity": 0.75, "update": {"freq": 5, "start": 5}}, [0.0, 0.3, 0.51, 0.657]),
    "values in turn": ({"sparsity": [0.5, 0.75], "update": {"freq": 5}}, [0.5, 0.65, 0.5, 0.65]),
    "fractions in turn": (
        {"sparsity": 0.75, "update": {"freq": 5, "start": 5}, "drop_fraction": [0.5, 0.1]}, [0.0, 0.5, 0.55, 0.75]
    ),
    "nothing dropped": ({"sparsity": 0.75, "update": {"freq": 5, "start": 5}, "drop_fraction": 0.0}, [0.0]),
    "rigl": ({"algorithm": "rigl", "sparsity": 0.4, "update": {"freq": 5, "start": 5}}, [0.0, 0.3, 0.4]),
}  # fmt: skip


@pytest.mark.parametrize("settings, expected", SLOW.values(), ids=SLOW)
def test_the_sparsity_that_figures_go_by_is_what_an_update_of_the_cerebras_stack_reaches(settings, expected):
    phase = vspdf.Phase(**{"steps": 20, "algorithm": "set", "rules": "cstorch", "count": "truncate", **settings})
    assert [stage.sparsity for stage in phase.resolved("phase").stages()] == pytest.approx(expected)
    model, phases, found = mlp(), vspdf.Phases([phase]), []
    phases.start(model)
    optimizer = adamw(model)
    for step in range(20):
        loop(phases, model, optimizer, [step])
        found.append(phases.sparsity)
    assert found[::5] == pytest.approx((expected + expected[-1:] * 3)[:4], abs=0.01)


def test_a_switch_to_rules_of_the_cerebras_stack_is_to_the_sparsity_asked_for():
    second = vspdf.Phase(steps=8, algorithm="set", rules="cstorch", sparsity=0.5, update={"freq": 4})
    model, phases = mlp(), vspdf.Phases([(0.0, 4), second])
    phases.start(model)
    loop(phases, model, adamw(model), range(5))
    assert phases.sparsity == pytest.approx(0.5, abs=0.01)


def test_updates_leave_nothing_behind():
    """Live patterns, and with them the kernels' plans, are those of the last masks."""
    from vspdf import pattern as patterns

    model = mlp(torch.float32)
    vspdf.sparsify(model, 0.75)
    optimizer = adamw(model)
    x = torch.randn(64, 12)
    alive = []
    for update in range(60):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        vspdf.evolve(model, optimizer, 0.3, seed=update)
        alive.append(len(patterns._alive))
    assert alive[-1] == alive[2] and len(optimizer.state) == len(list(model.parameters()))


def test_growth_does_not_collapse_onto_a_column_of_large_activations():
    shares = {}
    for rules in ("vspdf", "cstorch"):
        model = mlp()
        settings = {"algorithm": "rigl", "sparsity": 0.75, "rules": rules, "update": {"freq": 2}}
        phases = vspdf.Phases([vspdf.Phase(steps=20, **settings)])
        phases.start(model)
        optimizer = adamw(model)
        first = model[0].pattern.mask()
        for step in range(2):
            phases.at(step, model, optimizer)
            x = batch(step, 0)
            x[:, 3] *= 30
            (model(x) - x.roll(1, 1)).square().mean().backward()
            phases.step(optimizer)
            optimizer.zero_grad()
        grown = model[0].pattern.mask() & ~first
        shares[rules] = float(grown[:, 3].sum() / grown.sum())
    assert shares["cstorch"] > 0.4 and shares["vspdf"] < 0.2, shares


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_no_mask_and_says_so(bad, caplog):
    model, phase = blocks(), vspdf.Phase(sparsity=0.9, steps=100, algorithm="rigl", update={"freq": 10, "stop": 21})
    phases = vspdf.Phases([phase])
    phases.start(model)
    optimizer = torch.optim.AdamW(model.parameters())
    first = [layer.pattern for layer in sparse_layers(model).values()]
    for step in range(21):
        phases.at(step, model, optimizer)
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        if step == 9:
            x[0, 0] = bad
        value = model(x).square().mean()
        value.backward()
        if value.isfinite():
            phases.step(optimizer)
        optimizer.zero_grad()
        now = [layer.pattern for layer in sparse_layers(model).values()]
        assert [p.nnz for p in now] == [102, 102] and (now == first) == (step < 19)
    assert [record.getMessage() for record in caplog.records] == [
        f"RigL: the gradient of '{name}' is not finite: its mask stays as it is." for name in "14"
    ]


def test_the_lowest_are_as_many_as_asked_for_and_nan_counts_as_the_largest():
    values = np.array([np.nan, 3.0, np.nan, -np.inf, np.inf, 3.0])
    for count, wanted in enumerate([[], [3], [1, 3], [1, 3, 5], [1, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]):
        assert sorted(moving.lowest(values, count)) == wanted
    assert sorted(moving.highest(values, values == 3.0, 3)) == [0, 3, 4]


@pytest.mark.parametrize("again", ["start", "resume"])
def test_phases_that_are_used_again_know_nothing_of_the_model_before(again, caplog):
    def trained(phases, seed, stop=8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12)).double()
        if again == "start":
            phases.start(model)
        else:
            vspdf.sparsify(model, 0.75)
            phases.resume(model, 0)
        loop(phases, model, adamw(model), range(stop))
        return model

    stage = vspdf.Phase(steps=20, algorithm="rigl", sparsity=0.75, update={"freq": 4})
    used, fresh = vspdf.Phases([stage]), vspdf.Phases([stage])
    before = trained(used, 1, stop=7)
    used.at(7, before)
    assert used.dense_gradients is not None and used.turnover.updates == 1
    model, wanted = trained(used, 2), trained(fresh, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert used.turnover.figures() == fresh.turnover.figures()
    assert not any(layer._forward_hooks for layer in sparse_layers(before).values())
    assert not caplog.records


@pytest.mark.parametrize("second", ["set", "rigl"])
def test_a_boundary_at_which_no_mask_moves_is_no_update(second):
    shared = {"sparsity": 0.5, "steps": 4, "update": {"freq": 2}}
    model = mlp()
    phases = vspdf.Phases([vspdf.Phase(algorithm="set", **shared), vspdf.Phase(algorithm=second, **shared)])
    phases.start(model)
    loop(phases, model, adamw(model), range(7))
    assert phases.turnover.updates == 2 and phases.turnover.survival < 0.9


CALLED = {
    "by place": lambda layer, x: layer(x),
    "by name": lambda layer, x: layer(input=x),
    "under a hook": lambda layer, x: layer(x),
}


@pytest.mark.parametrize("how", CALLED)
def test_rigl_scores_by_the_layers_own_gradient(how, sparse_one):
    layer = sparse_one(0.5)[0]
    if how == "under a hook":
        layer.register_forward_hook(lambda layer, inputs, output: output * torch.linspace(0.5, 2, 96))
    seen = DenseGradients({"0": layer})
    CALLED[how](layer, torch.randn(4, 48)).square().sum().backward()
    gradient = seen.parameters[0].grad
    torch.testing.assert_close(gradient[layer.pattern.mask()], layer.values.grad)
