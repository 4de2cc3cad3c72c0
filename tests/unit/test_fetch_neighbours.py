"""What is fetched beside a touch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.fetch.neighbours import FARTHEST, MOST_NEAR, NEAR, Neighbourhood, near_windows


def test_a_jump_brings_both_sides() -> None:
    near = Neighbourhood(1000)
    assert list(near.touched(100, 100, missed=True)) == [101, 102, 103, 104, 96, 97, 98, 99]
    assert list(near.touched(500, 500, missed=False)) == []
    assert list(near.touched(0, 1, missed=True)) == [2, 3, 4, 5]
    assert list(near.touched(999, 999, missed=True)) == [995, 996, 997, 998]


def test_a_sequential_reader_waits_once() -> None:
    """Whoever reads on and on finds everything asked for, ever farther ahead, and nothing asked for twice."""
    near = Neighbourhood(10_000)
    asked = set(near.touched(0, 0, missed=True))
    farthest = 0
    for window in range(1, 5000):
        assert window in asked
        more = list(near.touched(window, window, missed=False))
        assert not asked.intersection(more)
        asked.update(more)
        farthest = max(farthest, max(asked) - window)
    assert FARTHEST // 2 < farthest <= FARTHEST


def test_small_reads_within_a_window_are_sequential_too() -> None:
    near = Neighbourhood(1000)
    asked = set(near.touched(0, 0, missed=True))
    for window in range(900):
        for _ in range(16):
            asked.update(near.touched(window, window, missed=False))
        assert window + 1 in asked


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5), st.booleans())))
def test_never_beyond_the_stream(script: list[tuple[int, int, bool]]) -> None:
    near = Neighbourhood(100)
    for first, more, missed in script:
        wanted = list(near.touched(first, min(99, first + more), missed=missed))
        assert all(0 <= window < 100 for window in wanted)
        assert len(wanted) <= max(FARTHEST, 2 * NEAR)


def test_more_where_the_link_has_room() -> None:
    near = Neighbourhood(1000)
    assert list(near.touched(100, 100, missed=True, near=6)) == [*range(101, 107), *range(94, 100)]
    # A sequential reader goes on from there.
    assert list(near.touched(101, 101, missed=True, near=6)) == [*range(107, 114)]


@pytest.mark.parametrize(
    ("mbit", "rtt_ms", "near"),
    [(10, 150, NEAR), (100, 40, 11), (1000, 10, MOST_NEAR), (10_000, 0.2, 6), (0, 0, NEAR), (1e9, 1e3, MOST_NEAR)],
)
def test_as_many_as_a_round_trip_has_room_for(mbit: float, rtt_ms: float, near: int) -> None:
    assert near_windows(mbit * 1e6 / 8, rtt_ms / 1e3, 65536) == near
