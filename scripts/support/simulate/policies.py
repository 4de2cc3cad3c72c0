"""The policies that are compared: what an image itself tells of the pages that its guest will want first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from imagefs.fetch.neighbours import NEAR, Neighbourhood, near_windows
from imagefs.image.capture import KERNEL_TEXT
from imagefs.image.geometry import PAGE_SIZE
from support.simulate.guests import RecordedGuest
from support.simulate.model import Link, Policy

Follow = Callable[[int, int, bool], Iterable[int]]
"""Page, window, and whether it had to be waited for: windows that are to follow."""
Lists = dict[str, list[int]]
KEPT = "registers mappings data text program"
"""Of the groups of imagefs/image/likely.py, in their order."""


@dataclass(frozen=True)
class Combined:
    """Implements :class:`support.simulate.model.Policy`: a list, and what follows a touch."""

    listed: tuple[int, ...] = ()
    followers: tuple[Follow, ...] = ()

    def begin(self) -> Iterable[int]:
        return self.listed

    def touched(self, page: int, window: int, *, missed: bool) -> Iterable[int]:
        return chain.from_iterable(follow(page, window, missed) for follow in self.followers)


def policies(guest: RecordedGuest) -> Iterator[tuple[str, Callable[[], Policy]]]:
    """Names, and what makes a fresh one."""
    lists = lists_of(guest)

    def make(names: str, near: int = 0, virtual: int = 0) -> Callable[[], Policy]:
        windows = tuple(dict.fromkeys(chain.from_iterable(lists[name] for name in names.split())))

        def fresh() -> Policy:
            followers = ([physical(guest, near)] if near else []) + ([adjacent(guest, virtual)] if virtual else [])
            return Combined(windows, tuple(followers))

        return fresh

    yield "demand only", make("")
    for near in (2, 4, 8, 12, 16, 24, 32):
        yield f"{near} neighbours", make("", near)
    for name in lists:
        yield name, make(name)
    yield "4 virtual", make("", virtual=4)
    yield "4 neighbours, 4 virtual", make("", NEAR, virtual=4)
    for name in lists:
        yield f"4 neighbours, {name}", make(name, NEAR)
    yield "4 neighbours, kept, without program", make("registers mappings data text", NEAR)
    yield "4 neighbours, kept, program before text", make("registers mappings program data text", NEAR)
    yield "4 neighbours, kept, and accessed", make(f"{KEPT} accessed", NEAR)
    yield "kept, no neighbours", make(KEPT)
    for near in (2, 4, 8, 12, 16, 24, 32):
        yield f"{near} neighbours, kept", make(KEPT, near)


def kept(guest: RecordedGuest, link: Link) -> Policy:
    """What a mount does over that link."""
    near = near_windows(link.bandwidth, link.round_trip, guest.chunk_pages * PAGE_SIZE)
    listed = chain.from_iterable(_windows(guest, guest.likely[name]) for name in KEPT.split())
    return Combined(tuple(dict.fromkeys(listed)), (physical(guest, near),))


def lists_of(guest: RecordedGuest) -> Lists:
    """Windows by what tells of them: the groups of imagefs/image/likely.py, and others."""
    tables = (range(k.first, k.first + k.count) for k in guest.document.kinds if k.kind != KERNEL_TEXT)
    small = [page for page in guest.mapped if page.size == PAGE_SIZE and page.accessed]
    accessed = (guest.page_of(page.physical) for page in sorted(small, key=lambda page: page.user))
    return {
        "tables": _windows(guest, chain.from_iterable(tables)),
        **{name: _windows(guest, pages) for name, pages in guest.likely.items()},
        "accessed": _windows(guest, (page for page in accessed if page is not None)),
    }


def physical(guest: RecordedGuest, near: int) -> Follow:
    """Windows on either side of one that had to be waited for, as a mount does it."""
    neighbourhood = Neighbourhood(guest.windows)
    return lambda page, window, missed: neighbourhood.touched(window, window, missed=missed, near=near)


def adjacent(guest: RecordedGuest, near: int) -> Follow:
    """Windows of the pages on either side by virtual address."""
    order = [page for page in guest.mapped if page.size == PAGE_SIZE]
    places: dict[int, list[int]] = {}
    for index, mapped in enumerate(order):
        page = guest.page_of(mapped.physical)
        if page is not None:
            places.setdefault(page, []).append(index)

    def beside(page: int) -> Iterator[int]:
        for index in places.get(page, []):
            for other in order[max(0, index - near) : index + near + 1]:
                number = guest.page_of(other.physical)
                if abs(other.virtual - order[index].virtual) <= near * PAGE_SIZE and number is not None:
                    yield number

    return lambda page, window, missed: _windows(guest, beside(page)) if missed else ()


def _windows(guest: RecordedGuest, pages: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(page // guest.chunk_pages for page in pages))
