"""Working sets: which pages a resumed guest touches first, in order, put together from several recordings.

A set is a hint. It decides what is fetched sooner, never what a page holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

LIMIT = 16384
"""Pages of a set: 64 MiB, as much as the larger guests of REAP (Ustiugov et al., ASPLOS 2021) touch until they answer.
A set that grows beyond that is no hint any more; the pages that rank last are left out."""
MAX_RECORDINGS = 255
RANK_OFFSET = 60
"""The constant k of reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009), theirs."""


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Page numbers of ``memory`` in the order of their first touch, each once; how many recordings have each."""

    pages: tuple[int, ...] = ()
    recordings: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pages)

    def items(self) -> Iterator[tuple[int, int]]:
        """``(page, recordings)`` in order."""
        return zip(self.pages, self.recordings, strict=True)


def recorded(pages: Iterable[int], limit: int = LIMIT) -> WorkingSet:
    """The set of one recording: pages in the order of their touches, of which the first counts."""
    order = tuple(islice(dict.fromkeys(pages), limit))
    return WorkingSet(order, (1,) * len(order))


def merge(sets: Iterable[WorkingSet], limit: int = LIMIT) -> WorkingSet:
    """The union, ranked by how early and how often: by the sum of ``recordings / (RANK_OFFSET + position)``.

    That a page is missing in a recording counts for nothing: where a set was installed before the guest ran, touches
    of its pages are not seen.
    """
    scores: dict[int, float] = {}
    often: dict[int, int] = {}
    for each in sets:
        for position, (page, recordings) in enumerate(each.items()):
            scores[page] = scores.get(page, 0.0) + recordings / (RANK_OFFSET + position)
            often[page] = often.get(page, 0) + recordings
    order = sorted(scores, key=lambda page: (-scores[page], page))[:limit]
    return WorkingSet(tuple(order), tuple(min(often[page], MAX_RECORDINGS) for page in order))


def to_text(each: WorkingSet, pages: int) -> bytes:
    """A line ``PAGE RECORDINGS`` for each page of a memory of so many, in order."""
    return b"".join(b"%d %d\n" % item for item in each.items() if item[0] < pages)


def from_text(text: bytes, pages: int, limit: int = LIMIT) -> WorkingSet:
    """What :func:`to_text` wrote, for a memory of so many pages. ValueError, naming the line, for anything else."""
    found: dict[int, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        page, _, recordings = line.partition(b" ")
        if not (page.isdigit() and recordings.isdigit() and len(line) < 32):
            raise ValueError(f"line {number}: not PAGE RECORDINGS")
        if int(page) >= pages or not 0 < int(recordings) <= MAX_RECORDINGS or number > limit:
            raise ValueError(f"line {number}: no such page, recordings or line can be")
        found.setdefault(int(page), int(recordings))
    return WorkingSet(tuple(found), tuple(found.values()))
