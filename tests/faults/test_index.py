"""Index blocks that are not here: what lies below them is not known, and is neither guessed nor taken for zero."""

from __future__ import annotations

import errno
import os
import random
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from support.nginx import Nginx

from imagefs.cli.opening import image_reader
from imagefs.errors import UnsupportedInputError
from imagefs.image.index import PayloadRef
from imagefs.image.metadata import TARGET_SIZE
from imagefs.image.streams import MEMORY
from imagefs.store.base import object_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.writer import write_image
from tests.faults.images import RealImage, check_same, memory_of
from tests.faults.mounts import Mounter
from tests.unit.captures import capture_of

WINDOWS = 48
EMPTY = range(10, 14)
EMPTY_PAGE = EMPTY.start * 16 + 3


def write_without_room(store: Path, memory: bytes) -> None:
    """An image whose metadata is full of something else, so that no index block travels with it."""
    rng = random.Random(21)
    with closing(DirectoryStore(store, create=True)) as target:
        # What zstd makes of hexadecimal digits is some 4 % more than the bytes that they stand for.
        for size in range(TARGET_SIZE * 100 // 104 + 2000, 0, -500):
            with suppress(UnsupportedInputError):
                write_image(target, "vm1", capture_of(memory, restore={"filler": rng.randbytes(size).hex()}))
                return


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> RealImage:
    """In place of the smaller one of conftest.py."""
    directory = tmp_path_factory.mktemp("index")
    memory = memory_of(WINDOWS, 20, [EMPTY])
    write_without_room(directory / "store", memory)
    native = directory / "vm1.raw"
    native.write_bytes(memory)
    return RealImage(directory / "store", "vm1", native, memory)


@pytest.fixture
def root(image: RealImage) -> PayloadRef:
    """Where the root of the memory's index is."""
    with image_reader(str(image.path)) as reader:
        found = reader.image.manifest.streams[MEMORY].root
        assert found is not None
        assert found.digest not in reader.image.metadata.parts
        return found.place


@pytest.fixture
def damaged(image: RealImage, root: PayloadRef) -> bytes:
    """A byte of the root is flipped; what the pack held before, to mend it with."""
    pack = image.store / object_key(root.pack.hex())
    right = pack.read_bytes()
    at = root.offset + root.length // 2
    pack.write_bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
    return right


@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all", "nocache"])
def test_damaged_index(
    image: RealImage, server: Nginx, mount: Mounter, root: PayloadRef, damaged: bytes, options: str
) -> None:
    mounted = mount(f"{server.url}/vm1", options, expected=[r": index"])
    for page in (5, EMPTY_PAGE, 700):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            mounted.read_page(page)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            mounted.xattr(page, "state")
    result = mounted.start_reader(image, range(0, image.pages, 9), threads=4).result()
    assert (result["right"], result["wrong"]) == (0, [])
    assert mounted.present() == []
    log = mounted.log.read_text()
    assert f"{server.url}: {object_key(root.pack.hex())}: " in log
    assert "read of page 700: " in log
    (image.store / object_key(root.pack.hex())).write_bytes(damaged)
    check_same(mounted.read_page(EMPTY_PAGE), image.page(EMPTY_PAGE), "zero page", EMPTY_PAGE)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


def test_index_behind_a_cut_link(image: RealImage, server: Nginx, mount: Mounter, root: PayloadRef) -> None:
    """Even a page that is zero waits: nobody knows that it is."""
    link = mount.link(server.address, mbit=100, rtt_ms=2)
    mounted = mount(f"{link.url}/vm1", "prefetch=none")
    link.cut("hang")
    reader = mounted.start_reader(image, [EMPTY_PAGE, 5, 700], threads=3)
    mounted.wait_until_waiting(3)
    assert mounted.present() == []
    link.mend()
    assert reader.result() == {"right": 3, "wrong": [], "errors": {}}
    # From here on it is known, and needs nobody.
    link.cut("hang")
    check_same(mounted.read_page(EMPTY_PAGE + 1), image.page(EMPTY_PAGE + 1), "zero page", EMPTY_PAGE + 1)
    assert mounted.xattr(300, "state") == "remote"
    link.mend()


def test_soft_mount_without_its_index(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """Reading and asking about a page both end by the mount's clock."""
    link = mount.link(server.address, mbit=100, rtt_ms=2)
    mounted = mount(f"{link.url}/vm1", "prefetch=none,soft,timeo=0.5", expected=["not here after", "trying again"])
    link.cut("hang")
    for program in ("print(open(path, 'rb').read())", "print(os.getxattr(path, 'user.imagefs.state'))"):
        asking = mounted.start(sys.executable, "-c", f"import os; path = '{mounted.page_file(5)}'; {program}")
        out, err = asking.process.communicate(timeout=10)
        assert (out, os.strerror(errno.EIO) in err) == ("", True), program


def test_index_is_kept(image: RealImage, server: Nginx, mount: Mounter, root: PayloadRef) -> None:
    first = mount(f"{server.url}/vm1", "prefetch=none")
    check_same(first.read_page(5), image.page(5), "page", 5)
    first.unmount()
    second = mount(f"{server.url}/vm1", "prefetch=none")
    server.kill()
    check_same(second.read_page(5), image.page(5), "page", 5)
    assert second.xattr(701, "state") == "remote"
    assert second.xattr(EMPTY_PAGE, "state") == "zero"
    second.unmount()
    # Kept, and looked at before it is believed.
    server.start()
    (blocks,) = (path for path in first.path.parent.glob("cache/*/blocks"))
    for block in blocks.iterdir():
        block.write_bytes(block.read_bytes()[:-1] + b"?")
    third = mount(f"{server.url}/vm1", "prefetch=none")
    check_same((third.path / "memory").read_bytes(), image.memory, "memory")
