"""The compiled forward product and gradient of the input, y = x W^T + b and dx = dy W, against float64."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import torch

from vspdf import _C
from vspdf.errors import UserError
from vspdf.kernels import cpu
from vspdf.pattern import Pattern

ISAS = _C.isas()
LANES = {"avx512": 16, "avx2": 8, "plain": 4}
# What can run: each instruction set's loops, and the code generated for the two that have any.
KERNELS = [f"generated {isa}" for isa in ISAS if isa != "plain"] + ISAS
FEW = 64  # tokens up to which no plan is packed
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
GUARD = 32
PRODUCTS = ["forward", "grad_input"]


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Name of a kernel; plans made by `make_plan(mask, kernel)` in the test use it."""
    monkeypatch.setenv("VSPDF_JIT", "1" if "generated" in request.param else "0")
    return request.param


def bits_of(mask: torch.Tensor) -> np.ndarray:
    bits = np.packbits(mask.numpy().reshape(-1), bitorder="little")
    bits.setflags(write=False)
    return bits


def make_plan(mask: torch.Tensor, kernel: str):
    out_features, in_features = mask.shape
    return _C.Plan(out_features, in_features, bits_of(mask), kernel.split()[-1])


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(out_features, in_features, density, seed=0):
    return torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(seed)) < density


def run(product, plan, x, values, shape, *, bias=None, threads=1, out=None):
    """(result, macs); the output starts as NaN, with NaN guards behind it that must stay."""
    width = shape[0 if product == "forward" else 1]
    size = len(x) * width
    out = torch.full((size + GUARD,), float("nan"), dtype=x.dtype) if out is None else out
    dtype = 0 if x.dtype == torch.float32 else 1
    rest = (len(x), dtype, dtype, threads)
    if product == "forward":
        shift = 0 if bias is None else bias.data_ptr()
        macs = plan.forward(out.data_ptr(), x.data_ptr(), x.stride(0), values.data_ptr(), shift, *rest)
    else:
        macs = plan.grad_input(out.data_ptr(), x.data_ptr(), x.stride(0), values.data_ptr(), *rest)
    assert out[size:].isnan().all(), "wrote past the end"
    return out[:size].view(len(x), width), macs


def reference(product, x, weight, bias=None):
    weight = weight.double().t() if product == "forward" else weight.double()
    return x.double() @ weight + (0 if bias is None else bias.double())


def check(result, wanted, limit=LIMIT[torch.float32]):
    assert not result.isnan().any(), f"{int(result.isnan().sum())} elements of {result.numel()} not written"
    error = (result.double() - wanted).norm()
    assert error <= limit * wanted.norm() + 1e-30, f"relative error {(error / wanted.norm()).item():.2e}"


def both(mask, kernel, tokens, *, dtype=torch.float32, threads=1, bias=True):
    """Runs and checks both products; returns {product: macs}."""
    plan, counts = make_plan(mask, kernel), {}
    weight = (random(*mask.shape, seed=1).to(dtype) * mask).contiguous()
    values = weight[mask].contiguous()
    shift = random(mask.shape[0], seed=2, dtype=dtype) if bias else None
    for product, width in zip(PRODUCTS, reversed(mask.shape), strict=True):
        b = shift if product == "forward" else None
        x = random(tokens, width, seed=3, dtype=dtype)
        result, counts[product] = run(product, plan, x, values, mask.shape, bias=b, threads=threads)
        check(result, reference(product, x, weight, b), LIMIT[dtype])
    return counts


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 8, 15, 16, 17, 33, 63, 64, 65, 80, 127, 129, 256, 300, 515])
def test_token_counts(kernel, tokens):
    macs = both(random_mask(70, 150, 0.2), kernel, tokens)
    assert (macs["forward"] == 0) == (macs["grad_input"] == 0) == (tokens == 0)


@pytest.mark.parametrize("tokens", [37, 97])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 33), (65, 257), (513, 71), (71, 1030)], ids=str)
def test_shapes_and_densities(kernel, shape, density, tokens):
    both(random_mask(*shape, density), kernel, tokens)


@pytest.mark.parametrize("shape", [(50_000, 3), (3, 50_000), (1, 65_536), (65_536, 1)], ids=str)
def test_the_largest_sides(kernel, shape):
    both(random_mask(*shape, 0.5), kernel, 70)


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("shape", [(70_000, 5), (5, 70_000), (3, 140_001)], ids=str)
def test_sides_beyond_sixteen_bits(kernel, shape, tokens):
    mask = random_mask(*shape, 0.3)
    if shape[1] > shape[0]:  # a row whose kept weights begin behind the first 65,536 features
        mask[1, :66_000] = False
    both(mask, kernel, tokens)


def empty_rows(mask):
    mask[::3] = False


def full_rows(mask):
    mask[5:9] = True


def empty_columns(mask):
    mask[:, 64:192] = False


def full_columns(mask):
    mask[:, ::50] = True


def one_block(mask):
    mask[:, 128:] = False
    mask[40:] = False


@pytest.mark.parametrize("change", [empty_rows, full_rows, empty_columns, full_columns, one_block])
@pytest.mark.parametrize("tokens", [20, 300])
def test_uneven_patterns(kernel, change, tokens):
    mask = random_mask(140, 600, 0.1)
    change(mask)
    both(mask, kernel, tokens)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [9, 90, 700])
def test_threads(kernel, threads, tokens):
    """Few tokens split the rows, many the tokens; the result is the same."""
    both(random_mask(200, 700, 0.1), kernel, tokens, threads=threads)


@pytest.mark.parametrize("tokens", [1, 30, 100, 401])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_bfloat16(kernel, density, tokens):
    both(random_mask(130, 290, density), kernel, tokens, dtype=torch.bfloat16)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(kernel):
    mask = torch.ones(1, 1, dtype=torch.bool)
    wide = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, float("nan"), float("inf"), 1e-39] * 20)
    x = torch.ones(len(wide), 2, dtype=torch.bfloat16)
    # a sum of two bfloat16 numbers, 1 + 2^-8 for example, that bfloat16 cannot hold
    x[:, 0], x[:, 1] = wide.bfloat16(), (wide - wide.bfloat16().float()).bfloat16()
    mask = torch.ones(1, 2, dtype=torch.bool)
    ones = torch.ones(2, dtype=torch.bfloat16)
    result, _ = run("forward", make_plan(mask, kernel), x, ones, mask.shape)
    assert torch.equal(result.flatten().nan_to_num(7), x.float().sum(1).bfloat16().nan_to_num(7))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tokens", [21, 200])
def test_strides(kernel, product, tokens):
    """Broadcast rows (stride 0) and rows of a wider matrix."""
    mask = random_mask(60, 100, 0.3)
    weight = random(60, 100, seed=1) * mask
    values, plan = weight[mask], make_plan(mask, kernel)
    width = 100 if product == "forward" else 60
    one = random(1, width, seed=4)
    wide = random(tokens, width + 13, seed=5)
    for x in (one.expand(tokens, width), wide[:, 7 : 7 + width]):
        check(run(product, plan, x, values, mask.shape)[0], reference(product, x, weight))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("offset", range(3))
def test_outputs_off_the_cache_line(kernel, product, offset):
    """Large outputs bypass the caches where they are aligned, and are right where they are not."""
    mask = random_mask(512, 512, 0.05)
    weight = random(512, 512, seed=1) * mask
    x = random(600, 512, seed=2)
    size = 600 * 512
    out = torch.full((size + GUARD + offset,), float("nan"))[offset:]
    check(run(product, make_plan(mask, kernel), x, weight[mask], mask.shape, out=out)[0], reference(product, x, weight))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tokens", [7, 100])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_dropped_positions_are_never_read(kernel, product, tokens, poison):
    """0 x NaN is NaN: features that no kept weight touches may hold anything."""
    mask = random_mask(90, 330, 0.1)
    axis = 1 if product == "forward" else 0
    if axis:
        mask[:, 40:90] = False
    else:
        mask[40:90] = False
    weight = random(90, 330, seed=1) * mask
    x = random(tokens, 330 if axis else 90, seed=2)
    wanted = reference(product, x, weight)
    x[:, 40:90] = poison
    check(run(product, make_plan(mask, kernel), x, weight[mask], mask.shape)[0], wanted)


@pytest.mark.parametrize("tokens", [7, 100])
def test_poison_stays_in_its_token(kernel, tokens):
    mask = random_mask(90, 330, 0.5)
    weight = random(90, 330, seed=1) * mask
    x = random(tokens, 330, seed=2)
    x[3, 5] = float("nan")
    result, _ = run("forward", make_plan(mask, kernel), x, weight[mask], mask.shape)
    assert torch.equal(result.isnan().any(1), torch.arange(tokens) == 3)
    assert torch.equal(result[3].isnan(), mask[:, 5])


def test_executed_multiply_adds_count_the_padding_of_token_lanes_only(kernel):
    mask = random_mask(100, 200, 0.2)
    nnz = int(mask.sum())
    lanes = LANES.get(kernel, 16)
    for tokens in (1, lanes, lanes + 1, 1024):
        for product, macs in both(mask, kernel, tokens, bias=False).items():
            padded = macs / nnz
            if tokens <= 4 and "avx512" in kernel and product == "forward":  # by the mask's bits, lanes of zeros too
                assert tokens <= padded <= tokens * 100 * 208 / nnz
                continue
            assert padded == int(padded), "every kept weight meets whole lines of tokens"
            assert tokens <= padded < 2 * tokens + lanes, product
            if tokens == 1024:
                assert padded == tokens


def test_plan_is_reused_with_new_values(kernel):
    """The plan holds no values: nothing can be stale."""
    mask = random_mask(64, 96, 0.3)
    plan, x = make_plan(mask, kernel), random(80, 96, seed=2)
    for seed in range(3):
        weight = random(64, 96, seed=seed) * mask
        check(run("forward", plan, x, weight[mask], mask.shape)[0], reference("forward", x, weight))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("product", PRODUCTS)
def test_deterministic(kernel, product, threads):
    mask = random_mask(300, 300, 0.2)
    values, plan = random(int(mask.sum()), seed=1), make_plan(mask, kernel)
    for tokens in (12, 500):
        x = random(tokens, 300, seed=2)
        first = run(product, plan, x, values, mask.shape, threads=threads)[0]
        for _ in range(3):
            assert torch.equal(first, run(product, plan, x, values, mask.shape, threads=threads)[0])


def test_several_python_threads(kernel):
    """One plan, built by whichever thread comes first, with other values and tokens in each thread."""
    mask = random_mask(150, 250, 0.1)
    plan, failures = make_plan(mask, kernel), []

    def work(seed):
        try:
            weight = random(150, 250, seed=seed) * mask
            for product, width in (("forward", 250), ("grad_input", 150)):
                for tokens in (5, 70 + seed, 300):
                    x = random(tokens, width, seed=seed)
                    result, _ = run(product, plan, x, weight[mask], mask.shape, threads=2)
                    check(result, reference(product, x, weight))
        except AssertionError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_describe_names_the_kernel_and_why(kernel):
    plan = make_plan(random_mask(64, 96, 0.3), kernel)
    few, many = plan.describe(FEW), plan.describe(FEW + 1)
    for product in PRODUCTS:
        assert "few tokens" in few[product]
        assert ("generated code" if "generated" in kernel else f"row loops ({kernel})") in many[product]
    if kernel == "avx512":
        assert "VSPDF_JIT=0" in many["forward"]


@pytest.mark.parametrize(("density", "code", "loops"), [(0.25, 19, 5), (0.1, 23, 6)], ids=["75%", "90%"])
def test_plan_bytes_a_kept_weight(kernel, density, code, loops):
    """The three products' parts, generated code included; that of AVX2 has three times the instructions."""
    mask = random_mask(3072, 768, density)
    plan = make_plan(mask, kernel)
    cpu.extension().prepare([plan], 2)
    most = loops if "generated" not in kernel else code if kernel == "generated avx512" else 3 * code
    assert plan.nbytes < most * int(mask.sum())


def test_prepared_plans_are_those_of_first_use():
    patterns = [Pattern.random((96, 64), 0.9, seed=seed) for seed in range(5)]
    cpu.prepare(patterns)
    prepared = [pattern.packed["cpu"].nbytes for pattern in patterns]
    for pattern, size in zip(patterns, prepared, strict=True):
        assert size > cpu.extension().Plan(*pattern.shape, pattern.bits).nbytes
        x, grad, values = random(FEW + 1, 64, seed=0), random(FEW + 1, 96, seed=1), random(pattern.nnz, seed=2)
        cpu.forward(x, values, None, pattern)
        cpu.grad_input(grad, values, pattern)
        cpu.grad_values(grad, x, pattern)
        assert pattern.packed["cpu"].nbytes == size


def test_isa_names(monkeypatch):
    bits = bits_of(torch.zeros(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"isa: 'sse9' is no instruction set of the kernels; .* has: .*plain\."):
        _C.Plan(1, 1, bits, "sse9")
    monkeypatch.setenv("VSPDF_ISA", "plain")
    assert _C.Plan(1, 1, bits).isa == "plain"
    monkeypatch.setenv("VSPDF_ISA", "avx9")
    with pytest.raises(ValueError, match="VSPDF_ISA: 'avx9'"):
        _C.Plan(1, 1, bits)
    assert _C.Plan(1, 1, bits, ISAS[0]).isa == ISAS[0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("sse", r"VSPDF_ISA=sse: the kernels know no such instruction set\. Known: avx2, plain\."),
        ("avx215", r"VSPDF_ISA=avx215: .* Did you mean 'avx2'\?"),
        ("avx512", r"VSPDF_ISA=avx512: this machine does not have it, but avx2, plain\."),
    ],
    ids=["unknown", "misspelt", "not here"],
)
def test_an_instruction_set_that_cannot_be_had_is_named(monkeypatch, wanted, message):
    class Older:  # a machine without AVX-512
        Plan, isas = _C.Plan, staticmethod(lambda: ["avx2", "plain"])

    monkeypatch.setattr(cpu, "_C", Older)
    monkeypatch.setenv("VSPDF_ISA", wanted)
    with pytest.raises(UserError, match=message):
        cpu.isa()
    with pytest.raises(UserError, match=message):
        cpu.packed(Pattern.random((7, 11), 0.5, seed=123))


@pytest.mark.parametrize(
    ("sides", "bits", "message"),
    [
        ((2, 4), [3, 0], "bits must hold 1 bytes, not 2"),
        ((2, 3), [64], "behind the last position must be zero"),
        ((-1, 4), [], "1 to 2\\^31 - 1 features on each side, not -1 x 4"),
        ((0, 4), [], "not 0 x 4"),
        ((1 << 33, 4), [], "not 8589934592 x 4"),
    ],
    ids=["size", "tail", "negative", "empty", "huge"],
)
def test_malformed_patterns_are_refused(sides, bits, message):
    array = np.array(bits, np.uint8)
    array.setflags(write=False)
    with pytest.raises(ValueError, match=message):
        _C.Plan(*sides, array)


def test_bits_that_may_change_are_refused():
    with pytest.raises(ValueError, match="read-only"):
        _C.Plan(2, 4, np.zeros(1, np.uint8))


def test_calls_that_make_no_sense_are_refused():
    plan, x = make_plan(random_mask(4, 5, 0.5), "plain"), torch.zeros(100)
    p = x.data_ptr()
    for tokens, dtype, values_dtype, threads, message in [
        (-1, 0, 0, 1, "tokens and strides must be at least 0"),
        (1, 2, 0, 1, r"dtype must be 0 \(float32\) or 1 \(bfloat16\), not 2"),
        (1, 0, -1, 1, "dtype must be"),
        (1, 0, 0, 0, "threads at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan.forward(p, p, 5, p, 0, tokens, dtype, values_dtype, threads)
        with pytest.raises(ValueError, match=message):
            plan.grad_input(p, p, 4, p, tokens, dtype, values_dtype, threads)
        with pytest.raises(ValueError, match=message):
            plan.grad_values(p, p, 4, p, 5, tokens, dtype, values_dtype, threads)
    with pytest.raises(ValueError, match="strides"):
        plan.forward(p, p, -5, p, 0, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="dtype"):
        plan.scatter(p, p, 7, 1)


def test_a_forked_child_gets_scratch_memory_while_others_use_the_pool(tmp_path):
    """A child has one thread: a mutex that another held at the fork would stay locked for ever."""
    mask = random_mask(40, 50, 0.3)
    plan, weight = make_plan(mask, ISAS[0]), random(40, 50, seed=1) * mask
    values, x, stop = weight[mask], random(70, 50, seed=2), threading.Event()

    def work():
        while not stop.is_set():
            run("forward", plan, x, values, mask.shape)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a child that waits for ever ends by this signal
                run("forward", plan, x, values, mask.shape)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def test_scratch_memory_of_sizes_no_longer_used_leaves_the_pool():
    limit = (256 + 64) << 20  # the second of generated code
    for tokens in (100, 30_000, 60_000, 90_000, 120_000, 110_000, 100):
        mask = random_mask(8, 600, 0.1)
        plan, values = make_plan(mask, "plain"), torch.ones(int(mask.sum()))
        x = torch.ones(1, 600).expand(tokens, 600)
        run("grad_input", plan, torch.ones(1, 8).expand(tokens, 8), values, mask.shape)
        run("forward", plan, x, values, mask.shape)
        assert _C.scratch_nbytes() <= limit


def test_peak_is_measured():
    assert _C.fma_peak(1, 0.01) > 1
