"""The three products through their only door, against float64."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vspdf
from vspdf import ledger
from vspdf.errors import BackendUnavailable, UserError
from vspdf.model import GPT
from vspdf.pattern import Pattern
from vspdf.shapes import Shape
from vspdf.sparsity.layer import SparseLinear

BACKENDS = ("reference", "cpu", "auto")
# relative to the largest value of the result; sums of up to 1,100 terms
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw(pattern, *leading, dtype=torch.float32, bias=True, seed=0):
    """x, values and bias as leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*leading, pattern.in_features), (pattern.nnz,), (pattern.out_features,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return tensors if bias else [*tensors[:2], None]


def assert_close(found, exact, dtype):
    assert found.dtype == dtype and found.shape == exact.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale + 1e-30)


def assert_matches_float64(x, values, bias, pattern, backend, grad=None):
    """Output and every gradient of `sparse_linear` against dense float64."""
    with torch.enable_grad():
        exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, values, bias)]
        mask = pattern.mask()
        weight = torch.zeros(pattern.shape, dtype=torch.float64).masked_scatter(mask, exact[1])
        y_exact = nn.functional.linear(exact[0], weight, exact[2])
        y = vspdf.sparse_linear(x, values, pattern, bias, backend=backend)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    assert_close(y.detach(), y_exact.detach(), x.dtype)
    wanted = [t for t in (x, values, bias) if t is not None and t.requires_grad]
    grads = torch.autograd.grad(y, wanted, grad)
    grads_exact = torch.autograd.grad(
        y_exact,
        [e for t, e in zip((x, values, bias), exact, strict=True) if t is not None and t.requires_grad],
        grad.double(),
    )
    for found, truth in zip(grads, grads_exact, strict=True):
        assert_close(found, truth, x.dtype)


SHAPES = [(1, 1), (1, 1100), (1100, 1), (3, 5), (16, 16), (17, 33), (64, 48), (65, 127), (130, 257)]


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 129], ids="T={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "{}x{}".format(*s))
def test_every_product_is_exact(shape, tokens, backend):
    pattern = Pattern.random(shape, 0.9 if shape[0] * shape[1] > 400 else 0.5)
    assert_matches_float64(*draw(pattern, tokens), pattern, backend)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.97, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_density_and_dtype(sparsity, dtype, backend):
    pattern = Pattern.random((72, 90), sparsity)
    assert_matches_float64(*draw(pattern, 37, dtype=dtype), pattern, backend)


@pytest.mark.parametrize("shape", [(5, 7), (33, 64)], ids=lambda s: "{}x{}".format(*s))
def test_empty_and_full_rows_and_columns(shape, backend):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[2], mask[:, 3] = True, True
    pattern = Pattern.from_mask(mask)
    assert_matches_float64(*draw(pattern, 19), pattern, backend)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 5), (2, 0, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_batch_dimensions(leading, bias, backend):
    pattern = Pattern.random((11, 13), 0.6)
    assert_matches_float64(*draw(pattern, *leading, bias=bias), pattern, backend)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided rows": lambda x: torch.cat([x, x])[::2],
    "columns of a wider matrix": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "every second column": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "broadcast row": lambda x: x[:1].expand_as(x),
    "broadcast everywhere": lambda x: x[:1, :1].expand_as(x),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_input_and_gradient(layout, backend):
    pattern = Pattern.random((24, 40), 0.7)
    x, values, bias = draw(pattern, 22)
    grad = torch.randn(22, 24, generator=torch.Generator().manual_seed(1))
    x = layout(x.detach()).requires_grad_()
    assert_matches_float64(x, values, bias, pattern, backend, grad=layout(grad))


def test_batched_and_transposed_at_once(backend):
    pattern = Pattern.random((6, 10), 0.5)
    x, values, bias = draw(pattern, 3, 4)
    x = x.detach().transpose(0, 1).requires_grad_()
    grad = torch.randn(3, 4, 6).transpose(0, 1)
    assert_matches_float64(x, values, bias, pattern, backend, grad=grad)


def test_gradient_of_a_sum_has_stride_zero(backend):
    pattern = Pattern.random((6, 10), 0.5)
    x, values, bias = draw(pattern, 5)
    vspdf.sparse_linear(x, values, pattern, bias, backend=backend).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((6,), 5.0))
    weight = torch.zeros(6, 10).masked_scatter(pattern.mask(), values.detach())
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 10))


def test_strided_values_and_bias(backend):
    pattern = Pattern.random((12, 9), 0.5)
    x, values, bias = draw(pattern, 8)
    values = torch.stack([values.detach()] * 2, dim=1)[:, 0].requires_grad_()
    bias = bias.detach()[:1].expand(12).requires_grad_()
    assert not values.is_contiguous() and bias.stride() == (0,)
    assert_matches_float64(x, values, bias, pattern, backend)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["x", "values", "bias", "x and bias"])
def test_only_wanted_gradients_are_computed(wanted, backend):
    pattern = Pattern.random((12, 9), 0.5)
    tensors = draw(pattern, 8)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in wanted)
    with ledger.counting() as tally:
        assert_matches_float64(*tensors, pattern, backend)
    products = {"forward", *(name for i, name in enumerate(("grad_input", "grad_values")) if i in wanted)}
    assert set(tally.products) == products


def test_what_only_masked_weights_would_read_does_not_show(backend):
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 3] = False
    pattern = Pattern.from_mask(mask)
    x, values, bias = draw(pattern, 5)
    clean = vspdf.sparse_linear(x, values, pattern, bias, backend=backend)
    x.data[:, 3] = 1e30
    assert torch.equal(vspdf.sparse_linear(x, values, pattern, bias, backend=backend), clean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_other_dtypes_run_dense_and_say_so(dtype):
    pattern = Pattern.random((12, 9), 0.5)
    x, values, bias = (tensor.detach().to(dtype) for tensor in draw(pattern, 8))
    weight = torch.zeros(12, 9, dtype=dtype).masked_scatter(pattern.mask(), values)
    torch.testing.assert_close(vspdf.sparse_linear(x, values, pattern, bias), nn.functional.linear(x, weight, bias))
    assert vspdf.explain(pattern, 8, dtype=dtype).count("no kernel for torch") == 3
    with pytest.raises(UserError, match=r"no kernel for torch"):
        vspdf.sparse_linear(x, values, pattern, bias, backend="cpu")


# -- what PyTorch does with operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(leading, bias, backend):
    pattern = Pattern.random((6, 10), 0.5)
    x, values, b = draw(pattern, *leading, bias=bias)
    grad = torch.randn(*leading, 6)
    torch.library.opcheck(torch.ops.vspdf.linear, (x, values, b, pattern.digest, backend))
    # Their own backward only says that it does not exist.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vspdf.grad_input, (grad, values, pattern.digest, backend), test_utils=tests)
    torch.library.opcheck(torch.ops.vspdf.grad_values, (grad, x, pattern.digest, backend), test_utils=tests)


def test_gradcheck():
    pattern = Pattern.random((4, 5), 0.4)
    x, values, bias = (t.detach().double().requires_grad_() for t in draw(pattern, 3))
    assert torch.autograd.gradcheck(lambda x, v, b: vspdf.sparse_linear(x, v, pattern, b), (x, values, bias))


def test_double_backward(backend):
    pattern = Pattern.random((6, 10), 0.5)
    grads = []
    dense = lambda x, v, b: nn.functional.linear(x, torch.zeros(6, 10).masked_scatter(pattern.mask(), v), b)  # noqa: E731
    for run in (lambda x, v, b: vspdf.sparse_linear(x, v, pattern, b, backend=backend), dense):
        x, values, bias = draw(pattern, 5)
        (grad,) = torch.autograd.grad(run(x, values, bias).pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()
        grads.append((x.grad, values.grad, bias.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()
    layer = SparseLinear.from_linear(nn.Linear(40, 24), Pattern.random((24, 40), 0.8), backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 11):
        x = torch.randn(2, tokens, 40, requires_grad=True)
        found = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])
        expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_is_no_constant():
    layer = vspdf.SparseLinear.from_linear(torch.nn.Linear(8, 6), Pattern.random((6, 8), 0.5, seed=5))
    traced = torch.jit.trace(layer, torch.randn(4, 8), check_trace=False)
    x = torch.randn(4, 8)
    torch.testing.assert_close(traced(x), layer(x))


def test_the_profiler_names_the_products():
    layer = vspdf.SparseLinear.from_linear(torch.nn.Linear(8, 6), Pattern.random((6, 8), 0.5, seed=5))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(4, 8, requires_grad=True)).sum().backward()
    named = {event.key for event in profile.key_averages()}
    assert {"vspdf::linear", "vspdf::grad_input", "vspdf::grad_values"} <= named


def test_a_compiled_layer_follows_its_pattern():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(40, 24))
    vspdf.sparsify(model, 0.8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 40)
    torch.testing.assert_close(compiled(x), model(x))
    vspdf.set_sparsity(model, 0.4)
    with torch.no_grad():
        model[0].values.fill_(1.0)
    torch.testing.assert_close(compiled(x), model(x))


def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    pattern = Pattern.random((24, 40), 0.8)
    x, values, _ = draw(pattern, 6)
    grad = torch.randn(6, 24)

    def layer(x, values):  # nothing beside the operators, so that no C++ is compiled for it: that takes 20 s
        return vspdf.sparse_linear(x, values, pattern, backend=backend)

    found = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x, values), (x, values), grad)
    for a, b in zip(found, torch.autograd.grad(layer(x, values), (x, values), grad), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_as_linear_does(backend):
    pattern = Pattern.random((24, 40), 0.8)
    x, values, bias = draw(pattern, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = vspdf.sparse_linear(x, values, pattern, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), (x, values, bias))
    assert {g.dtype for g in grads} == {torch.float32}
    # On CPUs the weights need no rounding: sums are float32 whatever the tokens are.
    assert torch.equal(y, vspdf.sparse_linear(x.bfloat16(), values, pattern, bias, backend=backend))
    with torch.autocast("cpu", torch.bfloat16):
        double = vspdf.sparse_linear(x.double(), values.double(), pattern, bias.double())
    assert double.dtype == torch.float64


def test_layers_follow_their_model_to_another_device():
    """The meta device computes shapes only, and refuses tensors of other devices, as a GPU does."""
    model = GPT(Shape(2, 32, 4, 64, 97, 16))
    vspdf.sparsify(model, 0.9)
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    model.to("meta")(tokens, tokens).backward()
    assert {p.grad.device.type for p in model.parameters()} == {"meta"}


def test_activation_checkpointing_gives_equal_gradients(backend):
    pattern = Pattern.random((24, 24), 0.8)
    x, values, bias = draw(pattern, 6)

    def block(x):
        return nn.functional.gelu(vspdf.sparse_linear(x, values, pattern, bias, backend=backend))

    plain = torch.autograd.grad(block(block(x)).sum(), (x, values, bias))
    again = torch.autograd.grad(
        checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False).sum(), (x, values, bias)
    )
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_layers_copy_pickle_and_load(tmp_path, backend):
    layer = SparseLinear.from_linear(nn.Linear(40, 24), Pattern.random((24, 40), 0.8), backend=backend)
    x = torch.randn(5, 40)
    torch.save(layer, tmp_path / "layer.pt")
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ]
    loaded = SparseLinear.from_linear(nn.Linear(40, 24), Pattern.random((24, 40), 0.8, seed=1), backend=backend)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for other in [*others, loaded]:
        assert other.pattern is layer.pattern
        assert other.values is not layer.values
        assert torch.equal(other(x), layer(x))


def test_many_python_threads_at_once(backend):
    """One layer in several threads, its plan not built yet."""
    pattern = Pattern.random((96, 160), 0.9, seed=77)
    x, values, bias = draw(pattern, 64)
    grad = torch.randn(64, 96)
    y = vspdf.sparse_linear(x, values, pattern, bias, backend="reference")
    expected = (y, *torch.autograd.grad(y, (x, values, bias), grad))
    results, start = [None] * 4, threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(20):
            y = vspdf.sparse_linear(x, values, pattern, bias, backend=backend)
            results[i] = (y, *torch.autograd.grad(y, (x, values, bias), grad))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_thread_count_does_not_alter_the_result(backend):
    pattern = Pattern.random((96, 160), 0.9)
    tensors = draw(pattern, 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_matches_float64(*tensors, pattern, backend)
    finally:
        torch.set_num_threads(before)


# -- what the ledger and the FLOP counter see -------------------------------------------------------------------------


def test_flop_counter_sees_useful_flops(backend):
    pattern = Pattern.random((24, 40), 0.8)
    x, values, bias = draw(pattern, 3, 7)
    with FlopCounterMode(display=False) as counter:
        vspdf.sparse_linear(x, values, pattern, bias, backend=backend).sum().backward()
    product = 2 * 21 * pattern.nnz
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert counts == {"vspdf.linear": product, "vspdf.grad_input": product, "vspdf.grad_values": product}


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_ledger_gets_three_columns(path):
    pattern = Pattern.random((64, 256), 0.9)
    x, values, bias = draw(pattern, 48)
    with ledger.counting() as tally:
        vspdf.sparse_linear(x, values, pattern, bias, backend=path).sum().backward()
    dense, useful = 2 * 48 * pattern.numel, 2 * 48 * pattern.nnz
    assert set(tally.products) == {"forward", "grad_input", "grad_values"}
    for count in tally.products.values():
        assert (count.dense, count.useful) == (dense, useful)
        assert count.executed == dense if path == "reference" else useful <= count.executed < dense
        assert count.seconds > 0
    assert tally.total.useful == 3 * useful
    with ledger.counting() as quiet:
        pass
    assert quiet.total.dense == 0 and tally.total.useful == 3 * useful  # nothing reaches a closed tally


def test_tallies_nest():
    pattern = Pattern.random((8, 8), 0.5)
    x, values, _ = draw(pattern, 2)
    with ledger.counting() as outer:
        vspdf.sparse_linear(x, values, pattern)
        with ledger.counting() as inner:
            vspdf.sparse_linear(x, values, pattern)
    assert outer.total.useful == 2 * inner.total.useful > 0


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(3, 6)}, UserError, r"x of shape \(3, 6\) does not fit .*: its last size must be 5"),
        ({"x": torch.tensor(1.0)}, UserError, r"x of shape \(\)"),
        ({"values": torch.ones(3)}, UserError, r"values of shape \(3,\) do not fit .*: expected \(10,\)"),
        ({"bias": torch.ones(5)}, UserError, r"bias of shape \(5,\) does not fit .*: expected \(4,\)"),
        (
            {"values": torch.ones(10).double()},
            UserError,
            "values torch.float64 on cpu and x torch.float32 on cpu must agree",
        ),
        (
            {"bias": torch.ones(4).bfloat16()},
            UserError,
            "bias torch.bfloat16 on cpu and x torch.float32 on cpu must agree",
        ),
        (
            {"x": torch.ones(3, 5).bfloat16(), "bias": torch.ones(4).bfloat16()},
            UserError,
            "bias torch.bfloat16 on cpu: expected torch.float32 on cpu, as values are, beside x torch.bfloat16",
        ),
        ({"x": torch.ones(3, 5).long()}, UserError, "x is torch.int64: expected a floating-point"),
        ({"backend": "cup"}, UserError, "unknown backend 'cup'. Did you mean 'cpu'"),
        (
            {"backend": "triton"},
            (BackendUnavailable, UserError),
            r"backend 'triton' cannot run: no (CUDA or HIP device|kernel for device 'cpu')",
        ),
    ],
    ids=["x", "scalar x", "values", "bias", "values dtype", "bias dtype", "wide bias", "integers", "backend", "triton"],
)
def test_what_does_not_fit_is_named(change, error, message):
    pattern = Pattern.random((4, 5), 0.5)
    call = {"x": torch.ones(3, 5), "values": torch.ones(10), "bias": torch.ones(4), "backend": "auto"} | change
    with pytest.raises(error, match=message):
        vspdf.sparse_linear(call["x"], call["values"], pattern, call["bias"], backend=call["backend"])


def test_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
