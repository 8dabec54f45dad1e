"""What a step leaves to the host: nothing after the first. In the interpreter, as `interpreted.py` is run."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vspdf
from vspdf.kernels import cpu, dense, dispatch, ops
from vspdf.kernels.gpu import bitmap, gather, launch
from vspdf.pattern import Pattern


def draw(pattern, tokens, dtype, seed=0):
    """x, values, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, pattern.in_features), (pattern.nnz,), (pattern.out_features,), (tokens, pattern.out_features)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Watch(TorchDispatchMode):
    """What torch is asked to do below autograd."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WAITS = {  # what reads from a device, or whose result's size does; what copies from the host
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "bincount",
    "sort", "lift_fresh", "lift_fresh_copy", "_pin_memory",
}  # fmt: skip


@pytest.mark.parametrize("backend, sparsity", [("auto", 0.75), ("triton", 0.9)])
def test_host_work_is_done_once_per_pattern(gpu, monkeypatch, backend, sparsity):
    """Three steps of two layers: patterns go over to the device in the first, nothing does afterwards."""
    if backend == "triton":
        monkeypatch.setattr(ops, "choose", dispatch.choose)
    counts, step = {}, [0]

    def count(owner, name):
        plain = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[step[0], name] = counts.get((step[0], name), 0) + 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, names in {
        Pattern: ("positions", "mask", "csr", "_flat"), np: ("unpackbits", "flatnonzero", "nonzero", "argsort"),
        torch: ("from_numpy",), bitmap: ("unpacked",),
    }.items():  # fmt: skip
        for name in names:
            count(owner, name)
    patterns = [Pattern.random(shape, sparsity, seed=9) for shape in ((48, 40), (32, 48))]
    layers = [vspdf.SparseLinear(p, torch.randn(p.nnz), backend=backend) for p in patterns]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step[0] in range(3):
        with Watch() as watch:
            model(torch.ones(8, 40, requires_grad=True)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step[0]:
            assert not WAITS & set(watch.seen)
    assert {name for _, name in counts} <= {"from_numpy", "unpacked", "_flat", "unpackbits", "mask"}
    later = {key: n for key, n in counts.items() if key[0] and key[1] != "from_numpy"}
    assert not later, "host work after the first step"
    if backend == "auto":
        assert counts[0, "unpacked"] == 2, "once per pattern and device"


def test_without_triton_positions_go_over_once(monkeypatch):
    """A GPU with no Triton, or float64: torch indexes by positions that stay on the device."""
    monkeypatch.setattr(cpu, "takes", lambda tensor: False)
    monkeypatch.setattr(launch, "takes", lambda tensor: False)
    calls = []
    plain = Pattern.positions
    monkeypatch.setattr(Pattern, "positions", lambda self: calls.append(self) or plain(self))
    pattern = Pattern.random((24, 16), 0.75, seed=5)
    x, values, bias, grad = draw(pattern, 9, torch.float64)
    for _ in range(3):
        dense.forward(x, values, bias, pattern)
        dense.grad_input(grad, values, pattern)
        dense.grad_values(grad, x, pattern)
    assert calls == [pattern]


def test_the_gradient_is_packed_once_for_two_products(monkeypatch):
    pattern = Pattern.random((24, 40), 0.8)
    x, values, bias, grad = draw(pattern, 9, torch.float32)
    packed = []
    plain = launch.kernels().pack_activations

    class Counting:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (packed.append(args[1].data_ptr()), plain[grid](*args, **kwargs))

    monkeypatch.setattr(launch.kernels(), "pack_activations", Counting())
    y = vspdf.sparse_linear(x.requires_grad_(), values.requires_grad_(), pattern, bias, backend="triton")
    torch.autograd.grad(y, (x, values), grad)
    assert packed == [x.data_ptr(), grad.data_ptr(), x.data_ptr()]
    assert gather.packed_once.made is None, "nothing is kept"
