"""cuSPARSELt in plain torch, exact: a compressed form of values, then metadata, in an order of its own."""

import torch
from torch import Tensor


class Emulation:
    """As `vspdf.kernels.gpu.two_four.Library`; notes with which algorithms it was asked to multiply."""

    best = 3

    def __init__(self) -> None:
        self.algorithms: list[int] = []

    def _shuffle(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(count))

    def compress(self, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        assert rows % 16 == 0 and columns % 16 == 0 and weight.is_contiguous()
        groups = weight.view(-1, 4)
        assert (groups != 0).sum(1).max() <= 2, "not 2:4"
        # Two places a group, in rising order: the kept ones first; where fewer are kept, others stand in with zeros.
        places = (groups == 0).to(torch.int8).sort(dim=1, stable=True).indices[:, :2].sort(dim=1).values
        values = groups.gather(1, places).flatten()
        metadata = (places[:, 0] + 4 * places[:, 1]).to(torch.int16).view(weight.dtype)
        return torch.cat([values[self._shuffle(len(values))], metadata])

    def expand(self, buffer: Tensor, columns: int) -> Tensor:
        """The matrix that the compressed form holds: per group of four, two values and one number of metadata."""
        groups = len(buffer) // 3
        values = torch.empty(2 * groups, dtype=buffer.dtype)
        values[self._shuffle(2 * groups)] = buffer[: 2 * groups]
        metadata = buffer[2 * groups :].view(torch.int16).long()
        places = torch.stack([metadata % 4, metadata // 4], dim=1)
        return torch.zeros(groups, 4, dtype=buffer.dtype).scatter(1, places, values.view(-1, 2)).view(-1, columns)

    def multiply(self, x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        assert x.shape[0] % 8 == 0 and x.is_contiguous()
        self.algorithms.append(algorithm)
        weight = self.expand(compressed, x.shape[1])
        y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        return y.to(x.dtype)

    def search(self, x: Tensor, compressed: Tensor) -> int:
        assert x.shape[0] % 8 == 0 and x.is_contiguous() and compressed.dim() == 1
        return self.best
