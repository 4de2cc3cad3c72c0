"""Pages are put together from wherever they are, at the cost of the pages alone."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.formats.gather import GatheredMemory
from imagefs.formats.spool import Spool
from imagefs.image.geometry import PAGE_SIZE


def page_at(offset: int) -> bytes:
    return offset.to_bytes(8, "little") * (PAGE_SIZE // 8)


class Everywhere:
    """A file of any size whose every page says where it is, if it is asked for where a page begins."""

    def __init__(self, pages: Iterable[int]) -> None:
        self._pages = set(pages)

    def read_at(self, offset: int, length: int) -> bytes:
        assert length == PAGE_SIZE
        return page_at(offset)

    def scatter_at(self, offset: int, pieces: Sequence[bytearray | memoryview]) -> None:
        for piece in pieces:
            for at in range(0, len(piece) // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE):
                if offset + at in self._pages:
                    piece[at : at + PAGE_SIZE] = page_at(offset + at)
            offset += len(piece)


@contextmanager
def gathered(directory: Path, places: Sequence[int]) -> Iterator[GatheredMemory]:
    with closing(Spool(directory)) as newest, closing(Spool(directory)) as aside:
        newest.append(array("Q", places).tobytes())
        newest.flush()
        aside.resize(len(places) * PAGE_SIZE)
        yield GatheredMemory(newest, Everywhere(places), aside)


STEPS = st.sampled_from(
    [PAGE_SIZE, PAGE_SIZE + 8, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 8, -PAGE_SIZE, -5 * PAGE_SIZE, 1 << 45]
)


@given(steps=st.lists(STEPS, min_size=1, max_size=40), first=st.integers(0, 39), count=st.integers(1, 40))
def test_each_page_comes_from_its_place(
    steps: list[int], first: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    places = [1 << 50]
    for step in steps:
        places.append(places[-1] + step)
    with gathered(tmp_path_factory.getbasetemp(), places) as memory:
        got = bytes(memory.read_at(first * PAGE_SIZE, count * PAGE_SIZE))
    assert got == b"".join(map(page_at, places[first : first + count]))


def test_what_is_between_two_pages_takes_no_memory(tmp_path: Path) -> None:
    """A page that was sent again late in the stream lies far behind its neighbours."""
    with gathered(tmp_path, [PAGE_SIZE, 1 << 30, 2 * PAGE_SIZE, 3 * PAGE_SIZE]) as memory:
        tracemalloc.start()
        try:
            memory.read_at(0, 4 * PAGE_SIZE)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
