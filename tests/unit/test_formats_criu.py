"""CRIU's images: pages of processes, their parents, and links that are not followed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import criu, open_capture
from imagefs.image.capture import Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native_files import spans
from imagefs.image.native_reader import NativeReader
from tests.unit.samples import all_samples
from tests.unit.samples_criu import HEAP, STACK, Entry, inventory, pagemap
from tests.unit.streams import page_of

SAMPLE = {sample.name: sample.files for sample in all_samples() if sample.format == "criu"}
FIRST, SECOND = SAMPLE["criu"], SAMPLE["criu-parent"]


def write(directory: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def native(capture: Capture) -> dict[str, bytes]:
    data = NativeReader(capture.native, capture.memory).read_at(0, 1 << 30)
    return {path: data[start:end] for path, start, end in spans(capture.native_files)}


def regions(capture: Capture) -> dict[str, bytes]:
    """What is in memory, by the name of the region."""
    return {r.name: bytes(capture.memory.read_at(r.offset, r.size)) for r in capture.geometry.regions}


def test_processes(tmp_path: Path) -> None:
    with open_capture(write(tmp_path / "dump", dict(FIRST)), spool_dir=tmp_path) as capture:
        assert capture.source_format == "criu"
        assert regions(capture) == {
            f"pid 17 {HEAP:#x}": page_of(1) + bytes(PAGE_SIZE) + page_of(2),
            f"pid 17 {STACK:#x}": page_of(3),
            "shmem 5 0x0": page_of(4),
        }
        assert all(region.guest_address == region.offset for region in capture.geometry.regions)
        assert native(capture) == FIRST
        assert json.loads(capture.config["criu-runs.json"]) == [
            ["pid 17", HEAP, 3, 0],
            ["pid 17", STACK, 1, 3],
            ["shmem 5", 0, 1, 4],
        ]
        assert capture.restore == {
            "vmm": "criu",
            "processes": [
                {"whose": "pid 17", "first_page": 0, "pages": 4},
                {"whose": "shmem 5", "first_page": 4, "pages": 1},
            ],
            "absent_pages": 0,
        }


def check_second(capture: Capture) -> None:
    assert regions(capture) == {
        f"pid 17 {HEAP:#x}": page_of(1) + page_of(6) + page_of(2),
        f"pid 17 {STACK:#x}": page_of(3),
    }
    assert capture.restore["absent_pages"] == 5


@pytest.mark.parametrize("how", ["directory", "link", "link of two"])
def test_parents(tmp_path: Path, how: str) -> None:
    """Pages of the parent are those of the memory, unless they were written again since."""
    own = {name: data for name, data in SECOND.items() if not name.startswith("parent/")}
    shown = dict(SECOND)
    if how == "directory":
        write(tmp_path / "dumps/2", dict(SECOND))
    else:
        write(tmp_path / "dumps/1", dict(FIRST))
        write(tmp_path / "dumps/2", own).joinpath("parent").symlink_to("../1")
    if how == "link of two":
        # One more, without pages of its own.
        entries = [Entry(HEAP, 3, flags=1), Entry(HEAP + 9 * PAGE_SIZE, 5, flags=2), Entry(STACK, 1, in_parent=True)]
        last = {"inventory.img": inventory(), "pagemap-17.img": pagemap(9, entries), "pages-9.img": b""}
        write(tmp_path / "dumps/3", last).joinpath("parent").symlink_to("../2/")
        shown = {**last, **{f"parent/{name}": data for name, data in SECOND.items()}}
    source = max((tmp_path / "dumps").iterdir())
    with open_capture(source, spool_dir=tmp_path) as capture:
        check_second(capture)
        assert native(capture) == shown
    # What a mount shows as native/ is an image directory, too.
    with open_capture(write(tmp_path / "shown", shown), spool_dir=tmp_path) as capture:
        check_second(capture)


@pytest.mark.parametrize(
    "target", ["/etc", "..", "../..", ".", "../2", "../../outside", "../none", "../file", "../plain"]
)
def test_links_that_lead_elsewhere(tmp_path: Path, target: str) -> None:
    write(tmp_path / "outside", dict(FIRST))
    write(tmp_path / "dumps/plain", {"secret": b"x"})
    write(tmp_path / "dumps", {"file": b"x"})
    own = {name: data for name, data in SECOND.items() if not name.startswith("parent/")}
    source = write(tmp_path / "dumps/2", own)
    (source / "parent").symlink_to(target)
    with (
        pytest.raises(UsageError, match=r"parent leads to .*, which is no (other directory below|directory of CRIU)"),
        open_capture(source, spool_dir=tmp_path),
    ):
        pass


def test_parents_in_a_circle(tmp_path: Path) -> None:
    for name, other in (("1", "2"), ("2", "1")):
        write(tmp_path / name, dict(FIRST)).joinpath("parent").symlink_to(f"../{other}")
    with pytest.raises(UsageError, match="no other directory below"), open_capture(tmp_path / "1", spool_dir=tmp_path):
        pass


def test_other_links_and_files(tmp_path: Path) -> None:
    source = write(tmp_path / "dump", dict(FIRST))
    (source / "core-18.img").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match=r"core-18.img is a symbolic link"), open_capture(source, spool_dir=tmp_path):
        pass


def test_recognition(tmp_path: Path) -> None:
    """Version 1.0 and 1.1, and pre-dumps without an inventory."""
    content = dict(FIRST)
    content["inventory.img"] = struct.pack("<I", 0x54564319) + content["inventory.img"]
    with open_capture(write(tmp_path / "a", content), spool_dir=tmp_path) as capture:
        assert capture.source_format == "criu"
    del content["inventory.img"]
    with open_capture(write(tmp_path / "b", content), spool_dir=tmp_path) as capture:
        assert native(capture) == content
    with (
        pytest.raises(UnsupportedInputError, match=r"pagemap: .*c has no pages of any process"),
        open_capture(write(tmp_path / "c", {"inventory.img": inventory()}), spool_dir=tmp_path),
    ):
        pass
    with pytest.raises(UsageError, match="CRIU's images are a directory"):
        open_capture(tmp_path / "b/pages-1.img", spool_dir=tmp_path, format="criu").__enter__()
    with pytest.raises(UsageError, match="CRIU's pages are in the directory"):
        open_capture(tmp_path / "b", spool_dir=tmp_path, memory_files=[tmp_path]).__enter__()


def test_two_pagemaps_with_the_same_pages(tmp_path: Path) -> None:
    """Never written so, and shown right all the same."""
    entries = [Entry(HEAP, 2), Entry(STACK, 1)]
    content = {
        "pagemap-1.img": pagemap(1, entries),
        "pagemap-2.img": pagemap(1, entries),
        "pages-1.img": page_of(1) + page_of(2) + page_of(3),
    }
    with open_capture(write(tmp_path / "dump", content), spool_dir=tmp_path) as capture:
        assert capture.memory.size == 6 * PAGE_SIZE
        assert native(capture) == content


def test_many_runs(tmp_path: Path) -> None:
    """A region is a process then, and the runs are in a file."""
    count = criu.MAX_REGIONS + 1
    content = {
        "pagemap-1.img": pagemap(1, [Entry(HEAP + 2 * n * PAGE_SIZE, 1) for n in range(count)]),
        "pages-1.img": b"".join(map(page_of, range(count))),
        "pagemap-20.img": pagemap(2, [Entry(HEAP, 1)]),
        "pages-2.img": page_of(7),
    }
    with open_capture(write(tmp_path / "dump", content), spool_dir=tmp_path) as capture:
        assert list(regions(capture)) == ["pid 1", "pid 20"]
        assert len(json.loads(capture.config["criu-runs.json"])) == count + 1
        assert native(capture) == content


def test_too_many_runs(tmp_path: Path) -> None:
    count = criu.MAX_RUNS + 1
    data = pagemap(1, [Entry(HEAP + 2 * n * PAGE_SIZE, 1) for n in range(count)])
    source = write(tmp_path / "dump", {"pagemap-1.img": data})
    with open(source / "pages-1.img", "wb") as file:
        file.truncate(count * PAGE_SIZE)
    with (
        pytest.raises(UnsupportedInputError, match=r"pagemap-1\.img: more than 150,000 runs of pages"),
        open_capture(source, spool_dir=tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pagemap-17.img": b"x" * 20}, "pagemap-17.img: magic: 7878787878787878 is no pagemap's at offset 0x0"),
        ({"pagemap-17.img": pagemap(1, [])[:8]}, "pagemap-17.img: pagemap_head: there is none"),
        ({"pagemap-17.img": pagemap(1, [])[:12] + b"\xff\xff"}, "pagemap-17.img: pagemap_head: no such message"),
        (
            {"pagemap-17.img": pagemap(1, []) + b"\1\0\0\0\x08"},
            "pagemap-17.img: pagemap_entry: no such message at offset",
        ),
        ({"pagemap-17.img": pagemap(1, [Entry(HEAP + 1, 4)])}, "vaddr: 0x558100000001 is no multiple of 4096"),
        (
            {"pagemap-17.img": pagemap(1, [Entry(HEAP, 2), Entry(HEAP + PAGE_SIZE, 2)])},
            "vaddr: .* not behind the entry",
        ),
        ({"pagemap-17.img": pagemap(1, [Entry(HEAP, 0)])}, "nr_pages: 0 pages from"),
        ({"pagemap-17.img": pagemap(1, [Entry(HEAP, 1 << 50, large=True)])}, "nr_pages: 1125899906842624 pages from"),
        ({"pagemap-17.img": pagemap(1, [Entry(HEAP, 4, flags=12)])}, "flags: 0xc has bits that are not understood"),
        ({"pagemap-17.img": pagemap(8, [Entry(HEAP, 4)])}, "pagemap-17.img: pages_id: .* has no pages-8.img"),
        (
            {"pagemap-17.img": pagemap(1, [Entry(HEAP, 5)])},
            "pages-1.img: it has 16,384 bytes, the 5 pages .* take 20,480",
        ),
        (
            {"pagemap-17.img": pagemap(1, [Entry(HEAP, 4), Entry(STACK, 1, flags=1)])},
            "in_parent: the parent's images do not",
        ),
    ],
)
def test_refused(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    source = write(tmp_path / "dump", {**FIRST, **changed})
    with pytest.raises(UnsupportedInputError, match=message) as caught, open_capture(source, spool_dir=tmp_path):
        pass
    assert caught.value.offset is not None
