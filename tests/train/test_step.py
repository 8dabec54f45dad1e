"""One optimizer step by itself: what it does to a model follows from what it is handed."""

import math

import pytest
import torch
from torch import nn

import vspdf
from vspdf import gemm
from vspdf.config import loading
from vspdf.train.step import adamw, optimise


class Regression(nn.Module):
    """A mean loss over targets, as a GPT's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(6, 6)

    def forward(self, x, targets):
        return (self.inside(x).square().mean(dim=(1, 2)) * (targets[:, 0] + 1)).mean()


def batch(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(8, 3, 6, generator=generator), torch.ones(8, 3, dtype=torch.long)


def settings(tiny, *overrides):
    return loading.load(tiny, overrides)


@pytest.mark.parametrize(
    "scale, loss", [(math.nan, "nan"), (1e25, "inf"), (1e17, "finite")], ids=["nan", "inf", "gradient"]
)
def test_a_step_that_is_not_finite_leaves_the_weights_as_they_are(tiny, scale, loss):
    config, model = settings(tiny), Regression()
    if loss == "finite":  # its gradient alone is not
        model.inside.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model, config.optimizer, config.phases[0])
    found, norm = optimise(model, optimizer, batch(scale), 1e-2, config.train, 1.0)
    assert math.isfinite(found) == (loss == "finite") and not math.isfinite(norm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters()) and not optimizer.state


def test_a_batch_in_parts_is_the_batch(tiny):
    ends = []
    for micro in (8, 2):
        config, model = settings(tiny, "train.batch_size=8", f"train.micro_batch_size={micro}"), Regression()
        optimizer = adamw(model, config.optimizer, config.phases[0])
        ends.append((*optimise(model, optimizer, batch(), 1e-2, config.train, 1.0), model.inside.weight.detach()))
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(parts, whole)


def test_rates_of_sparse_weights_scale_and_biases_do_not_decay(tiny):
    config, model = settings(tiny, "phases.0.s_mu_par=true", "optimizer.weight_decay=0.3"), Regression()
    vspdf.sparsify(model, 0.5)
    sparse, bias = adamw(model, config.optimizer, config.phases[0]).param_groups
    assert sparse["weight_decay"] == 0.3 and sparse["lr_scale"] == pytest.approx(2)
    assert bias["weight_decay"] == 0 and bias["lr_scale"] == 1


@pytest.mark.skipif(gemm.library() != "oneDNN", reason="torch's MKL multiplies as fast on this processor")
def test_a_step_multiplies_by_the_faster_library_forward_and_backward(tiny):
    config, model, told = settings(tiny), Regression(), []
    tell = lambda *_: told.append(torch.backends.mkldnn.matmul.fp32_precision)  # noqa: E731
    model.inside.register_forward_hook(tell)
    model.inside.weight.register_hook(tell)
    with gemm.faster():
        inside = torch.backends.mkldnn.matmul.fp32_precision
    optimise(model, adamw(model, config.optimizer, config.phases[0]), batch(), 1e-2, config.train, 1.0)
    assert set(told) == {inside} and len(told) >= 2
    assert torch.backends.mkldnn.matmul.fp32_precision != inside
