"""QEMU migration streams: what a reader makes of whole ones."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.capture import ByteSource, Capture
from imagefs.image.geometry import PAGE_SIZE, Region
from imagefs.image.native_reader import NativeReader
from tests.unit.streams import Built, Kind, Options, Record, build, page_of, xbzrle

MAIN_PAGES = 40
OTHER_PAGES = 3
KINDS: list[Kind] = ["page", "page", "fill", "zlib", "xbzrle"]


class Pipe(io.RawIOBase):
    """Not seekable, and gives little at a time."""

    def __init__(self, data: bytes, piece: int) -> None:
        self._source = io.BytesIO(data)
        self._piece = piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._source.read(min(len(buffer), self._piece))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def captured(data: bytes, piped: int = 0, memory_files: Sequence[Path] = ()) -> Iterator[Capture]:
    """The capture of a stream, out of a regular file or out of a pipe that gives ``piped`` bytes at a time."""
    with tempfile.TemporaryDirectory(prefix="imagefs-test-") as name:
        directory = Path(name)
        source: Path | BinaryIO = directory / "save"
        if piped:
            source = io.BufferedReader(Pipe(data, piped), 512)
        else:
            (directory / "save").write_bytes(data)
        with open_capture(source, spool_dir=directory, memory_files=memory_files) as capture:
            yield capture


def content(source: ByteSource) -> bytes:
    return bytes(source.read_at(0, source.size))


def check(built: Built, capture: Capture) -> None:
    assert content(capture.memory) == built.memory
    assert content(capture.state) == built.state
    reader = NativeReader(capture.native, capture.memory)
    assert reader.size == len(built.data)
    assert content(reader) == built.data


def contents() -> st.SearchStrategy[bytes]:
    return st.integers(0, 5).map(lambda seed: bytes(PAGE_SIZE) if seed == 0 else page_of(seed))


@st.composite
def runs(draw: st.DrawFn) -> list[Record]:
    """Records of consecutive pages of one block and of one kind."""
    block, pages = draw(st.sampled_from([("pc.ram", MAIN_PAGES), ("pc.ram", MAIN_PAGES), ("vga.vram", OTHER_PAGES)]))
    kind: Kind = draw(st.sampled_from(KINDS))
    first = draw(st.integers(0, pages - 1))
    count = draw(st.integers(1, min(pages - first, 3 if kind == "zlib" else 20)))
    named = draw(st.sampled_from(["never", "first", "always"]))
    records = []
    for page in range(first, first + count):
        data = draw(st.sampled_from([b"\0", b"\0", b"\0", b"\xff"])) if kind == "fill" else draw(contents())
        records.append(Record(kind, block, page, data, named == "always" or (named == "first" and page == first)))
    return records


def sections_of(most_runs: int) -> st.SearchStrategy[list[Record]]:
    return st.lists(runs(), max_size=most_runs).map(lambda some: list(chain.from_iterable(some)))


SECTIONS = st.lists(sections_of(4), min_size=1, max_size=5)

BLOCKS = {"pc.ram": MAIN_PAGES * PAGE_SIZE, "vga.vram": OTHER_PAGES * PAGE_SIZE}


def without_lone_deltas(sections: list[list[Record]]) -> list[list[Record]]:
    """A delta needs a copy before it, and is shorter than a page: else it is a plain page."""
    seen: dict[tuple[str, int], bytes] = {}
    result: list[list[Record]] = []
    for section in sections:
        result.append([])
        for record in section:
            old = seen.get((record.block, record.page), record.data)
            if record.kind == "xbzrle" and not 0 < len(xbzrle(old, record.data)) <= PAGE_SIZE:
                record = replace(record, kind="page")
            seen[record.block, record.page] = record.data
            result[-1].append(record)
    return result


@settings(max_examples=150)
@given(SECTIONS, st.sampled_from([0, 700, 100_000]), st.booleans(), st.booleans())
def test_any_order_of_records(sections: list[list[Record]], piped: int, footers: bool, ended: bool) -> None:
    """Last copies win, earlier ones are found again, the state has the other blocks' pages: file and pipe alike."""
    sections = without_lone_deltas([*sections, [Record("page", "pc.ram", 0, page_of(9))]])
    built = build(sections, Options(blocks=BLOCKS, footers=footers, ended=ended))
    with captured(built.data, piped) as capture:
        check(built, capture)
        assert capture.native.exceptions.size // 8 == capture.native.superseded.size // PAGE_SIZE


@given(st.data())
def test_native_at_any_offset(data: st.DataObject) -> None:
    built = build(
        [*without_lone_deltas([data.draw(sections_of(5))]), [Record("fill", "pc.ram", 1, b"\0")]],
        Options(blocks=BLOCKS),
    )
    with captured(built.data, data.draw(st.sampled_from([0, 5000]))) as capture:
        reader = NativeReader(capture.native, capture.memory)
        for _ in range(10):
            offset = data.draw(st.integers(0, len(built.data) + 10))
            length = data.draw(st.integers(0, 3 * PAGE_SIZE))
            assert reader.read_at(offset, length) == built.data[offset : offset + length]
            memory_at = data.draw(st.integers(0, len(built.memory)))
            assert capture.memory.read_at(memory_at, length) == built.memory[memory_at : memory_at + length]
            found = capture.memory.next_data(memory_at)
            assert memory_at <= found <= len(built.memory)
            assert not any(built.memory[memory_at:found])


@pytest.mark.parametrize("piped", [0, 65536])
def test_live_migrated_guest(piped: int) -> None:
    """Long runs, sent three times, the passes overlapping: more than one batch and one window of pages each."""
    pages = 3000
    sections = [[Record("page", "pc.ram", page, page_of(page)) for page in range(pages)]]
    for turn in (1, 2):
        some = [page for page in range(pages) if page % 7 < 3 + turn or 1000 < page < 2500]
        sections.append([Record("page", "pc.ram", page, page_of(page + turn * pages)) for page in some])
    sections.append([Record("fill", "pc.ram", page, b"\0") for page in range(100, 2000)])
    built = build(sections, Options(blocks={"pc.ram": pages * PAGE_SIZE}))
    with captured(built.data, piped) as capture:
        check(built, capture)
        assert capture.native.superseded.size // PAGE_SIZE == sum(map(len, sections)) - 1900 - (pages - 1900)


def test_template_is_small() -> None:
    """A stopped guest's pages and zero pages in runs are a few entries, whatever their number."""
    records = [Record("page", "pc.ram", page, page_of(page)) for page in range(2500)]
    records += [Record("fill", "pc.ram", page, b"\0") for page in range(2500, 5000)]
    built = build([[], records], Options(blocks={"pc.ram": 5000 * PAGE_SIZE}))
    for piped in (0, 5000, 65536):
        with captured(built.data, piped) as capture:
            check(built, capture)
            assert capture.native.entries.size // 40 <= 6
            assert capture.native.exceptions.size == 0


def test_what_the_capture_says() -> None:
    options = Options(
        machine="pc-q35-7.2",
        blocks={"ram": 4 * PAGE_SIZE, "0000:00:02.0/vga.vram": 8 * PAGE_SIZE, "/rom@etc/acpi/rsdp": PAGE_SIZE},
        main="ram",
        uuid=bytes(range(16)),
        page_bits=12,
    )
    built = build([[Record("page", "ram", 1, page_of(1))], []], options)
    with captured(built.data) as capture:
        check(built, capture)
        assert capture.source_format == "qemu-migration"
        assert capture.geometry.regions == (Region("ram", 0, 4 * PAGE_SIZE, 0),)
        assert capture.restore == {
            "vmm": "qemu",
            "machine": "pc-q35-7.2",
            "ram_block": "ram",
            "ram_bytes": 4 * PAGE_SIZE,
            "incoming": "plain",
            "other_blocks": {"0000:00:02.0/vga.vram": 8 * PAGE_SIZE, "/rom@etc/acpi/rsdp": PAGE_SIZE},
            "vmdesc": True,
            "cpus": 1,
            "uuid": bytes(range(16)).hex(),
        }
        assert json.loads(capture.config["qemu-vmdesc.json"])["page_size"] == 4096


def test_without_configuration_and_description() -> None:
    built = build([[Record("page", "pc.ram", 1, page_of(1))]], Options(machine=None, description=False))
    with captured(built.data) as capture:
        check(built, capture)
        assert capture.restore["machine"] == ""
        assert capture.restore["vmdesc"] is False
        assert not capture.config


OTHERS = [Record("page", "vga.vram", 0, page_of(3)), Record("fill", "vga.vram", 1, b"\0")]


def test_harmless_commands() -> None:
    """A destination that reads a file has no return path: its commands stay out of the state, others stay."""
    options = Options(commands=[(1, b""), (2, b"\0\0\0\1")], late_commands=[(11, b"")])
    sections = [[], [Record("page", "pc.ram", 1, page_of(1)), *OTHERS], OTHERS]
    built = build(sections, options)
    assert b"\x08\0\x01" in built.data
    assert b"\x08\0\x01" not in built.state
    assert built.data.count(b"\x08\0\x0b\0\0") == built.state.count(b"\x08\0\x0b\0\0") == 1
    with captured(built.data) as capture:
        check(built, capture)


def shared_stream(records: list[Record], main_size: int = 4 * PAGE_SIZE) -> Built:
    options = Options(
        blocks={"ram": main_size, "vga.vram": 2 * PAGE_SIZE},
        main="ram",
        capabilities=["x-ignore-shared"],
        addresses={"vga.vram": 0xFD00_0000},
    )
    return build([records], options)


def test_ignore_shared(tmp_path: Path) -> None:
    memory = tmp_path / "ram"
    memory.write_bytes(page_of(7) + bytes(2 * PAGE_SIZE) + page_of(8))
    built = shared_stream(OTHERS)
    options = Options(blocks={"ram": 4 * PAGE_SIZE, "vga.vram": 2 * PAGE_SIZE}, main="ram")
    plain = build([[*OTHERS, Record("page", "ram", 0, page_of(7))]], options)
    with captured(built.data, memory_files=[memory]) as capture:
        assert content(capture.memory) == memory.read_bytes()
        assert content(capture.state) == built.state == plain.state
        assert content(NativeReader(capture.native, capture.memory)) == built.data
        assert capture.native.literals.size == len(built.data)


def test_form_of_the_state_does_not_depend_on_time() -> None:
    """However QEMU's iterations cut the pages into sections, and with or without SECTION_END."""
    page = Record("page", "pc.ram", 1, page_of(1))
    states = set()
    for sections, ended in (
        ([[], [page, *OTHERS], []], True),
        ([[], [OTHERS[0], page], [], [page], [OTHERS[1]]], True),
        ([[], OTHERS, [page]], False),
    ):
        with captured(build(sections, Options(ended=ended)).data) as capture:
            states.add(content(capture.state))
    assert len(states) == 1


def test_ignore_shared_without_its_file() -> None:
    with (
        pytest.raises(UnsupportedInputError, match=r"block 'ram'.*--memory"),
        captured(shared_stream(OTHERS).data),
    ):
        pass


def test_ignore_shared_but_private_ram() -> None:
    """The capability was on, the RAM was not shared: the pages are in the stream."""
    built = shared_stream([*OTHERS, Record("page", "ram", 1, page_of(4))])
    with captured(built.data) as capture:
        check(built, capture)


def test_memory_file_that_is_not_wanted(tmp_path: Path) -> None:
    memory = tmp_path / "ram"
    memory.write_bytes(bytes(4 * PAGE_SIZE))
    plain = build([[Record("page", "pc.ram", 1, page_of(1))]])
    with pytest.raises(UsageError, match=r"--memory .*x-ignore-shared"), captured(plain.data, memory_files=[memory]):
        pass
    private = shared_stream([*OTHERS, Record("page", "ram", 1, page_of(4))])
    with pytest.raises(UsageError, match=r"--memory .*itself"), captured(private.data, memory_files=[memory]):
        pass
    memory.write_bytes(bytes(3 * PAGE_SIZE))
    with (
        pytest.raises(UsageError, match=r"12,288 bytes.*16,384"),
        captured(shared_stream(OTHERS).data, memory_files=[memory]),
    ):
        pass


def test_other_block_in_shared_memory(tmp_path: Path) -> None:
    """Its pages are nowhere to be had: refused rather than filled with zeros."""
    memory = tmp_path / "ram"
    memory.write_bytes(bytes(4 * PAGE_SIZE))
    with (
        pytest.raises(UnsupportedInputError, match=r"'vga.vram' was in shared memory"),
        captured(shared_stream([]).data, memory_files=[memory]),
    ):
        pass


def test_source_changes_meanwhile(tmp_path: Path) -> None:
    """What is read in place must not change under the writer."""
    built = build([[Record("page", "pc.ram", page, page_of(page)) for page in range(8)]])
    path = tmp_path / "save"
    path.write_bytes(built.data)
    with open_capture(path, spool_dir=tmp_path) as capture:
        assert content(capture.memory) == built.memory
        path.write_bytes(built.data + b"x")
        with pytest.raises(UnsupportedInputError, match="changed while it was being read"):
            capture.memory.read_at(0, PAGE_SIZE)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    built = build([[Record("page", "pc.ram", 0, page_of(0))]])
    with open_capture(io.BytesIO(built.data), spool_dir=tmp_path) as capture:
        assert list(tmp_path.iterdir()) == []
        assert content(capture.memory) == built.memory
