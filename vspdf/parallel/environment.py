"""What the environment tells of other processes: torchrun, and whatever else sets RANK, WORLD_SIZE and MASTER_ADDR."""

from __future__ import annotations

import os

from vspdf.errors import UserError
from vspdf.parallel.world import ALONE, World, leave_it_to_the_first


def from_environment() -> World:
    """The world that the environment tells of, joined.

    Raises
    ------
    UserError
        If the environment is half told, or not all processes come.
    """
    if asked_for() == 1:
        return ALONE
    from vspdf.parallel.group import join

    return join()


def asked_for() -> int:
    """How many processes the environment says that there are.

    Raises
    ------
    UserError
        If it tells only half of what is needed to find them.
    """
    size = _integer("WORLD_SIZE", default=1)
    if size == 1:
        return 1
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE = {size}, but {name} is not set: torchrun sets all of them.")
    rank = _integer("RANK")
    if not 0 <= rank < size:
        raise UserError(f"RANK = {rank} is not below WORLD_SIZE = {size}.")
    return size


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1):
        raise UserError(f"the environment has {name} = '{text}': expected a number, as torchrun sets it.")
    return int(text)


def by_torchrun() -> bool:
    """Whether torchrun has started this process, which ends and restarts it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def refuse(verb: str, instead: str) -> None:
    """Refuses several processes for what is for one.

    Raises
    ------
    UserError
        Naming the verb, and what to do instead.
    """
    if (size := asked_for()) > 1:
        error = UserError(f"{verb} is one process, and the environment (torchrun?) tells of {size}: {instead}.")
        if os.environ["RANK"] != "0":
            leave_it_to_the_first(error)
        raise error


def divisors(count: int) -> str:
    """The numbers of processes that `count` things can be shared by, in words."""
    *most, last = (str(n) for n in range(1, count + 1) if count % n == 0)
    return f"{', '.join(most)} or {last}" if most else last
