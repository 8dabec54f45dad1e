"""What processes send each other in a step. Arithmetic alone, without torch."""

from __future__ import annotations


def segment(parameters: int, ranks: int) -> int:
    """Elements of a gradient that one of `ranks` adds up for all: an even share, rounded up."""
    return -(-parameters // ranks)


def sent(parameters: int, ranks: int, sums: int = 1, itemsize: int = 4) -> int:
    """Bytes that a rank sends to have the gradient of `parameters` summed: as many as in a ring.

    Parameters
    ----------
    sums : int
        Partial sums that it has to send; 1 where the number of ranks is a power of two.
    itemsize : int
        Bytes of an element.
    """
    return (ranks - 1) * (sums + 1) * segment(parameters, ranks) * itemsize
