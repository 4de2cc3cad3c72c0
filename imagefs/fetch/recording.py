"""From a mount's trace to a working set: what a guest touched when it began to run, and nothing else.

A trace may hold more than that. A guest runs for weeks, and in the end has touched everything; tools read the whole
memory from one end to the other (``cp``, ``sha256sum``), and so do guests (a memory check, a garbage collector). So a
recording ends after RECORDING_SECONDS, has a bounded number of pages, and is without sweeps. A sweep needs no set,
either: what is read in sequence is fetched ahead of its reader anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from imagefs.fetch.trace import LIKELY, OWN
from imagefs.image.workingset import LIMIT, WorkingSet, merge, recorded

RECORDING_SECONDS = 60.0
"""From the first touch on. Pulled out of the air: over slow links a first resume takes that long to answer."""
SILENCE_SECONDS, FEW = 10.0, 64
"""What came before so much silence was no guest that began to run, if it touched no more pages than that."""
SWEEP_PAGES = 512
"""2 MiB in one direction are a sweep: twice what the longest genuine run of a booted Linux guest touches in order."""
GAP = 64
"""Pages that a sweep may leave out (they are zero, or here already), or be late by (readers run in parallel)."""
HEADS = 16
"""Sequential readers followed at a time."""


@dataclass(frozen=True, slots=True)
class Touch:
    """One line of a trace."""

    seconds: float
    page: int
    count: int
    origin: str


def parse_trace(text: bytes) -> Iterator[Touch]:
    """The lines of ``.imagefs/trace``; what is none is left out."""
    for line in text.decode("ascii", "replace").splitlines():
        try:
            seconds, page, count, origin = line.split()
            touch = Touch(float(seconds), int(page), int(count), origin)
        except ValueError:
            continue
        if math.isfinite(touch.seconds) and touch.page >= 0 and touch.count > 0:
            yield touch


def working_set_of(touches: Iterable[Touch], chunk_pages: int, limit: int = LIMIT) -> WorkingSet:
    """The set of all recordings in a trace, merged.

    Where restore helpers have written touches, only those count: what the mount saw itself are the helpers' reads. A
    helper installs all that arrives with the page that was touched, so that touches of the rest of its window are not
    seen: it counts as touched as a whole. The kernel's reads for a mapping are seen page by page. What was fetched for
    being likely, and installed before it was touched, counts as touched last: otherwise the set would be what was not
    likely, and who has it would wait for all the rest.
    """
    runs: list[list[Touch]] = []
    latest: dict[str, list[Touch]] = {}
    guessed: list[Touch] = []
    for touch in touches:
        if touch.origin == LIKELY:
            guessed.append(touch)
            continue
        run = latest.get(touch.origin)
        # A helper's clock begins with the helper: when it runs backwards, another guest was started.
        if run is None or touch.seconds < run[-1].seconds - 1.0:
            run = latest[touch.origin] = []
            runs.append(run)
        run.append(touch)
    helpers = [run for run in runs if run[0].origin != OWN]
    unit = chunk_pages if helpers else 1
    found = merge([_recording(run, unit, limit) for run in helpers or runs], limit)
    return _with_guessed(found, guessed, limit) if helpers else found


def _with_guessed(found: WorkingSet, guessed: Iterable[Touch], limit: int) -> WorkingSet:
    often = dict(found.items())
    for touch in guessed:
        for page in range(touch.page, touch.page + touch.count):
            often.setdefault(page, 1)
    kept = list(islice(often, limit))
    return WorkingSet(tuple(kept), tuple(often[page] for page in kept))


def _recording(run: list[Touch], unit: int, limit: int) -> WorkingSet:
    run = _from_begin(run)
    end = run[0].seconds + RECORDING_SECONDS
    kept = _without_sweeps([touch for touch in run if touch.seconds <= end])
    spans = (range(t.page // unit * unit, -(-(t.page + t.count) // unit) * unit) for t in kept)
    return recorded((page for span in spans for page in span), limit)


def _from_begin(run: list[Touch]) -> list[Touch]:
    """Without somebody's look at a few pages, long before the guest was started."""
    pages = 0
    for number, touch in enumerate(run):
        if number and pages <= FEW and touch.seconds - run[number - 1].seconds > SILENCE_SECONDS:
            return _from_begin(run[number:])
        pages += touch.count
        if pages > FEW:
            break
    return run


@dataclass(slots=True)
class _Head:
    """Someone who goes in one direction, which is open (0) until it has come some way."""

    low: int
    high: int
    direction: int = 0
    pages: int = 0
    members: list[int] = field(default_factory=list)

    def follows(self, touch: Touch) -> bool:
        """Whether the touch goes on from here."""
        up = -GAP <= touch.page - self.high <= GAP
        down = -GAP <= self.low - touch.page - touch.count <= GAP
        return (up and self.direction >= 0) or (down and self.direction <= 0)

    def advance(self, number: int, touch: Touch) -> None:
        low, high = min(self.low, touch.page), max(self.high, touch.page + touch.count)
        if not self.direction and high - low > 2 * GAP:
            self.direction = 1 if high > self.high else -1
        self.low, self.high = low, high
        self.pages += touch.count
        self.members.append(number)

    @property
    def is_sweep(self) -> bool:
        """Long, and not only here and there."""
        return self.pages >= SWEEP_PAGES and 4 * self.pages >= self.high - self.low


def _without_sweeps(touches: list[Touch]) -> list[Touch]:
    heads: list[_Head] = []
    dropped: set[int] = set()
    for number, touch in enumerate(touches):
        head = next((head for head in heads if head.follows(touch)), None)
        if head is None:
            head = _Head(touch.page, touch.page)
            del heads[HEADS - 1 :]
        else:
            heads.remove(head)
        heads.insert(0, head)
        head.advance(number, touch)
        if head.is_sweep:
            dropped.update(head.members)
            head.members.clear()
    return [touch for number, touch in enumerate(touches) if number not in dropped]
