"""One resume, from its first command to the last GET, or to the time limit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.link import Link
from support.nginx import Nginx
from support.resume.links import Network
from support.resume.redis import first_get
from support.resume.site import Site
from support.resume.ways import Place, Way
from support.vm import VmError

SEED = "measured"
"""Of the records that are asked for; the same ones in each resume."""


@dataclass(frozen=True, slots=True)
class Milestone:
    """So many correct GETs have been answered."""

    gets: int
    seconds: float
    """Since the first command: mounting is part of it."""
    bytes_down: int | None
    """Over the link by then; None without one."""
    p50_ms: float | None
    p99_ms: float | None
    """Of these GETs but for the first, which waited for the guest."""


@dataclass(frozen=True, slots=True)
class Resume:
    """What one way took over one link."""

    link: str
    way: str
    opened_seconds: float | None
    """From the first command to QEMU's (``imagefs restore``): what is mounted is mounted. None: that took too long."""
    milestones: tuple[Milestone, ...]
    limit: float | None = None
    """Seconds: where the measurement was ended before its last milestone."""
    gets: int = 0
    """Correct ones by the end."""

    def at(self, gets: int) -> Milestone | None:
        """None if it was not reached within the limit."""
        return next((each for each in self.milestones if each.gets == gets), None)


def measure(
    way: Way,
    network: Network,
    nginx: Nginx,
    site: Site,
    work: Path,
    full_cache: Path,
    counts: Sequence[int],
    limit: float,
) -> Resume:
    """Resume ``site`` in ``work``, an empty directory. Ends when the largest of ``counts`` is reached.

    Raises VmError, MountFailedError and WrongAnswerError where something fails before the limit is over.
    """
    with contextlib.ExitStack() as stack:
        link = None
        if network.mbit is not None and network.rtt_ms is not None:
            link = stack.enter_context(Link(nginx.address, network.mbit, network.rtt_ms))
        else:
            site.evict()
        begun = time.monotonic()
        place = Place(site, link.url if link else None, work, full_cache, begun + limit)
        run = _Run(way, network, place, link, begun)
        try:
            run.resume(counts)
        except (OSError, VmError):
            # What waits until the deadline says so in words of its own.
            if time.monotonic() < place.deadline:
                raise
            return run.result(limit)
        return run.result(None)


class _Run:
    def __init__(self, way: Way, network: Network, place: Place, link: Link | None, begun: float) -> None:
        self._way = way
        self._network = network
        self._place = place
        self._link = link
        self._begun = begun
        self._opened: float | None = None
        self._milestones: list[Milestone] = []
        self._gets = 0

    def result(self, limit: float | None) -> Resume:
        return Resume(self._network.name, self._way.name, self._opened, tuple(self._milestones), limit, self._gets)

    def resume(self, counts: Sequence[int]) -> None:
        site, deadline = self._place.site, self._place.deadline
        with self._way.open(self._place) as start:
            self._opened = time.monotonic() - self._begun
            with site.machine(prefix=start.prefix, extra=start.extra, environment=start.environment) as vm:
                vm.go_on(deadline - time.monotonic())
                wanted = site.data.draw(max(counts), SEED)
                client = first_get(site.port, site.data, wanted[0], deadline)
                with client:
                    self._reached(1, counts, [])
                    took: list[float] = []
                    for number in wanted[1:]:
                        before = time.monotonic()
                        client.get(site.data, number, deadline - before)
                        took.append(time.monotonic() - before)
                        self._reached(1 + len(took), counts, took)

    def _reached(self, gets: int, counts: Sequence[int], took: Sequence[float]) -> None:
        self._gets = gets
        if gets not in counts:
            return
        seconds = time.monotonic() - self._begun
        down = self._link.counters().bytes_down if self._link else None
        p50, p99 = (_percentile(took, share) for share in (0.5, 0.99))
        self._milestones.append(Milestone(gets, seconds, down, p50, p99))


def _percentile(seconds: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1e3 if seconds else None
