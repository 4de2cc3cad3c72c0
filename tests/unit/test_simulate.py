"""The model of scripts/simulate: arithmetic that can be done by hand, and what a trace becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.simulate.guests import Chunk, touches_of
from support.simulate.model import Link, Touch, simulate
from support.simulate.policies import Combined

from imagefs.fetch.recording import parse_trace

SIZE = 12_500
LINK = Link(mbit=10, rtt_ms=100)
"""A window of SIZE takes 10 ms, and another 100 ms if it was not asked for before."""
SIZES = dict.fromkeys(range(100), SIZE)


def touches(*windows: int, after: float = 0.0) -> list[Touch]:
    return [Touch(after, 16 * window, window) for window in windows]


def test_demand_alone_is_a_round_trip_and_a_transfer_each() -> None:
    found = simulate(touches(5, 6, 5, 7), SIZES, Combined(), LINK)
    assert found.seconds == pytest.approx(3 * 0.110)
    assert (found.waits, found.fetched, found.windows, found.used) == (3, 3 * SIZE, 3, 0)


def test_what_is_not_in_the_image_is_here() -> None:
    assert simulate(touches(500, 501, after=0.25), SIZES, Combined(), LINK).seconds == pytest.approx(0.5)


def test_the_guests_own_time_counts() -> None:
    found = simulate(touches(1, 2, after=1.0), SIZES, Combined(), LINK)
    assert found.seconds == pytest.approx(2 * 1.110)


def test_a_list_is_fetched_while_qemu_starts() -> None:
    found = simulate(touches(1, 2), SIZES, Combined((1, 2)), LINK, head_start=0.5)
    assert (found.seconds, found.waits, found.used) == (0.0, 0, 2)


def test_a_list_comes_one_window_after_the_other() -> None:
    found = simulate(touches(1, 2, 3), SIZES, Combined((1, 2, 3)), LINK)
    assert found.seconds == pytest.approx(0.130), "one round trip for all of them"
    assert found.waits == 3


def test_a_touch_queues_behind_what_was_asked_for() -> None:
    found = simulate(touches(9), SIZES, Combined((1, 2)), LINK)
    assert found.seconds == pytest.approx(0.130)


def test_the_background_leaves_room_for_a_touch() -> None:
    """Of a long list no more is under way than the link carries in a round trip, so a touch waits two at most."""
    found = simulate(touches(99), SIZES, Combined(tuple(range(90))), LINK, head_start=0.4)
    assert 0.110 <= found.seconds <= 0.230
    assert found.windows < 60


@dataclass(frozen=True)
class Next:
    """The window behind each that had to be waited for."""

    def begin(self) -> Iterable[int]:
        return ()

    def touched(self, page: int, window: int, *, missed: bool) -> Iterable[int]:
        return (window + 1,) if missed else ()


def test_what_follows_a_touch_comes_with_it() -> None:
    found = simulate(touches(1, 2, 3, 4), SIZES, Next(), LINK)
    # 2 comes 10 ms behind 1, and is waited for so long, so 3 was asked for then.
    assert (found.waits, found.windows) == (4, 5)
    assert found.seconds == pytest.approx(0.240, abs=0.011)


@given(st.lists(st.integers(0, 99), max_size=30), st.lists(st.integers(0, 120), max_size=60), st.floats(0, 2))
def test_invariants(wanted: list[int], listed: list[int], head_start: float) -> None:
    plain = simulate(touches(*wanted), SIZES, Combined(), LINK)
    found = simulate(touches(*wanted), SIZES, Combined(tuple(listed)), LINK, head_start=head_start)
    assert plain.waits == plain.windows == len(set(wanted))
    assert found.waits <= plain.waits
    assert found.fetched == found.windows * SIZE
    assert found.used <= len(set(listed) & set(wanted))
    assert found.seconds >= 0


def test_touches_are_of_pages_that_have_to_be_fetched() -> None:
    chunk = Chunk(0b0111, SIZE)
    lines = parse_trace(b"1.0 16 1 read\n1.5 17 3 read\n2.0 40 1 read\n1.75 18 1 read\n")
    found = touches_of(lines, {1: chunk}, {17}, 16)
    assert found == [Touch(0.0, 16, 1), Touch(0.5, 18, 1), Touch(0.25, 18, 1)]
