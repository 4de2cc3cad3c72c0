"""How large background requests become, over links that are computed."""

from __future__ import annotations

import pytest

from imagefs.fetch.link import LARGEST, SMALLEST, TARGET_SECONDS, LinkEstimate

PARALLEL = 4


def settle(link: LinkEstimate, rtt: float, bytes_per_second: float) -> float:
    """Background requests, four at a time, until the size is steady; returns what one takes beyond the round trip."""
    link.finished(rtt, background=False)
    waited = []
    for _ in range(300):
        seconds = rtt + PARALLEL * link.background_size() / bytes_per_second
        link.finished(seconds, background=True)
        waited.append(seconds - rtt)
    return sum(waited[-50:]) / 50


@pytest.mark.parametrize(("mbit", "rtt"), [(10, 0.15), (100, 0.04), (1000, 0.01), (50, 0.3)])
def test_the_background_keeps_a_touch_waiting_for_little_and_fills_the_link(mbit: float, rtt: float) -> None:
    link = LinkEstimate()
    waited = settle(link, rtt, mbit * 125_000)
    assert link.background_size() == LARGEST or link.background_size() <= SMALLEST * 1.3 or waited > TARGET_SECONDS / 2
    assert waited < 2.5 * TARGET_SECONDS or link.background_size() < 1.3 * SMALLEST


def test_a_fast_link_gets_large_requests() -> None:
    link = LinkEstimate()
    settle(link, 0.0005, 1.25e9)
    assert link.background_size() == LARGEST


def test_a_link_that_becomes_slower_is_followed() -> None:
    link = LinkEstimate()
    settle(link, 0.01, 125e6)
    assert settle(link, 0.01, 2e6) < 3 * TARGET_SECONDS
