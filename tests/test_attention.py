"""Causal attention, by blocks and by products, against the formula in float64, and where torch's own takes over."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vspdf import attention, gemm
from vspdf.attention import _Blocks, _Narrow, _Products, _triangles, causal_attention, plain
from vspdf.model import GPT
from vspdf.shapes import Shape


@pytest.fixture(params=["blocks", "products", "products computed again"])
def way(request, monkeypatch):
    """Each way in turn, on a processor that has it."""
    if request.param == "blocks":
        monkeypatch.setattr(gemm, "processor", lambda: ("AuthenticAMD", 25))
        monkeypatch.setattr(gemm, "library", lambda: "MKL")
    elif gemm.library() != "oneDNN":
        pytest.skip("torch's MKL multiplies as fast on this processor")
    elif request.param != "products":
        monkeypatch.setattr(attention, "KEPT", 0)
    return request.param


def formula(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ v


def inputs(T, layout="model's", B=2, H=3, d=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T)
    if layout == "model's":  # three parts of one matrix, as `c_attn` gives them
        whole = torch.randn(B, T, 3 * H * d, generator=generator)
        given = [part.view(B, T, H, d).transpose(1, 2) for part in whole.split(H * d, dim=2)]
    else:
        given = [torch.randn(B, H, T, d, generator=generator) for _ in "qkv"]
    return [4 * x.to(dtype).detach().requires_grad_() for x in given]  # peaked softmax: the merge matters


def with_gradients(attention, qkv, upstream):
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attention(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, upstream)


@pytest.mark.parametrize("layout", ["model's", "heads first"])
@pytest.mark.parametrize("T, triangles", [(128, 2), (194, 2), (200, 4), (384, 8), (512, 8), (1040, 16)])
def test_equals_the_formula_with_gradients(T, triangles, layout, way):
    qkv = inputs(T, layout)
    assert _triangles(T) == triangles
    made_by = _Blocks if way == "blocks" else _Products
    assert isinstance(causal_attention(*qkv).grad_fn, made_by._backward_cls)
    upstream = torch.randn(2, 3, T, 8, generator=torch.Generator().manual_seed(1))
    found = with_gradients(causal_attention, qkv, upstream)
    expected = with_gradients(formula, [x.double() for x in qkv], upstream.double())
    whole = with_gradients(plain, qkv, upstream)
    for mine, torchs, exact in zip(found, whole, expected, strict=True):
        error = (mine - exact).abs().max() / exact.abs().max()
        assert error <= max(1e-6, 2 * (torchs - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("T", [64, 127, 255, 1022])
def test_any_length(T, way):
    qkv = inputs(T, B=1)
    upstream = torch.randn(1, 3, T, 8, generator=torch.Generator().manual_seed(1))
    found = with_gradients(causal_attention, qkv, upstream)
    expected = with_gradients(formula, [x.double() for x in qkv], upstream.double())
    whole = with_gradients(plain, qkv, upstream)
    for mine, torchs, exact in zip(found, whole, expected, strict=True):
        assert (mine - exact).abs().max() <= max(1e-6 * exact.abs().max(), 2 * (torchs - exact).abs().max())


def test_sums_do_not_begin_with_what_memory_held(way, monkeypatch):
    poisoned = lambda x, **kwargs: torch.full_like(x, torch.nan)  # noqa: E731
    qkv, upstream = inputs(300), torch.ones(2, 3, 300, 8)
    expected = with_gradients(causal_attention, qkv, upstream)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    for mine, right in zip(with_gradients(causal_attention, qkv, upstream), expected, strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("layout", ["model's", "heads first"])
@pytest.mark.parametrize("T, d", [(64, 8), (127, 48), (128, 64), (384, 24), (512, 32)])
def test_bfloat16_has_torchs_output_and_a_gradient_as_exact(T, d, layout, vendor, monkeypatch):
    monkeypatch.setattr(gemm, "processor", lambda: (vendor, 6))
    qkv = inputs(T, layout, d=d, dtype=torch.bfloat16)
    assert isinstance(causal_attention(*qkv).grad_fn, _Narrow._backward_cls)
    upstream = torch.randn(2, 3, T, d, generator=torch.Generator().manual_seed(1)).bfloat16()
    (out, *found), (torchs_out, *whole) = (with_gradients(each, qkv, upstream) for each in (causal_attention, plain))
    expected = with_gradients(formula, [x.double() for x in qkv], upstream.double())[1:]
    assert torch.equal(out, torchs_out)
    for mine, torchs, exact in zip(found, whole, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - exact).norm() <= (torchs - exact).norm()


def test_bfloat16_wider_or_longer_is_torchs():
    for T, d in ((128, 136), (512, 64)):
        qkv = inputs(T, B=1, d=d, dtype=torch.bfloat16)
        assert not isinstance(causal_attention(*qkv).grad_fn, _Narrow._backward_cls)


@pytest.mark.parametrize("B", [1, 3])
def test_a_gradient_without_strides_of_its_own(B, way):
    qkv = inputs(256, B=B)
    upstream = torch.ones(()).expand(B, 3, 256, 8)  # of a sum
    for mine, torchs in zip(
        with_gradients(causal_attention, qkv, upstream), with_gradients(plain, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5 * torchs.abs().max())


def test_a_bfloat16_gradient_can_be_differentiated_again():
    (q, k, v), loss = inputs(128, B=1, dtype=torch.bfloat16), lambda *qkv: causal_attention(*qkv).float().square().sum()
    first = torch.autograd.grad(loss(q, k, v), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), q)[0]
    with sdpa_kernel(SDPBackend.MATH):
        torchs = torch.autograd.grad(plain(q, k, v).float().square().sum(), (q, k, v), create_graph=True)
        expected = torch.autograd.grad(sum(g.float().square().sum() for g in torchs), q)[0]
    assert (second - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_gradients_are_those_one_by_one(dtype, way):
    given = inputs(128, dtype=dtype)
    y = causal_attention(*given)
    many = torch.stack([y.detach().sin(), y.detach().cos()])
    found = torch.autograd.grad(y, given, many, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, given, one, retain_graph=True) for one in many]
    for batched, each in zip(found, map(torch.stack, zip(*single, strict=True)), strict=True):
        assert (batched - each).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * each.norm()


def test_a_gradient_can_be_differentiated_again(way):
    def second(attention):
        qkv = inputs(128)
        first = torch.autograd.grad(attention(*qkv).square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), qkv)

    found = second(causal_attention)
    with sdpa_kernel(SDPBackend.MATH):
        expected = second(plain)
    for mine, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4 * torchs.abs().max())


@pytest.mark.parametrize(
    "T, dtype", [(127, torch.float32), (255, torch.float32), (64, torch.float32), (4096, torch.float32),
                 (1022, torch.float32), (512, torch.float64)], ids=str,
)  # fmt: skip
def test_torchs_own_takes_over(T, dtype, monkeypatch):
    monkeypatch.setattr(gemm, "library", lambda: "MKL")
    qkv = inputs(T, dtype=dtype, B=1, H=1)
    assert torch.equal(causal_attention(*qkv), plain(*qkv))


@pytest.mark.parametrize("T, dtype", [(63, torch.float32), (4096, torch.float32)], ids=str)
def test_torchs_own_takes_over_from_products_too(T, dtype):
    qkv = inputs(T, dtype=dtype, B=1, H=1)
    assert torch.equal(causal_attention(*qkv), plain(*qkv))


@pytest.mark.parametrize(
    "T, triangles", [(128, 1), (256, 1), (384, 2), (511, 1), (512, 2), (576, 2), (768, 1), (2048, 1)]
)
def test_intels_are_halved_once_or_not_at_all(T, triangles, monkeypatch):
    monkeypatch.setattr(gemm, "processor", lambda: ("GenuineIntel", 6))
    assert _triangles(T) == triangles


def test_torchs_precision_is_as_it_was(way):
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    before = setting and setting.fp32_precision
    causal_attention(*inputs(256)).sum().backward()
    assert (setting and setting.fp32_precision) == before


def test_a_kernel_that_the_user_asks_for_is_taken(way):
    qkv = inputs(256)
    assert not torch.equal(causal_attention(*qkv), plain(*qkv))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(causal_attention(*qkv), plain(*qkv))


def test_transforms_of_torch_func(way):
    qkv = [x.detach() for x in inputs(128)]
    loss = lambda q: causal_attention(q, *qkv[1:]).square().sum()  # noqa: E731
    q = qkv[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(qkv[0]), torch.autograd.grad(loss(q), q)[0], rtol=1e-4, atol=1e-3)


def test_a_model_compiles_as_one_graph():
    model = GPT(Shape(n_layer=1, d_model=16, n_head=2, d_ff=32, vocab_size=17, sequence_length=128))
    tokens = torch.randint(17, (2, 129), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = [m(tokens[:, :-1], tokens[:, 1:]) for m in (model, compiled)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_takes_other_lengths():
    model = GPT(Shape(n_layer=1, d_model=16, n_head=2, d_ff=32, vocab_size=17, sequence_length=256))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (16, 32, 48, 200):
        tokens = torch.zeros(1, length, dtype=torch.long)
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-6)
