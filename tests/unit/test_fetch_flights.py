"""What is fetched next: decisions of the flight table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.fetch.flights import Flight, FlightTable, Priority, Request
from imagefs.fetch.link import LinkEstimate
from imagefs.image.index import ChunkRef, PayloadRef

PACK, OTHER = b"p" * 32, b"q" * 32
SIZE = 10_000


def table(connections: int = 8) -> FlightTable:
    return FlightTable(connections)


def want(flights: FlightTable, number: int, priority: Priority, pack: bytes = PACK) -> Flight:
    ref = ChunkRef(number.to_bytes(32, "big"), PayloadRef(pack, number * SIZE, SIZE), 1)
    return flights.want(("memory", number), f"window {number}", ref, priority)


def numbers(request: Request | None) -> list[int]:
    return [] if request is None else [flight.key[1] for flight in request.flights]


def test_a_touch_goes_before_everything_queued() -> None:
    flights = table()
    want(flights, 1, Priority.SWEEP)
    want(flights, 50, Priority.NEIGHBOUR)
    want(flights, 90, Priority.TOUCH)
    assert numbers(flights.next_request()) == [90]


def test_a_working_set_goes_before_neighbours_and_beside_a_touch() -> None:
    flights = table()
    want(flights, 1, Priority.NEIGHBOUR)
    want(flights, 50, Priority.WORKING_SET)
    want(flights, 90, Priority.TOUCH)
    assert [numbers(flights.next_request()) for _ in range(3)] == [[90], [50], [1]]


def test_single_flight_and_promotion() -> None:
    flights = table()
    for number in (1, 2, 3):
        want(flights, number, Priority.SWEEP)
    assert want(flights, 2, Priority.TOUCH) is want(flights, 2, Priority.SWEEP)
    request = flights.next_request()
    assert numbers(request) == [2]
    assert request is not None
    flights.finish(request)
    # 1 and 3 are not neighbours in the pack any more.
    assert [numbers(flights.next_request()), numbers(flights.next_request())] == [[1], [3]]


def test_the_sweep_yields_while_a_touch_is_under_way() -> None:
    flights = table()
    want(flights, 7, Priority.TOUCH)
    touch = flights.next_request()
    want(flights, 1, Priority.SWEEP)
    assert flights.next_request() is None
    want(flights, 8, Priority.NEIGHBOUR)
    assert numbers(flights.next_request()) == [8]
    assert touch is not None
    flights.finish(touch)
    assert flights.next_request(sweep=False) is None
    assert numbers(flights.next_request()) == [1]


def test_slots_are_reserved_for_touches() -> None:
    flights = table(connections=8)
    for number in range(0, 400, 2):
        want(flights, number, Priority.SWEEP)
    background = [flights.next_request() for _ in range(8)]
    assert [request is not None for request in background] == [True] * 4 + [False] * 4
    for number in range(1, 11, 2):
        want(flights, number, Priority.TOUCH)
    assert [numbers(flights.next_request()) for _ in range(5)] == [[1], [3], [5], [7], []]


def test_neighbours_in_a_pack_share_a_request_up_to_its_size() -> None:
    flights = table()
    size = LinkEstimate(4).request_size() // SIZE
    last = 2 * size + 3
    for number in range(last):
        want(flights, number, Priority.SWEEP)
    want(flights, last, Priority.SWEEP, OTHER)
    expected = [list(range(size)), list(range(size, 2 * size)), list(range(2 * size, last)), [last]]
    for those in expected:
        request = flights.next_request()
        assert numbers(request) == those
        assert request is not None
        flights.finish(request)


def test_requests_are_as_large_as_they_should_be_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest chunk, not to the next smaller: all slots together fill the window that the size is a part of."""
    for wanted, chunks in ((2.4 * SIZE, 2), (2.6 * SIZE, 3), (0.2 * SIZE, 1)):
        link = LinkEstimate(12)
        monkeypatch.setattr(link, "request_size", lambda wanted=wanted: int(wanted))
        flights = FlightTable(16, link)
        for number in range(10):
            want(flights, number, Priority.SWEEP)
        assert numbers(flights.next_request()) == list(range(chunks))


def test_slots_full_of_little_say_nothing_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link could take more: what it brings meanwhile is not all that it can."""
    for window, starved in ((100 * SIZE, True), (SIZE, False)):
        link = LinkEstimate(4)
        told: list[bool] = []
        monkeypatch.setattr(link, "window", lambda window=window: window)
        monkeypatch.setattr(link, "starved", lambda told=told: told.append(True))
        flights = FlightTable(8, link)
        for number in range(0, 40, 2):
            want(flights, number, Priority.SWEEP)
        while flights.next_request() is not None:
            pass
        assert bool(told) == starved


def test_the_background_has_no_more_under_way_than_the_link_takes() -> None:
    link = LinkEstimate(12)
    flights = FlightTable(16, link)
    for number in range(100):
        want(flights, number, Priority.SWEEP)
    while flights.next_request() is not None:
        pass
    assert link.window() <= flights.background_bytes < link.window() + link.request_size()
    want(flights, 200, Priority.TOUCH)
    assert numbers(flights.next_request()) == [200]


def test_what_is_to_be_tried_again_is_first_again() -> None:
    flights = table()
    for number in (1, 2, 3, 9):
        want(flights, number, Priority.SWEEP)
    request = flights.next_request()
    assert request is not None
    assert numbers(request) == [1, 2, 3]
    flights.finish(request, [request.flights[1]])
    assert numbers(flights.next_request()) == [2]
    assert numbers(flights.next_request()) == [9]
    assert len(flights) == 2


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(list(Priority)), st.booleans(), st.booleans()), max_size=120)
)
def test_no_flight_is_lost_or_made_twice(script: list[tuple[int, Priority, bool, bool]]) -> None:
    flights = table(4)
    flying: list[Request] = []
    known: dict[int, Flight] = {}
    for number, priority, start, finish in script:
        flight = want(flights, number, priority)
        assert known.setdefault(number, flight) is flight
        if start and (request := flights.next_request()) is not None:
            assert all(f.flying for f in request.flights)
            flying.append(request)
        if finish and flying:
            done = flying.pop(0)
            again = done.flights[::2]
            flights.finish(done, again)
            for left in done.flights:
                if left not in again:
                    del known[left.key[1]]
        assert len(flying) == len(flights.requests) <= 4
        assert {f.key[1] for f in flights.flights()} == set(known)
        queued = sum(flights.queued(p) for p in Priority)
        assert queued + sum(len(r.flights) for r in flying) == len(flights)
