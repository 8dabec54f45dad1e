"""What the files share that run in the interpreter."""

import pytest
import torch

from vspdf.kernels import cpu, dispatch, ops, tuning
from vspdf.kernels.gpu import launch


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that torch would hand out as it is comes full of NaN."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def poisoned(*args, plain=plain, **kwargs):
            tensor = plain(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As on an H200: no C++ kernels for its tensors, choices as for a GPU, nothing tuned."""
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "takes", lambda tensor: False)
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuning, "GPUS", {})
    choose = lambda product, pattern, tokens, dtype, device, backend, tune=None, wide=False: (  # noqa: E731
        dispatch._choose_gpu(product, pattern, tokens, dtype, device)
    )
    monkeypatch.setattr(ops, "choose", choose)
