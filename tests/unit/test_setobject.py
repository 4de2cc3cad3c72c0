"""The object of a working set: what is written is read, and nothing else is ever taken for it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import Codec
from imagefs.image.setobject import (
    BATCH_PAGES,
    HEADER,
    MAX_FRAME,
    MAX_PAGES,
    MAX_TABLE,
    PAGES,
    RECORD,
    SetBuilder,
    SetPages,
    SetParser,
    SetWindow,
)
from imagefs.image.workingset import WorkingSet
from imagefs.store.workingset import find_header, read_set
from tests.unit.working_sets import SetImage

WANTED = [650, 3, 4, 5, 300, 17, 651, 90, 91, 92, 93, 699, 16]


@pytest.fixture(scope="module", params=[True, False], ids=["parts", "no parts"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SetImage:
    return SetImage.make(tmp_path_factory.mktemp("store"), parts=request.param)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_wanted_comes_in_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, 1200), "pages")
    image = SetImage.make(
        tmp_path_factory.mktemp("store"),
        pages,
        data.draw(st.integers(0, 2**32), "seed"),
        data.draw(st.sampled_from([0.0, 0.6, 0.98]), "zeros"),
        data.draw(st.sampled_from([8, 16, 64]), "chunk_pages"),
        data.draw(st.booleans(), "parts"),
    )
    wanted = data.draw(st.lists(st.integers(0, pages - 1), max_size=200, unique=True), "wanted")
    stored = image.publish(wanted)
    piece = data.draw(st.sampled_from([1, 13, 4096, 1 << 20]), "piece")
    runs = image.read(stored, piece)
    found = image.check(runs)
    # Page 0 travels with the metadata.
    needed = [page for page in wanted if page and not image.is_zero(page)]
    assert found.issuperset(needed)
    chunk_pages = image.image.manifest.chunk_pages
    used = {page // chunk_pages for page in needed}
    order = list(dict.fromkeys(run.first // chunk_pages for run in runs))
    assert order == [
        window for window in dict.fromkeys(page // chunk_pages for page in wanted if page) if window in used
    ]
    header = find_header(image.store, image.image)
    assert header is not None
    assert (header.size, header.pages) == (len(stored), len(read_set(image.store, image.image, Codec())))


def test_no_byte_may_be_missing(made: SetImage) -> None:
    stored = made.publish(WANTED)
    assert made.check(made.read(stored)).issuperset(page for page in WANTED if not made.is_zero(page))
    for length in [*range(0, len(stored), 97), len(stored) - 1]:
        with pytest.raises(CorruptObjectError, match="working set: "):
            made.read(stored[:length])
    with pytest.raises(CorruptObjectError, match="left over"):
        made.read(stored + b"\0")


def test_a_flipped_bit_never_changes_a_page(made: SetImage) -> None:
    stored = made.publish(WANTED)
    for at in range(0, len(stored), 41):
        damaged = bytearray(stored)
        damaged[at] ^= 1 << at % 8
        try:
            runs = made.read(bytes(damaged))
        except CorruptObjectError:
            continue
        # Number of recordings, or a bit that a frame does not use.
        made.check(runs)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=600), piece=st.integers(1, 64))
def test_arbitrary_bytes_are_refused(made: SetImage, data: bytes, piece: int) -> None:
    with pytest.raises(CorruptObjectError):
        made.read(data, piece)
    with pytest.raises(CorruptObjectError):
        made.read(HEADER.pack(b"IFSWSET1", made.image.digest, HEADER.size + len(data), 3, 9) + data, piece)


def test_a_set_of_another_image_is_refused(made: SetImage, tmp_path: Path) -> None:
    other = SetImage.make(tmp_path / "other", seed=4)
    with pytest.raises(CorruptObjectError, match=f"of another image, {other.image.digest.hex()}"):
        made.read(other.publish(WANTED))


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (SetWindow(44, 1, 1, b""), "beyond the memory"),
        (SetWindow(1 << 60, 1, 1, b""), "beyond the memory"),
        (SetWindow(0, 1, 1, bytes(32)), "not the pages that the index has"),
        (SetWindow(0, 1, 1 << 15 | 1, bytes(32 * 14)), "digest is not|not the pages"),
    ],
)
def test_windows_that_the_index_does_not_have(made: SetImage, window: SetWindow, reason: str) -> None:
    if not made.image.metadata.parts:
        reason = "comes before its index block|beyond the memory"
    builder = SetBuilder(made.image.digest, 16, Codec())
    builder.add_window(window, bytes(4096 * window.pages))
    with pytest.raises(CorruptObjectError, match=reason):
        made.read(builder.finish())


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ((PAGES, 0, 1, MAX_TABLE + 1, 0), "length"),
        ((PAGES, 0, 1, 0, MAX_FRAME + 1), "length"),
        ((PAGES, 0, 0, 0, 0), "kind, level or count"),
        ((PAGES, 1, 1, 0, 0), "kind, level or count"),
        ((PAGES, 0, BATCH_PAGES + 1, 0, 0), "kind, level or count"),
        ((3, 0, 1, 0, 0), "kind, level or count"),
        ((1, 0, 2, 8, 0), "block"),
    ],
)
def test_lengths_are_checked_before_anything_is_kept(record: tuple[int, ...], reason: str) -> None:
    size = HEADER.size + RECORD.size + 8
    data = HEADER.pack(b"IFSWSET1", bytes(32), size, 1, 1) + RECORD.pack(*record) + bytes(8)
    parser = SetParser(bytes(32), 16, key="set", origin="test")
    with pytest.raises(CorruptObjectError, match=reason):
        parser.feed(data[: size - 8 + (0 if reason == "length" else record[3])])


@pytest.mark.parametrize(
    ("at", "field", "name"),
    [(0, b"IFSWSET2", "magic"), (40, struct.pack("<Q", 1 << 40), "size"), (52, b"\xff" * 4, "pages")],
)
def test_the_header_is_checked(at: int, field: bytes, name: str) -> None:
    header = bytearray(HEADER.pack(b"IFSWSET1", bytes(32), HEADER.size, 0, 0))
    header[at : at + len(field)] = field
    with pytest.raises(CorruptObjectError, match=f"bad {name} in the header"):
        SetParser(bytes(32), 16, key="set", origin="test").feed(header)
    assert MAX_PAGES < 0xFFFFFFFF


def test_a_parser_holds_no_more_than_a_record(made: SetImage) -> None:
    stored = made.publish(range(1, 700))
    parser = SetParser(made.image.digest, 16, key="set", origin="test")
    records = [record for at in range(0, len(stored), 1000) for record in parser.feed(stored[at : at + 1000])]
    batches = [record for record in records if isinstance(record, SetPages)]
    assert len(batches) > 3
    assert all(batch.pages < BATCH_PAGES + 16 for batch in batches)
    assert parser.complete


def test_how_often_travels_along(made: SetImage) -> None:
    pages = [page for page in range(1, 700) if not made.is_zero(page)][:40:20]
    made.publish(WorkingSet(tuple(pages), (3, 255)))
    found = dict(read_set(made.store, made.image, Codec()).items())
    assert [found[page] for page in pages] == [3, 255]


def test_what_travels_anyway_is_left_out(made: SetImage) -> None:
    zero = next(page for page in range(700) if made.is_zero(page))
    empty = made.publish([0, zero])
    assert made.read(empty) == []
    # The leaf is there nevertheless, where it does not come with the metadata: zeros are known by it.
    assert (len(empty) > HEADER.size) == (not made.image.metadata.parts)
