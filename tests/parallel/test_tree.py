"""One order of addition, whoever adds."""

import pytest
import torch

from vspdf.parallel.tree import accumulate, add, spans
from vspdf.parallel.world import World


def gradients(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator) * 10.0 ** (i % 4) for i in range(count)]


def by_hand(low, high, leaves):
    if high - low == 1:
        return leaves[low]
    middle = (low + high + 1) // 2
    return by_hand(low, middle, leaves) + by_hand(middle, high, leaves)


def summed(count, mine, leaves):
    parameter = torch.zeros(5, requires_grad=True)
    found = {}
    for node in spans((0, count), mine):
        parameter.grad = None
        accumulate(node, lambda i: (parameter * leaves[i]).sum().backward(), [parameter])
        found[node] = parameter.grad
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 12, 15, 16])
def test_every_number_of_ranks_that_divides_gives_the_same_bits(count):
    leaves = gradients(count)
    expected = by_hand(0, count, leaves)
    for ranks in (n for n in range(1, count + 1) if count % n == 0):
        world, parts = World(), {}
        world.size = ranks
        for rank in range(ranks):
            mine = summed(count, world.share(count, rank), leaves)
            if not ranks & (ranks - 1):
                assert len(mine) == 1  # powers of two exchange one sum each
            parts |= mine
        assert torch.equal(add((0, count), parts), expected)


def test_two_and_three_micro_batches_add_as_autograd_does():
    for count in (2, 3):
        leaves, parameter = gradients(count), torch.zeros(5, requires_grad=True)
        for leaf in leaves:
            (parameter * leaf).sum().backward()
        assert torch.equal(summed(count, range(count), leaves)[0, count], parameter.grad)


def test_a_parameter_without_a_gradient_stays_without():
    used, unused = torch.zeros(5, requires_grad=True), torch.zeros(3, requires_grad=True)
    accumulate((0, 4), lambda i: (used * i).sum().backward(), [used, unused])
    assert unused.grad is None and torch.equal(used.grad, torch.full((5,), 6.0))
