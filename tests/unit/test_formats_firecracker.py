"""Firecracker snapshots: the state's frame, where memory is, and diffs over their base."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import firecracker, open_capture
from imagefs.formats.firecracker import GIB, crc64
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native_files import NativeFile, spans
from imagefs.image.native_reader import NativeReader
from tests.unit.samples_firecracker import (
    DIFF,
    MAGIC_ARM,
    MEMORY,
    STATE,
    old_vmstate,
    packed_vmstate,
    region_list,
    vmstate,
)
from tests.unit.streams import page_of

MIB = 1 << 20


def sparse_file(path: Path, size: int, pages: dict[int, bytes]) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        for page, data in pages.items():
            os.pwrite(file.fileno(), data, page * PAGE_SIZE)
    return path


def test_crc_is_that_of_the_crate() -> None:
    """The values of the documentation tests in Firecracker's src/vmm/src/snapshot/crc.rs."""
    assert crc64(bytes([1, 2, 3, 4, 5])) == 0xFB04_60DE_0638_3654
    assert crc64(bytes([123]) * 16) == 0x29D5_3572_1632_6566


@pytest.mark.parametrize(
    ("state", "version"),
    [(STATE, "8.0.0"), (old_vmstate(), "23"), (packed_vmstate(), "")],
    ids=["serde", "old", "bitcode"],
)
@pytest.mark.parametrize("how", ["file", "directory", "pipe"])
def test_snapshot(tmp_path: Path, state: bytes, version: str, how: str) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "vmstate").write_bytes(state)
    (snapshot / "mem").write_bytes(MEMORY)
    sources: dict[str, Path | BinaryIO] = {
        "file": snapshot / "vmstate",
        "directory": snapshot,
        "pipe": io.BytesIO(state),
    }
    memory = [] if how == "directory" else [snapshot / "mem"]
    with open_capture(sources[how], spool_dir=tmp_path, memory_files=memory) as capture:
        assert (capture.source_format, capture.source_version) == ("firecracker", version)
        assert capture.state.read_at(0, 1 << 20) == state
        assert capture.memory.read_at(0, 1 << 20) == MEMORY
        assert [(r.guest_address, r.size) for r in capture.geometry.regions] == [(0, len(MEMORY))]
        assert capture.restore == {"vmm": "firecracker", "architecture": "x86_64", "ram_bytes": len(MEMORY)}
        assert capture.native_files == (NativeFile("vmstate", len(state)), NativeFile("mem", len(MEMORY)))
        assert NativeReader(capture.native, capture.memory).read_at(0, 1 << 20) == state + MEMORY
        assert capture.native.literals.size == len(state)


@pytest.mark.parametrize(
    ("mib", "told", "regions", "note"),
    [
        (3072, [], [(0, 3 * GIB)], None),
        (3200, [(0, 3200 * MIB)], [(0, 3200 * MIB)], None),
        (3200, [(0, 3 * GIB), (4 * GIB, 128 * MIB)], [(0, 3 * GIB), (4 * GIB, 128 * MIB)], None),
        (4096, [(0, 3328 * MIB), (4 * GIB, 768 * MIB)], [(0, 3328 * MIB), (4 * GIB, 768 * MIB)], None),
        (4096, [(0, 3 * GIB), (4 * GIB, GIB)], [(0, 3 * GIB), (4 * GIB, GIB)], None),
        (4096, [(0, 2 * GIB)], [(0, 4 * GIB)], "addresses count from zero"),
        (
            300 << 10,
            [(0, 3 * GIB), (4 * GIB, 252 * GIB), (512 * GIB, 45 * GIB)],
            [(0, 3 * GIB), (4 * GIB, 252 * GIB), (512 * GIB, 45 * GIB)],
            None,
        ),
    ],
)
def test_regions_as_the_state_tells(
    tmp_path: Path, mib: int, told: list[tuple[int, int]], regions: list[tuple[int, int]], note: str | None
) -> None:
    memory = sparse_file(tmp_path / "mem", mib * MIB, {1: page_of(1)})
    (tmp_path / "vmstate").write_bytes(vmstate(b"before" + region_list(*told) + b"behind"))
    with open_capture(tmp_path / "vmstate", spool_dir=tmp_path, memory_files=[memory]) as capture:
        assert [(r.guest_address, r.size) for r in capture.geometry.regions] == regions
        assert (note is None) == ("notes" not in capture.restore)
        assert note is None or note in capture.restore["notes"][0]


def test_other_machines(tmp_path: Path) -> None:
    memory = sparse_file(tmp_path / "mem", 4 * GIB, {})
    (tmp_path / "arm").write_bytes(vmstate(magic=MAGIC_ARM))
    with open_capture(tmp_path / "arm", spool_dir=tmp_path, memory_files=[memory]) as capture:
        assert [(r.guest_address, r.size) for r in capture.geometry.regions] == [(2 * GIB, 4 * GIB)]
        assert capture.restore["architecture"] == "aarch64"
    (tmp_path / "packed").write_bytes(packed_vmstate())
    with open_capture(tmp_path / "packed", spool_dir=tmp_path, memory_files=[memory]) as capture:
        assert [(r.guest_address, r.size) for r in capture.geometry.regions] == [(0, 3 * GIB), (4 * GIB, GIB)]
        assert "as of Firecracker 1.15" in capture.restore["notes"][0]


def laid(layers: list[dict[int, bytes]], pages: int) -> bytes:
    memory = bytearray(pages * PAGE_SIZE)
    for layer in layers:
        for page, data in layer.items():
            memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data
    return bytes(memory)


@settings(max_examples=25)
@given(
    layers=st.lists(st.dictionaries(st.integers(0, 40), st.integers(0, 250), max_size=12), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_layers(tmp_path_factory: pytest.TempPathFactory, layers: list[dict[int, int]], seed: int) -> None:
    """Memory is what copying each diff's data over the base makes; each file is itself again."""
    directory = tmp_path_factory.mktemp("layers")
    content = [{page: bytes([value]) * PAGE_SIZE for page, value in layer.items()} for layer in layers]
    paths = [sparse_file(directory / f"m{n}", 41 * PAGE_SIZE, pages) for n, pages in enumerate(content)]
    (directory / "vmstate").write_bytes(STATE)
    expected = laid(content, 41)
    with open_capture(directory / "vmstate", spool_dir=directory, memory_files=paths) as capture:
        assert capture.memory.read_at(0, len(expected)) == expected
        rng = random.Random(seed)
        for _ in range(10):
            offset, length = rng.randrange(len(expected)), rng.randrange(3 * PAGE_SIZE)
            assert capture.memory.read_at(offset, length) == expected[offset : offset + length]
            data_at = capture.memory.next_data(offset)
            assert offset <= data_at
            assert not any(expected[offset:data_at])
        native = NativeReader(capture.native, capture.memory).read_at(0, 1 << 30)
        for path, start, end in spans(capture.native_files):
            assert native[start:end] == (directory / path).read_bytes()


def test_what_diffs_hide_is_kept_once(tmp_path: Path) -> None:
    """In the store are the memory, and of the files what is not in it."""
    base = sparse_file(tmp_path / "base", 100 * PAGE_SIZE, {page: page_of(page) for page in range(100)})
    diff = sparse_file(tmp_path / "diff", 100 * PAGE_SIZE, {7: page_of(200), 9: bytes(PAGE_SIZE)})
    (tmp_path / "vmstate").write_bytes(STATE)
    with open_capture(tmp_path / "vmstate", spool_dir=tmp_path, memory_files=[base, diff]) as capture:
        assert capture.memory.read_at(7 * PAGE_SIZE, PAGE_SIZE) == page_of(200)
        assert capture.memory.read_at(9 * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        # The state, pages 7 and 9 of the base, a page of zeros for each hole, and once 64 KiB of them.
        assert capture.native.literals.size == len(STATE) + (2 + 3) * PAGE_SIZE + (64 << 10)


def test_diffs_that_do_not_fit(tmp_path: Path) -> None:
    base = sparse_file(tmp_path / "mem", len(MEMORY), {0: page_of(1)})
    (tmp_path / "diff").write_bytes(DIFF)
    (tmp_path / "vmstate").write_bytes(STATE)
    with (
        pytest.raises(
            UsageError, match=r"diff has no holes, so nothing of .*mem would be left: .* \(cp --sparse=always"
        ),
        open_capture(tmp_path / "vmstate", spool_dir=tmp_path, memory_files=[base, tmp_path / "diff"]),
    ):
        pass
    sparse_file(tmp_path / "diff", len(DIFF) + PAGE_SIZE, {})
    with (
        pytest.raises(
            UnsupportedInputError, match=r"size of the diff: .*diff has 28,672 bytes, the memory below it 24,576"
        ),
        open_capture(tmp_path / "vmstate", spool_dir=tmp_path, memory_files=[base, tmp_path / "diff"]),
    ):
        pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (STATE[:-1], "crc of the state file: .* is not that of the"),
        (STATE[:20] + b"!" + STATE[21:], "the state file is damaged or cut at offset"),
        (vmstate(version="8.0"), "version of the state file: 3 bytes, which are no MAJOR.MINOR.PATCH at offset 0x8"),
        (STATE[:10], "crc of the state file: the state file ends here at offset 0xa"),
        (STATE + bytes(firecracker.MAX_STATE), "state file: 10,485,9.. bytes, over 10,485,760"),
        (b"QEVM" + bytes(100), "magic of the state file: 5145564d00000000 is none of Firecracker's at offset 0x0"),
    ],
)
def test_states_that_are_refused(tmp_path: Path, state: bytes, message: str) -> None:
    (tmp_path / "mem").write_bytes(MEMORY)
    (tmp_path / "vmstate").write_bytes(state)
    with (
        pytest.raises(UnsupportedInputError, match=message),
        open_capture(tmp_path / "vmstate", spool_dir=tmp_path, format="firecracker", memory_files=[tmp_path / "mem"]),
    ):
        pass


def test_which_files(tmp_path: Path) -> None:
    spool_dir, snapshot = tmp_path / "spool", tmp_path / "snapshot"
    spool_dir.mkdir()
    snapshot.mkdir()
    (snapshot / "vmstate").write_bytes(STATE)
    with (
        pytest.raises(UsageError, match="has no file beside the state vmstate; say which is the memory: --memory FILE"),
        open_capture(snapshot, spool_dir=spool_dir),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"vmstate is the state only; say where the memory is: --memory FILE, and"),
        open_capture(snapshot / "vmstate", spool_dir=spool_dir),
    ):
        pass
    (snapshot / "mem").write_bytes(MEMORY)
    (snapshot / "rootfs").write_bytes(b"disk")
    with (
        pytest.raises(UsageError, match="has several files beside the state vmstate; say which is the memory"),
        open_capture(snapshot, spool_dir=spool_dir),
    ):
        pass
    with open_capture(snapshot, spool_dir=spool_dir, memory_files=[snapshot / "mem"]) as capture:
        assert [file.path for file in capture.native_files] == ["vmstate", "mem"]
    (snapshot / "vmstate2").write_bytes(STATE)
    with (
        pytest.raises(
            UnsupportedInputError, match="vmstate and vmstate2 may be the state file; give it and its memory"
        ),
        open_capture(snapshot, spool_dir=spool_dir, format="firecracker"),
    ):
        pass
    (snapshot / "odd").write_bytes(MEMORY[:-1])
    with (
        pytest.raises(
            UnsupportedInputError, match=r"size of the memory file: .*odd has 24,575 bytes, which are not whole"
        ),
        open_capture(snapshot / "vmstate", spool_dir=spool_dir, memory_files=[snapshot / "odd"]),
    ):
        pass


def test_memory_through_a_link_in_the_directory_is_not_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "vmstate").write_bytes(STATE)
    (tmp_path / "secret").write_bytes(MEMORY)
    (snapshot / "mem").symlink_to("../secret")
    with pytest.raises(UsageError, match="mem is a symbolic link"), open_capture(snapshot, spool_dir=tmp_path):
        pass
