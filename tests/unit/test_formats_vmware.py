"""VMware's .vmem with and without its state file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.capture import PageKind
from imagefs.image.geometry import PAGE_SIZE, Region
from imagefs.image.native_files import NativeFile
from imagefs.image.native_reader import NativeReader
from imagefs.image.vcpu import VcpuState
from tests.unit.samples_vmware import MEMORY, REGIONS, STATE, long_tag, vmss
from tests.unit.streams import page_of


def write(directory: Path, state: bytes = STATE, memory: bytes = MEMORY, suffix: str = ".vmss") -> tuple[Path, Path]:
    (directory / f"guest{suffix}").write_bytes(state)
    (directory / "guest.vmem").write_bytes(memory)
    return directory / f"guest{suffix}", directory / "guest.vmem"


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("given", [".vmss", ".vmsn", ".vmem"])
def test_regions(tmp_path: Path, version: int, given: str) -> None:
    """Either file may be given; the other one is beside it."""
    state, memory = write(tmp_path, vmss(REGIONS, version), suffix=".vmsn" if given == ".vmem" else given)
    with open_capture(memory if given == ".vmem" else state, spool_dir=tmp_path) as capture:
        assert (capture.source_format, capture.source_version) == ("vmware", str(version))
        assert capture.geometry.regions == (
            Region("ram-0", 0, 2 * PAGE_SIZE, 0),
            Region("ram-1", 1 << 32, PAGE_SIZE, 2 * PAGE_SIZE),
        )
        assert capture.memory.read_at(0, 1 << 20) == MEMORY
        assert capture.native_files == (
            NativeFile(state.name, state.stat().st_size),
            NativeFile("guest.vmem", len(MEMORY)),
        )
        assert capture.restore == {"vmm": "vmware"}
        assert capture.state.size == state.stat().st_size


def test_regions_in_another_order(tmp_path: Path) -> None:
    """Memory is in the order of the file; pages of the file that are in no region are not in memory."""
    data = b"".join(map(page_of, range(6)))
    state, _ = write(tmp_path, vmss([(0x100000, 1, 2), (0, 4, 2)]), data)
    with open_capture(state, spool_dir=tmp_path) as capture:
        assert capture.geometry.regions == (
            Region("ram-0", 1 << 32, 2 * PAGE_SIZE, 0),
            Region("ram-1", 0, 2 * PAGE_SIZE, 2 * PAGE_SIZE),
        )
        assert capture.memory.read_at(0, 1 << 20) == data[PAGE_SIZE : 3 * PAGE_SIZE] + data[4 * PAGE_SIZE :]


@pytest.mark.parametrize("tail", [0, 17])
def test_memory_alone(tmp_path: Path, tail: int) -> None:
    (tmp_path / "guest.vmem").write_bytes(MEMORY + b"x" * tail)
    with open_capture(tmp_path / "guest.vmem", spool_dir=tmp_path) as capture:
        assert capture.source_format == "vmware"
        assert capture.memory.read_at(0, 1 << 20) == MEMORY + (b"x" * tail).ljust(PAGE_SIZE if tail else 0, b"\0")
        assert capture.native_files == ()
        assert "addresses count from zero" in capture.restore["notes"][0]
    with (
        pytest.raises(
            UnsupportedInputError, match=r"magic: .* begins with 02000000, .* nor is its name that of a \.vmem"
        ),
        open_capture(io.BytesIO(MEMORY), spool_dir=tmp_path, format="vmware"),
    ):
        pass


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize("version", [0, 3])
@pytest.mark.parametrize("regions", [[], REGIONS])
def test_memory_in_the_state_file(
    tmp_path: Path, piped: bool, version: int, regions: list[tuple[int, int, int]]
) -> None:
    data = vmss(regions, version, MEMORY)
    path = tmp_path / "guest.vmss"
    path.write_bytes(data)
    with open_capture(io.BytesIO(data) if piped else path, spool_dir=tmp_path) as capture:
        assert capture.memory.read_at(0, 1 << 20) == MEMORY
        assert len(capture.geometry.regions) == len(regions) or not regions
        assert capture.native_files == ()
        assert NativeReader(capture.native, capture.memory).read_at(0, 1 << 20) == data
        assert capture.native.literals.size == len(data) - len(MEMORY)
        assert capture.state.size == 0


def test_compressed_memory(tmp_path: Path) -> None:
    data = vmss(REGIONS)[:-2] + long_tag("Memory", b"x" * 100, 1, 0, 0, 0, in_memory=len(MEMORY)) + b"\0\0"
    with (
        pytest.raises(UnsupportedInputError, match="Memory: the memory is compressed, 100 bytes for 12,288"),
        open_capture(io.BytesIO(data), spool_dir=tmp_path),
    ):
        pass


def test_vcpus(tmp_path: Path) -> None:
    """Their page tables are found: here a root without entries."""
    state, _ = write(tmp_path, vmss(REGIONS, cr3=[0x1000, 0x1000]))
    with open_capture(state, spool_dir=tmp_path) as capture:
        assert capture.vcpus == (VcpuState(cr0=0x80050033, cr3=0x1000, cr4=0x6F0),) * 2
        assert capture.essential == (PageKind(1, 1, "pml4"),)
        assert [vcpu.levels for vcpu in capture.vcpus] == [4, 4]


def test_no_regions(tmp_path: Path) -> None:
    state, _ = write(tmp_path, vmss([]))
    with open_capture(state, spool_dir=tmp_path) as capture:
        assert capture.geometry.regions == (Region("ram-0", 0, len(MEMORY), 0),)
        assert len(capture.native_files) == 2


def test_state_from_a_pipe(tmp_path: Path) -> None:
    _, memory = write(tmp_path)
    with open_capture(io.BytesIO(STATE), spool_dir=tmp_path, memory_files=[memory]) as capture:
        assert len(capture.geometry.regions) == 2
    with (
        pytest.raises(UsageError, match=r"is the state only; say where the \.vmem is with --memory"),
        open_capture(io.BytesIO(STATE), spool_dir=tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([(0, 0, 2), (5, 1, 1)], "regionPageNum: page 0x1 of the memory file is in two regions"),
        ([(0, 0, 2), (1, 2, 1)], "regionPPN: guest page 0x1 is in two regions"),
        ([(0, 0, 4)], "regionSize: the region ends at byte 16,384 of .*guest.vmem, which has 12,288"),
        ([((1 << 32) - 1, 0, 2)] * 1025, "regionsCount: 1025 are too many"),
    ],
)
def test_regions_that_are_refused(tmp_path: Path, regions: list[tuple[int, int, int]], message: str) -> None:
    state, _ = write(tmp_path, vmss(regions))
    with (
        pytest.raises(UnsupportedInputError, match=message) as caught,
        open_capture(state, spool_dir=tmp_path),
    ):
        pass
    assert caught.value.offset


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    state, memory = write(tmp_path)
    (tmp_path / "guest.vmsn").write_bytes(STATE)
    with (
        pytest.raises(UsageError, match=r"may belong to guest\.vmss or to guest\.vmsn: give that one instead"),
        open_capture(memory, spool_dir=tmp_path),
    ):
        pass
    state.write_bytes(b"no state")
    (tmp_path / "guest.vmsn").unlink()
    with (
        pytest.raises(UnsupportedInputError, match=r"guest\.vmss begins with 6e6f2073, no \.vmss or \.vmsn does"),
        open_capture(memory, spool_dir=tmp_path),
    ):
        pass
    memory.unlink()
    state.write_bytes(STATE)
    with (
        pytest.raises(UsageError, match=r"there is no guest\.vmem beside it; say where the memory is with --memory"),
        open_capture(state, spool_dir=tmp_path),
    ):
        pass
    with pytest.raises(UsageError, match="is a directory"), open_capture(tmp_path, spool_dir=tmp_path, format="vmware"):
        pass


def test_a_long_tag_that_is_longer_than_the_file(tmp_path: Path) -> None:
    # The memory group's tags are last: cut its end off and put a long one there.
    data = STATE[:-2] + long_tag("blob", b"x" * 100, 1, 3)
    state, _ = write(tmp_path, data[:-1])
    with (
        pytest.raises(UnsupportedInputError, match="tag size: 100 bytes are not in the file"),
        open_capture(state, spool_dir=tmp_path),
    ):
        pass
