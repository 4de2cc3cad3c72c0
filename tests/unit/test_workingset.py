"""Working sets as lists: merging, bounds, text; and what of a trace is one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.fetch.recording import (
    RECORDING_SECONDS,
    SWEEP_PAGES,
    Touch,
    parse_trace,
    working_set_of,
)
from imagefs.image.workingset import LIMIT, MAX_RECORDINGS, WorkingSet, from_text, merge, recorded, to_text

recordings = st.lists(st.integers(0, 300), max_size=80).map(recorded)


@given(st.lists(recordings, max_size=5))
def test_a_union_has_every_page_once(sets: list[WorkingSet]) -> None:
    merged = merge(sets)
    assert sorted(merged.pages) == sorted({page for each in sets for page in each.pages})
    assert merge([merged]).recordings == merged.recordings
    for page, often in merged.items():
        assert often == sum(page in each.pages for each in sets)


@given(recordings)
def test_one_recording_keeps_its_order(one: WorkingSet) -> None:
    assert merge([one]) == one
    assert merge([one, one]).pages == one.pages


def test_early_and_often_come_first() -> None:
    early = recorded(range(100))
    late = recorded([*range(200, 300), 50])
    merged = merge([early, late])
    assert merged.pages.index(50) < merged.pages.index(49), "twice, if late, before once"
    assert merged.pages.index(0) < merged.pages.index(99)
    assert merged.pages.index(200) < merged.pages.index(99), "early in one before late in the other"


def test_a_resume_that_found_its_pages_does_not_forget_them() -> None:
    whole = recorded(range(1000))
    merged = merge([whole, recorded([5000, 5001])])
    assert set(merged.pages) == {*range(1000), 5000, 5001}


def test_sets_are_bounded() -> None:
    assert len(recorded(range(10 * LIMIT))) == LIMIT
    merged = merge([recorded(range(n * LIMIT, (n + 1) * LIMIT)) for n in range(3)])
    assert len(merged) == LIMIT
    assert merged.pages[:3] == (0, LIMIT, 2 * LIMIT)
    assert merge([WorkingSet((7,), (200,))] * 3).recordings == (MAX_RECORDINGS,)


@given(st.lists(recordings, max_size=3))
def test_text_is_read_again(sets: list[WorkingSet]) -> None:
    merged = merge(sets)
    assert from_text(to_text(merged, 301), 301) == merged


@pytest.mark.parametrize("text", [b"1", b"1 0", b"1 256", b"-1 1", b"9 1", b"1 1 1", b"x 1", b"1 1\n\n", b"\xff 1"])
def test_bad_text_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="line"):
        from_text(text, 9)
    with pytest.raises(ValueError, match="line 3"):
        from_text(b"1 1\n" * 3, 9, limit=2)


# --- from a trace


def touches(pages: list[int], origin: str = "read", start: float = 0.0, step: float = 0.001) -> Iterator[Touch]:
    return (Touch(start + number * step, page, 1, origin) for number, page in enumerate(pages))


GUEST = random.Random(8).sample(range(100_000), 1500)


def test_a_guest_is_recorded_as_it_touches() -> None:
    assert working_set_of(touches(GUEST), 1).pages == tuple(GUEST)


def test_lines_that_are_none_are_left_out() -> None:
    text = b"0.5 7 2 pager\nnonsense\nnan 3 1 pager\n0.6 -1 1 pager\n0.7 9 0 pager\n0.8 11 1 pager\n0.9 1"
    assert working_set_of(parse_trace(text), 1).pages == (7, 8, 11)


def test_nothing_is_recorded_after_a_while() -> None:
    late = touches(list(range(200_000, 300_000, 2)), start=RECORDING_SECONDS + 2, step=0.1)
    assert working_set_of([*touches(GUEST), *late], 1).pages == tuple(GUEST)


def test_a_guest_that_touches_everything_is_cut() -> None:
    everything = random.Random(9).sample(range(1 << 20), 100_000)
    assert len(working_set_of(touches(everything, step=1e-4), 1)) == LIMIT


@pytest.mark.parametrize("reader", ["cp", "backwards", "with holes", "in parallel"])
def test_whoever_reads_all_of_it_leaves_no_trace(reader: str) -> None:
    sweep = [Touch(0.3, page, 32, "read") for page in range(0, 100_000, 32)]
    match reader:
        case "backwards":
            sweep.reverse()
        case "with holes":
            sweep = [touch for touch in sweep if touch.page // 32 % 3]
        case "in parallel":
            sweep = [sweep[number ^ 1] for number in range(len(sweep) - 1)]
    guest = list(touches(GUEST, step=0.0005))
    mixed: list[Touch] = []
    for number, touch in enumerate(guest):
        mixed += [touch, *sweep[number * 2 : number * 2 + 2]]
    found = working_set_of(mixed, 1)
    assert len(set(GUEST) - set(found.pages)) < 20, "the guest's own touches stay"
    assert len(found) < len(GUEST) + 2 * SWEEP_PAGES


def test_a_long_run_that_is_no_sweep_stays() -> None:
    run = list(range(5000, 5000 + SWEEP_PAGES - 1))
    assert working_set_of(touches(run), 1).pages == tuple(run)


def test_where_helpers_write_their_touches_the_mounts_own_do_not_count() -> None:
    own = touches([1, 2, 3], "read")
    assert working_set_of([*own, *touches([70, 60], "pager")], 1).pages == (70, 60)


def test_what_helpers_touch_are_windows() -> None:
    """All of a window is installed when a page of it is touched, and the touches of the rest are not seen."""
    found = working_set_of(touches([70, 3, 75], "pager"), 16)
    assert found.pages == (*range(64, 80), *range(16))
    assert working_set_of(touches([70, 3], "read"), 16).pages == (70, 3)


def test_what_was_here_for_being_likely_comes_last_where_its_touches_are_not_seen() -> None:
    guessed = [Touch(0.1, 32, 16, "likely"), Touch(0.2, 70, 1, "likely")]
    found = working_set_of([*guessed, *touches([70, 3], "pager")], 1)
    assert found.pages == (70, 3, *range(32, 48))
    assert working_set_of([*guessed, *touches([70, 3], "pager")], 1, limit=4).pages == (70, 3, 32, 33)
    assert working_set_of([*guessed, *touches([70, 3], "read")], 1).pages == (70, 3), "touches of a mapping are seen"
    assert not len(working_set_of(guessed, 1)), "nobody has started a guest"


def test_two_guests_in_one_trace_are_two_recordings() -> None:
    found = working_set_of([*touches(GUEST, "pager", 100.0), *touches(GUEST[:100], "pager", 0.5)], 1)
    assert found.pages[:100] == tuple(GUEST[:100])
    assert found.recordings == (2,) * 100 + (1,) * (len(GUEST) - 100)


def test_a_look_at_a_few_pages_does_not_begin_a_recording() -> None:
    look = touches([10, 20, 30])
    guest = touches(GUEST, start=1000.0)
    assert working_set_of([*look, *guest], 1).pages == tuple(GUEST)
