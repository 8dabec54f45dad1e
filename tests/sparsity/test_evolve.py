"""Masks that move: `Pattern.exchange`, and `vspdf.evolve` against a masked-dense reference."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import vspdf
from vspdf.errors import UserError
from vspdf.kernels import cpu
from vspdf.pattern import Pattern
from vspdf.sparsity import evolve as moving
from vspdf.sparsity.layer import sparse_layers


def test_exchange_drops_and_adds_and_says_what_cannot_be():
    pattern = Pattern.random((6, 8), 0.5, seed=1)
    kept, masked = pattern.positions(), torch.from_numpy(np.flatnonzero(~pattern.mask().view(-1).numpy()))
    found = pattern.exchange(kept[:3], masked[[4, 0]].tolist())
    mask = pattern.mask().view(-1).clone()
    mask[kept[:3]], mask[masked[[4, 0]]] = False, True
    assert found is Pattern.from_mask(mask.view(6, 8)) and found.nnz == pattern.nnz - 1
    assert pattern.exchange([], []) is pattern and pattern.exchange(kept[:2], kept[:2]) is pattern
    for drop, add, message in (
        (masked[:1], [], rf"`drop`: position {int(masked[0])} is masked already"),
        ([], kept[5:6], rf"`add`: position {int(kept[5])} is kept already"),
        ([], [int(masked[0])] * 2, rf"`add` has position {int(masked[0])} twice"),
        ([48], [], r"`drop`: positions lie between 0 and 47, not 48 to 48"),
        ([0.5], [], r"`drop` must be a list of flat positions, not float64"),
    ):
        with pytest.raises(UserError, match=message):
            pattern.exchange(drop, add)


def mlp(sparsity=0.75, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12)).to(dtype)
    vspdf.sparsify(model, sparsity, seed=3)
    return model


def steps(model, optimizer, count=3, begin=0):
    for step in range(begin, begin + count):
        x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def dense(layer, vector):
    return torch.zeros(layer.pattern.shape, dtype=vector.dtype).masked_scatter(layer.pattern.mask(), vector)


def test_new_weights_are_zero_kept_ones_keep_all_and_dropped_ones_nothing():
    model = mlp()
    optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-2)
    steps(model, optimizer)
    model(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    parts = lambda layer: {  # noqa: E731
        "weight": layer.values.detach(), "grad": layer.values.grad, **{
            key: optimizer.state[layer.values][key] for key in ("exp_avg", "exp_avg_sq")
        },
    }  # fmt: skip
    layers = sparse_layers(model)
    was = {name: {key: dense(layer, part) for key, part in parts(layer).items()} for name, layer in layers.items()}
    bias = layers["0"].bias
    before = vspdf.evolve(model, optimizer, 0.3, seed=5)
    for name, layer in layers.items():
        old, new = before[name].mask(), layer.pattern.mask()
        count = int(0.3 * before[name].nnz)
        assert layer.pattern.nnz == before[name].nnz and int((old & ~new).sum()) == int((new & ~old).sum()) == count
        gone, stay = was[name]["weight"][old & ~new].abs(), was[name]["weight"][old & new].abs()
        assert gone.max() <= stay.min()
        for key, part in parts(layer).items():
            assert torch.equal(dense(layer, part), was[name][key] * (old & new)), key
        assert int(optimizer.state[layer.values]["step"]) == 3 and layer.values in set(
            optimizer.param_groups[0]["params"]
        )
    assert layers["0"].bias is bias
    steps(model, optimizer, begin=3)
    assert bool((dense(layers["0"], layers["0"].values.detach())[layers["0"].pattern.mask()] != 0).all())


def test_a_seed_a_layer_and_a_state_give_one_mask_and_ties_go_by_position():
    masks = []
    for seed in (5, 5, 6):
        model = mlp()
        vspdf.evolve(model, None, 0.5, seed=seed)
        masks.append([layer.pattern for layer in sparse_layers(model).values()])
    assert masks[0] == masks[1] and masks[0][0] is not masks[2][0]
    model = mlp()
    layer = model[0]
    with torch.no_grad():
        layer.values.fill_(1.0)
    kept, free = layer.pattern.positions(), np.flatnonzero(~layer.pattern.mask().view(-1).numpy())
    scores = {"0": torch.zeros(30, 12), "2": torch.zeros(12, 30)}
    scores["0"].view(-1)[free[50]] = 1.0
    vspdf.evolve(model, None, 0.1, grow=scores)
    count = int(0.1 * len(kept))
    mask = layer.pattern.mask().view(-1)
    assert not mask[kept[:count]].any() and mask[kept[count:]].all()
    assert mask[free[50]] and mask[free[: count - 1]].all() and int(mask[free[count - 1 :]].sum()) == 1


def test_what_grows_by_scores_is_what_scores_most():
    model, scores = mlp(), {"0": torch.rand(30, 12), "2": torch.rand(12, 30)}
    before = vspdf.evolve(model, None, 0.4, grow=scores)
    for name, layer in sparse_layers(model).items():
        new = layer.pattern.mask() & ~before[name].mask()
        never = ~layer.pattern.mask() & ~before[name].mask()
        assert scores[name][new].min() >= scores[name][never].max()


@pytest.mark.parametrize(
    "scored",
    [lambda at: 1 + 1e-12 * at, lambda at: 1e39 * (1 + at), lambda at: 1e-50 * at, lambda at: (2**30 + at).long(),
     lambda at: (at / 1024).half()],
    ids=["close", "large", "small", "integers", "half"],
)  # fmt: skip
def test_scores_are_told_apart_as_they_are(scored):
    model = mlp()
    scores = {str(i): scored(torch.arange(360, dtype=torch.float64)).view(model[i].pattern.shape) for i in (0, 2)}
    before = vspdf.evolve(model, None, 0.3, grow=scores)
    for name, layer in sparse_layers(model).items():
        old, new = before[name].mask().view(-1), layer.pattern.mask().view(-1)
        grown, free = torch.nonzero(new & ~old).view(-1), torch.nonzero(~old).view(-1)
        assert torch.equal(grown, free[-len(grown) :]) and len(grown) == int(0.3 * layer.pattern.nnz)


def test_a_full_layer_and_fractions_at_the_ends():
    model = mlp(0.01)
    before = vspdf.evolve(model, None, 1.0)  # three or four places are free: no more can move
    for name, layer in sparse_layers(model).items():
        free = ~before[name].mask()
        assert layer.pattern.nnz == before[name].nnz and layer.pattern.mask()[free].all()
    values = [layer.values for layer in sparse_layers(model).values()]
    assert vspdf.evolve(model, None, 0.0) == {name: layer.pattern for name, layer in sparse_layers(model).items()}
    assert [layer.values for layer in sparse_layers(model).values()] == values


@pytest.mark.parametrize(
    "wrong, message",
    {
        "fraction": ({"drop_fraction": 1.5}, r"drop_fraction must lie in \[0, 1\], not 1.5"),
        "text": ({"drop_fraction": "0.3"}, r"drop_fraction must be a number in \[0, 1\], not '0.3'"),
        "None": ({"grow": None}, r"grow must be 'random', or a mapping from layer name to scores, not NoneType"),
        "array": ({"grow": {"0": np.ones((30, 12))}}, r"scores of '0' must be a torch.Tensor, not ndarray"),
        "word": ({"grow": "best"}, r"grow = 'best' is not known"),
        "missing": ({"grow": {"0": torch.ones(30, 12)}}, r"no scores for layer '2'"),
        "unknown": ({"grow": {"1": torch.ones(30, 12)}}, r"'1' is no sparse layer"),
        "shape": ({"grow": dict.fromkeys("02", torch.ones(12, 30))}, r"expected \(out_features, in_features\) = "),
        "complex": (
            {"grow": {"0": torch.ones(30, 12, dtype=torch.complex64), "2": torch.ones(12, 30)}},
            r"scores of '0' are complex: expected real numbers",
        ),
        "NaN": ({"grow": {"0": torch.full((30, 12), torch.nan), "2": torch.ones(12, 30)}}, r"scores of '0' hold NaN"),
    }.values(),
    ids=["fraction", "text", "None", "array", "word", "missing", "unknown", "shape", "complex", "NaN"],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(wrong, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        vspdf.evolve(model, None, **{"drop_fraction": 0.3, **wrong})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(UserError, match=r"evolve found no sparse layer"):
        vspdf.evolve(nn.Linear(2, 2), None, 0.3)


@pytest.mark.parametrize("share", [0.02, 0.6, 0.97], ids=["few", "many", "nearly all"])
def test_every_free_position_is_as_likely_as_any_other(share):
    taken = np.zeros(400, dtype=bool)
    taken[::3] = True
    count, hits = int(share * 266), np.zeros(400)
    random = np.random.default_rng(0)
    for _ in range(600):
        found = moving.draw(taken, count, random)
        assert len(found) == len(set(found.tolist())) == count
        hits[found] += 1
    free = hits[~taken]
    assert hits[taken].sum() == 0
    expected = 600 * count / len(free)
    chi = ((free - expected) ** 2 / expected).sum() / (1 - count / len(free))
    assert abs(chi - len(free)) < 5 * np.sqrt(2 * len(free))


VALUES = {
    "normal": lambda n, draw: draw.standard_normal(n),
    "few different": lambda n, draw: draw.integers(-3, 4, n) / 7,
    "all equal": lambda n, draw: np.full(n, -0.5),
    "one bin": lambda n, draw: 1e-3 * (1 + 1e-6 * draw.standard_normal(n)),
    "tiny and huge": lambda n, draw: draw.choice([0.0, -0.0, 1e-40, -1e-45, 1e38, np.inf, -np.inf, np.nan], n),
}


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 5), (8, 8), (63, 65), (512, 640), (701, 503)], ids=str)
@pytest.mark.parametrize("kind", VALUES)
def test_the_smallest_go_and_of_equal_ones_the_first(kind, shape, threads):
    pattern = Pattern.random(shape, 0.4, seed=3)
    draw = np.random.default_rng(len(kind))
    values = torch.from_numpy(VALUES[kind](pattern.nnz, draw).astype(np.float32))
    for count in {0, 1, pattern.nnz // 3, pattern.nnz - 1, pattern.nnz}:
        bits = pattern.bits.copy()
        cpu.extension().drop_lowest(bits, pattern.numel, values.data_ptr(), pattern.nnz, count, threads)
        left = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        order = np.argsort(np.abs(values.numpy()), kind="stable")  # NaN last
        gone = pattern.positions().numpy()[order[:count]]
        assert np.array_equal(left, np.setdiff1d(pattern.positions().numpy(), gone))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape, sparsity", [((7, 9), 0.5), ((64, 129), 0.9), ((33, 70), 0.02), ((700, 601), 0.7)], ids=str
)
def test_compiled_and_plain_ways_agree(monkeypatch, shape, sparsity, threads):
    def moved(built):
        torch.set_num_threads(threads)
        monkeypatch.setattr(cpu, "_C", kept if built else None)
        monkeypatch.setattr(cpu, "_missing", "left out", raising=False)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(shape[1], shape[0]))
        vspdf.sparsify(model, sparsity, seed=1)
        with torch.no_grad():  # many equal ones, zeros of both signs among them
            model[0].values.copy_((model[0].values * 30).round() / 30)
        before = model[0].values.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.state[model[0].values]["momentum_buffer"] = before + 1
        for seed in range(3):
            vspdf.evolve(model, optimizer, 0.4, seed=seed)
        state = optimizer.state[model[0].values]["momentum_buffer"]
        return model[0].pattern, model[0].values.detach(), state

    kept, usual = cpu._C, torch.get_num_threads()
    assert kept is not None
    try:
        (pattern, values, state), (other, plain, theirs) = moved(True), moved(False)
    finally:
        torch.set_num_threads(usual)
    assert pattern is other and torch.equal(values, plain) and torch.equal(state, theirs)


@pytest.mark.skipif(cpu.isa() != "avx512", reason="code is generated where AVX-512 is")
def test_pages_that_the_code_of_old_masks_has_left_are_taken_again():
    patterns = [Pattern.random((256, 320), 0.75, seed=seed) for seed in range(4)]
    values, x = torch.ones(patterns[0].nnz), torch.randn(200, 320)
    exact = [(x.double() @ p.mask().double().T).float() for p in patterns]
    kept = []
    for _ in range(6):
        for pattern, y in zip(patterns, exact, strict=True):
            torch.testing.assert_close(cpu.forward(x, values, None, pattern)[0], y, rtol=1e-5, atol=1e-4)
            pattern.packed.clear()
        kept.append(cpu.extension().scratch_nbytes())
    assert kept[-1] == kept[1]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 40), (500, 611)], ids=str)
@pytest.mark.parametrize("before, after", [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0), (1.0, 0.0), (0.02, 0.97), (1.0, 1.0)])
def test_a_vector_moves_from_one_mask_to_another(before, after, shape, threads):
    old, new = Pattern.random(shape, before, seed=1), Pattern.random(shape, after, seed=2)
    dense = torch.randn(old.numel) * old.mask().view(-1)
    values, exact = dense[old.positions()], dense[new.positions()]
    several, found = [values, -values, 2 * values], [torch.full((new.nnz,), float("nan")) for _ in range(3)]
    cpu.extension().moved(
        [to.data_ptr() for to in found], [v.data_ptr() for v in several], old.bits, new.bits, old.numel, old.nnz,
        new.nnz, threads,
    )  # fmt: skip
    assert all(map(torch.equal, found, [exact, -exact, 2 * exact]))
    apart = torch.stack([values, values], 1)[:, 1]  # not contiguous
    move = moving._Move(old, new, [*several, apart])
    assert all(map(torch.equal, [move(v) for v in (*several, apart) * 2], [exact, -exact, 2 * exact, exact] * 2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(moving._Move(old, new)(values.to(dtype)), exact.to(dtype)), dtype


def test_frozen_layers_keep_their_masks(mlp):
    model = mlp()
    vspdf.sparsify(model, 0.5)
    model[0].values.requires_grad_(False)
    before, values = model[0].pattern, model[0].values.detach().clone()
    assert list(vspdf.evolve(model, None, 0.5)) == ["2"]
    assert model[0].pattern is before and torch.equal(model[0].values, values)
    model[2].values.requires_grad_(False)
    with pytest.raises(UserError, match="all are frozen"):
        vspdf.evolve(model, None, 0.5)
