"""Names and inode numbers of a mount."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import MountError
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region, flat_geometry
from imagefs.image.native_files import NativeFile
from imagefs.mount import tree
from imagefs.mount.tree import Tree

NATIVE_FILES = [
    NativeFile("b", 10),
    NativeFile("a/z", 0),
    NativeFile("a/parent/c", 5),
    NativeFile("\N{SNOWMAN}/d", 1),
    NativeFile("a/parent/e", 7),
]


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """A few regions with gaps between them, in any order in the file."""
    regions, pfn, offset = [], 0, 0
    for number in range(draw(st.integers(1, 4))):
        pfn += draw(st.sampled_from([0, 1, 17, 4095, 4096, 10_000, 1 << 20]))
        pages = draw(st.sampled_from([1, 2, 100, 4096, 5000]))
        regions.append((f"r{number}", pfn, pages))
        pfn += pages
    placed = []
    for name, first, pages in draw(st.permutations(regions)):
        placed.append(Region(name, first * PAGE_SIZE, pages * PAGE_SIZE, offset))
        offset += pages * PAGE_SIZE
    return Geometry(tuple(placed))


def walk(names: Tree, directory: int = tree.ROOT) -> dict[str, int]:
    found = {}
    for name, inode, _ in names.list(directory):
        if name not in (b".", b".."):
            found[name.decode()] = inode
            if names.is_directory(inode):
                found.update({f"{name.decode()}/{rest}": i for rest, i in walk(names, inode).items()})
    return found


@given(geometries())
def test_every_frame_once_and_no_other(geometry: Geometry) -> None:
    names = Tree(geometry)
    found = walk(names)
    assert len(set(found.values())) == len(found)
    frames = {path: inode for path, inode in found.items() if path.count("/") == 2}
    expected = {
        f"pages/0x{pfn >> 12:05x}/0x{pfn:07x}": geometry.page_of_pfn(pfn)
        for first, count in geometry.pfn_runs()
        for pfn in range(first, first + count)
    }
    assert {path: names.page_of(inode) for path, inode in frames.items()} == expected


@given(geometries(), st.data())
def test_lookup_is_listing(geometry: Geometry, data: st.DataObject) -> None:
    names = Tree(geometry, ["a", "b"])
    for directory in (tree.ROOT, tree.PAGES, tree.CONFIG, tree.CONTROL, names.lookup(tree.ROOT, b"pages") or 0):
        for name, inode, _ in itertools.islice(names.list(directory, 2), 50):
            assert names.lookup(directory, name) == inode
            assert names.exists(inode)
    pfn = data.draw(st.integers(0, 1 << 22))
    directory = names.lookup(tree.PAGES, tree.directory_name(pfn >> 12)) or tree.PAGES
    there = names.lookup(directory, tree.frame_name(pfn)) if directory != tree.PAGES else None
    page = geometry.page_of_pfn(pfn)
    assert (there is None) == (page is None)
    if there is not None:
        assert names.page_of(there) == page
        for other in (f"0x{pfn:x}", f"0x{pfn:08x}", f"0x{pfn:07X}".replace("0X", "0x"), f"{pfn}", f" 0x{pfn:07x}"):
            if other.encode() != tree.frame_name(pfn):
                assert names.lookup(directory, other.encode()) is None
        # Only in its own directory.
        for name, inode, _ in names.list(tree.PAGES, 2):
            if inode != directory:
                assert names.lookup(inode, tree.frame_name(pfn)) is None, name


@given(geometries(), st.data())
def test_listing_goes_on_from_any_position(geometry: Geometry, data: st.DataObject) -> None:
    names = Tree(geometry, ["a", "b", "c"])
    directories = [tree.ROOT, tree.CONFIG, tree.PAGES, *(inode for _, inode, _ in names.list(tree.PAGES, 2))]
    directory = data.draw(st.sampled_from(directories))
    whole = list(names.list(directory))
    assert [name for name, _, _ in whole[:2]] == [b".", b".."]
    positions = [position for _, _, position in whole]
    assert positions == sorted(set(positions))
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert list(names.list(directory, positions[cut])) == whole[cut + 1 :]


@given(
    geometries(), st.integers(0, 1 << 51) | st.integers(1 << 33, (1 << 33) + 9) | st.integers(1 << 34, (1 << 34) + 9)
)
def test_only_what_is_listed_exists(geometry: Geometry, inode: int) -> None:
    names = Tree(geometry, native_files=NATIVE_FILES)
    if names.exists(inode):
        assert inode in (tree.ROOT, *walk(names).values())


def test_config_names_come_from_elsewhere() -> None:
    bad = ["", ".", "..", "../x", "a/b", "/etc/passwd", "nul\0", "x" * 256, "\udcff"]
    names = Tree(flat_geometry(PAGE_SIZE), ["z", *bad, "a b", "\N{SNOWMAN}"])
    assert [name.decode() for name, _, _ in names.list(tree.CONFIG, 2)] == ["a b", "z", "\N{SNOWMAN}"]
    inode = names.lookup(tree.CONFIG, b"z")
    assert inode is not None
    assert names.config_name(inode) == "z"
    assert names.config_name(tree.MEMORY) is None


def test_native_is_a_directory_where_there_are_several_files() -> None:
    names = Tree(flat_geometry(PAGE_SIZE), ["b"], NATIVE_FILES)
    found = {path: inode for path, inode in walk(names).items() if path.startswith("native/")}
    directories = {path for path, inode in found.items() if names.is_directory(inode)}
    assert names.is_directory(tree.NATIVE)
    assert directories == {"native/a", "native/a/parent", "native/\N{SNOWMAN}"}
    assert set(found) - directories == {f"native/{file.path}" for file in NATIVE_FILES}
    spans = {path.removeprefix("native/"): names.native.span(found[path]) for path in set(found) - directories}
    assert spans == {
        "b": (0, 10),
        "a/z": (10, 10),
        "a/parent/c": (10, 15),
        "\N{SNOWMAN}/d": (15, 16),
        "a/parent/e": (16, 23),
    }
    parent = found["native/a/parent"]
    assert names.parent(parent) == found["native/a"]
    assert names.parent(found["native/a"]) == tree.NATIVE
    assert names.parent(tree.NATIVE) == tree.ROOT
    assert next(entry for entry in names.list(parent) if entry[0] == b"..")[1] == found["native/a"]
    assert names.lookup(parent, b"c") == found["native/a/parent/c"]
    assert names.lookup(parent, b"z") is None
    assert names.lookup(found["native/b"], b"c") is None
    for inode in found.values():
        assert names.exists(inode)
    for inode in (max(found.values()) + 1, found["native/b"] + len(NATIVE_FILES), found["native/b"] - 1):
        assert not names.exists(inode)


def test_native_is_a_file_otherwise() -> None:
    names = Tree(flat_geometry(PAGE_SIZE))
    assert names.exists(tree.NATIVE)
    assert not names.is_directory(tree.NATIVE)
    assert names.lookup(tree.NATIVE, b"a") is None


def test_large_memory_costs_nothing() -> None:
    """1 TiB is 2**28 frames; lookups and the first entries of listings come at once."""
    begun = time.process_time()
    names = Tree(flat_geometry(1 << 40))
    inode = names.lookup(tree.PAGES, b"0x0ffff")
    assert inode is not None
    assert [name for name, _, _ in itertools.islice(names.list(inode, 2), 1)] == [b"0xffff000"]
    assert names.lookup(inode, b"0xfffffff") is not None
    assert names.lookup(inode, b"0x10000000") is None
    assert sum(1 for _ in names.list(tree.PAGES, 2)) == 1 << 16
    assert time.process_time() - begun < 5


def test_frames_that_no_machine_has() -> None:
    with pytest.raises(MountError, match="52 address bits"):
        Tree(Geometry((Region("far", 1 << 52, PAGE_SIZE, 0),)))
    names = Tree(Geometry((Region("last", (1 << 52) - PAGE_SIZE, PAGE_SIZE, 0),)))
    assert walk(names)["pages/0xfffffff/0xffffffffff"]
