"""How the processes of a group find each other, and who of them is missing when an exchange breaks."""

from __future__ import annotations

import os
import platform
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from vspdf.errors import UserError, first_line

CALL = 5.0  # seconds in which a rank that lives answers a roll call
_STEP = 0.02  # seconds between two looks into the store


def meet(rank: int, size: int, patience: timedelta) -> dist.Store:
    """A store that is this attempt's alone: torchrun's outlives a restart, with all that dead ranks left in it.

    Every rank but the first leaves a word of its own making; rank 0 answers each word with the name of the new store,
    again and again until all have come, so that nobody believes in an answer to somebody dead.

    Raises
    ------
    UserError
        If not all come.
    """
    ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store = dist.TCPStore(address, int(port), size, ours, patience, wait_for_workers=False, multi_tenant=True)
        return _own(store, rank, size, patience.total_seconds())
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"rank {rank} does not find the others at {address}:{port}: {first_line(error)}") from None


def _own(store: Any, rank: int, size: int, patience: float) -> dist.Store:
    end = time.monotonic() + patience
    if rank:
        word = uuid.uuid4().hex
        store.set(f"vspdf/word/{rank}", word)
        name = store.get(f"vspdf/answer/{word}").decode()
        own = dist.PrefixStore(name, store)
        own.set(f"here/{rank}", "")
        return own
    name = f"vspdf/{uuid.uuid4().hex}"
    own, missing = dist.PrefixStore(name, store), set(range(1, size))
    while missing:
        for other in sorted(missing):
            if own.check([f"here/{other}"]):
                missing.discard(other)
            elif store.check([f"vspdf/word/{other}"]):
                store.set(f"vspdf/answer/{store.get(f'vspdf/word/{other}').decode()}", name)
        if missing and time.monotonic() > end:
            raise UserError(f"of {size} ranks {len(missing)} did not come, among them rank {min(missing)}.")
        time.sleep(_STEP)
    return own


class Member(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int
    cores: frozenset[int]
    processor: str

    @classmethod
    def here(cls) -> Member:
        """This process."""
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return cls(socket.gethostname(), os.getpid(), frozenset(cores), platform.machine())


class Roll:
    """All members by rank, and what one of them knows of the others."""

    def __init__(self, store: Any, rank: int, members: Sequence[Member]) -> None:
        self._store, self._rank, self.members = store, rank, list(members)
        here = self.members[rank].host
        self._local = [other for other, member in enumerate(self.members) if member.host == here]

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self._local.index(self._rank)

    @property
    def threads(self) -> int:
        """This process' part of the cores that it may run on; torchrun's OMP_NUM_THREADS=1 is nobody's wish."""
        if (asked := os.environ.get("OMP_NUM_THREADS", "1")) != "1" and asked.isdecimal():
            return int(asked)
        mine = self.members[self._rank].cores
        return max(1, len(mine) // sum(bool(mine & self.members[other].cores) for other in self._local))

    def call(self, reason: str, patience: str) -> str:
        """Which ranks answer no more, in words, after an exchange broke for torch's reason, they had so long."""
        missing, dead = set(range(len(self.members))) - {self._rank}, set[int]()
        try:
            self._store.set(f"lost/{self._rank}", "")
            end = time.monotonic() + CALL
            while missing and not dead and time.monotonic() < end:
                missing = {other for other in missing if not self._store.check([f"lost/{other}"])}
                dead = {other for other in missing if self._dead(other)}
                time.sleep(_STEP)
        except (RuntimeError, OSError):  # the store has gone with its process
            dead = {other for other in missing if self._dead(other)}
        gone = sorted(dead or missing)
        if not gone:
            return f"the connection between the ranks broke ({reason})"
        named = " and ".join(f"rank {other} on {self.members[other].host}" for other in gone[:3])
        named += f" and {len(gone) - 3} more" if len(gone) > 3 else ""
        if ("imed out" in reason or "imeout" in reason) and not dead:
            return f"{named} {'was' if len(gone) == 1 else 'were'} silent for {patience}"
        return f"{named} {'is' if len(gone) == 1 else 'are'} gone"

    def _dead(self, other: int) -> bool:
        """Whether a process of this machine has ended."""
        if other not in self._local:
            return False
        pid = self.members[other].pid
        try:
            os.kill(pid, 0)
            status = Path(f"/proc/{pid}/stat")
            return status.exists() and status.read_text().rpartition(")")[2].split()[0] in ("Z", "X")
        except ProcessLookupError:
            return True
        except OSError:
            return False
