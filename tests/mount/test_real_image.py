"""Real images, split by the command and served by nginx: what the mount shows is what was split, to the byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.nginx import Nginx

from imagefs.image.capture import PageKind
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from imagefs.image.native_files import NativeFile, spans
from imagefs.store.directory import DirectoryStore
from imagefs.store.writer import write_image
from tests.faults.images import RealImage, check_same, memory_of, requests_to, split, split_raw
from tests.faults.mounts import Mounter, RealMount
from tests.mount.conftest import environment
from tests.unit.captures import capture_of
from tests.unit.streams import PAGE, Kind, Options, Record, build
from tests.unit.xen_streams import JSON, hvm_stream, libxl, page_data, xl

ZERO_WINDOWS = (range(3, 6), range(30, 32))


@dataclass(frozen=True)
class Shown:
    """An image, and what a mount of it must show beside its memory."""

    image: RealImage
    geometry: Geometry
    state: bytes
    config: dict[str, bytes]

    def pages(self) -> Iterator[tuple[str, int]]:
        """Path of each frame's file in the mount, and its page number in memory."""
        for page in range(self.geometry.pages):
            pfn = self.geometry.pfn_of_page(page)
            yield f"pages/0x{pfn >> 12:05x}/0x{pfn:07x}", page


def raw_image(directory: Path, store: Path) -> Shown:
    image = split_raw(directory, store, "raw", memory_of(32, 5, ZERO_WINDOWS))
    return Shown(image, Geometry((Region("ram", 0, len(image.memory), 0),)), b"", {})


def qemu_image(directory: Path, store: Path) -> Shown:
    """A stream as of a guest that ran on while it was saved: pages come in any order, and some of them twice."""
    rng = random.Random(6)
    memory = memory_of(32, 6, ZERO_WINDOWS)
    rounds: list[list[Record]] = [[], [], []]
    order = list(range(len(memory) // PAGE))
    rng.shuffle(order)
    for page in order:
        data = memory[page * PAGE : (page + 1) * PAGE]
        if page % 11 == 5:
            rounds[0].append(Record("page", "pc.ram", page, rng.randbytes(PAGE)))
        kind: Kind = "fill" if not any(data) else "zlib" if page % 64 < 16 else "page"
        rounds[1 if page % 3 else 2].append(Record(kind, "pc.ram", page, b"\0" if kind == "fill" else data))
    rounds[1] += [Record("page", "vga.vram", page, rng.randbytes(PAGE)) for page in range(2)]
    built = build(rounds, Options(blocks={"pc.ram": len(memory), "vga.vram": 2 * PAGE}))
    assert built.memory == memory
    source = directory / "vm.save"
    source.write_bytes(built.data)
    image = split(source, store, "qemu", memory)
    config = {"qemu-vmdesc.json": built.description}
    return Shown(image, Geometry((Region("pc.ram", 0, len(memory), 0),)), built.state, config)


def pc_image(directory: Path, store: Path) -> Shown:
    """Memory above 4 GiB, page tables that travel with the metadata, and files beside it."""
    memory = memory_of(64, 7, ZERO_WINDOWS)
    low = 40 * 16 * PAGE_SIZE
    geometry = Geometry((Region("low", 0, low, 0), Region("high", 1 << 32, len(memory) - low, low)))
    state = bytes(range(256)) * 999
    config = {"domain.xml": b"<domain/>\n", "qemu command line": random.Random(7).randbytes(300_000)}
    kinds = (PageKind(17, 1, "pml4"), PageKind(18, 2, "pdpt"), PageKind(660, 8, "pt"))
    capture = capture_of(memory, state=state, config=config, geometry=geometry, essential=kinds)
    with closing(DirectoryStore(store, create=True)) as directory_store:
        write_image(directory_store, "pc", capture)
    native = directory / "pc.raw"
    native.write_bytes(memory)
    return Shown(RealImage(store, "pc", native, memory), geometry, state, config)


def xen_image(directory: Path, store: Path) -> Shown:
    """A live-migrated guest with holes in its memory."""
    rng = random.Random(9)
    memory = memory_of(32, 9, ZERO_WINDOWS)
    low = 20 * 16 * PAGE_SIZE
    geometry = Geometry((Region("ram0", 0, low, 0), Region("ram1", 0xFC000000, len(memory) - low, low)))
    order = list(range(geometry.pages))
    rng.shuffle(order)
    sent = [(page, rng.randbytes(PAGE_SIZE)) for page in order if page % 11 == 5]
    sent += [
        (page, memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in [*order[:200], *range(geometry.pages)]
    ]
    records = [sent[at : at + 100] for at in range(0, len(sent), 100)]
    entries = [[(geometry.pfn_of_page(page), 0, data) for page, data in each] for each in records]
    built = xl(libxl(hvm_stream(b"".join(map(page_data, entries)))))
    source = directory / "xen.save"
    source.write_bytes(built)
    image = split(source, store, "xen", memory)
    return Shown(image, geometry, xl(libxl(hvm_stream(b""))), {"xl.json": JSON[:-1]})


def directory_image(directory: Path, store: Path) -> Shown:
    """A native file that is several: their ends are in the middle of pages, and one has none of them."""
    image = split_raw(directory, store, "files", memory_of(32, 8, ZERO_WINDOWS))
    sizes = [0, 12_345, 3 * PAGE_SIZE, 1]
    paths = ["empty", "dump/parent/pages-1.img", "dump/pages 2.img", "dump/inventory.img", "rest"]
    sizes.append(len(image.memory) - sum(sizes))
    files = tuple(map(NativeFile, paths, sizes))
    with closing(DirectoryStore(store)) as directory_store:
        write_image(directory_store, "files", replace(capture_of(image.memory), native_files=files))
    native = directory / "files.native"
    for file, (_, start, end) in zip(files, spans(files), strict=True):
        (native / file.path).parent.mkdir(parents=True, exist_ok=True)
        (native / file.path).write_bytes(image.memory[start:end])
    geometry = Geometry((Region("ram", 0, len(image.memory), 0),))
    return Shown(RealImage(store, "files", native, image.memory), geometry, b"", {})


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    directory = tmp_path_factory.mktemp("images")
    makers = {"raw": raw_image, "qemu": qemu_image, "pc": pc_image, "xen": xen_image, "files": directory_image}
    return {name: make(directory, directory / "store") for name, make in makers.items()}


@pytest.fixture(scope="module")
def server(shown: dict[str, Shown]) -> Iterator[Nginx]:
    with Nginx(shown["raw"].image.store) as nginx:
        yield nginx


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    with Mounter(tmp_path) as mounter:
        yield mounter


EVERY_IMAGE = pytest.mark.parametrize("name", ["raw", "qemu", "pc", "xen"])


@EVERY_IMAGE
def test_files_are_what_was_split(shown: dict[str, Shown], server: Nginx, mount: Mounter, name: str) -> None:
    image = shown[name].image
    mounted = mount(f"{server.url}/{name}")
    original = image.native.with_suffix(".memory")
    original.write_bytes(image.memory)
    assert mounted.run("cmp", "native", str(image.native)) == ""
    assert mounted.run("cmp", "memory", str(original)) == ""
    # Again, from what the kernel has kept.
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    assert (mounted.path / "state").read_bytes() == shown[name].state
    config = {path.name: path.read_bytes() for path in (mounted.path / "config").iterdir()}
    assert config == shown[name].config


@EVERY_IMAGE
def test_metadata_is_that_of_info(shown: dict[str, Shown], server: Nginx, mount: Mounter, name: str) -> None:
    mounted = mount(f"{server.url}/{name}", "prefetch=none")
    shown_there = json.loads((mounted.path / "metadata.json").read_text())
    command = [sys.executable, "-m", "imagefs.cli", "info", "--json", f"{server.url}/{name}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    info = json.loads(done.stdout)
    assert shown_there.items() <= info.items()
    assert sum(region["size"] for region in shown_there["regions"]) == len(shown[name].image.memory)
    assert shown_there["native_bytes"] == shown[name].image.native.stat().st_size
    assert mounted.status()["image"] == info["image"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("raw", "nocache"), ("qemu", "prefetch=none"), ("pc", "prefetch=none"), ("pc", "prefetch=all"), ("pc", "nocache")],
)
def test_every_page_file(shown: dict[str, Shown], server: Nginx, mount: Mounter, name: str, options: str) -> None:
    image = shown[name].image
    mounted = mount(f"{server.url}/{name}", options)
    listed = [str(path.relative_to(mounted.path)) for path in (mounted.path / "pages").glob("*/*")]
    assert sorted(listed) == sorted(path for path, _ in shown[name].pages())
    pages = list(shown[name].pages())
    random.Random(8).shuffle(pages)
    for path, page in pages:
        check_same((mounted.path / path).read_bytes(), image.page(page), path, page)


@EVERY_IMAGE
def test_tools(shown: dict[str, Shown], server: Nginx, mount: Mounter, tmp_path: Path, name: str) -> None:
    image = shown[name].image
    pages = dict(shown[name].pages())
    mounted = mount(f"{server.url}/{name}")
    digests = {path: hashlib.sha256(image.page(page)).hexdigest() for path, page in pages.items()}

    assert len(mounted.run("find", "pages", "-type", "f", "-size", "4096c").split()) == len(pages)
    assert sum(line.startswith("0x") for line in mounted.run("ls", "-R", "pages").splitlines()) >= len(pages)
    counted = mounted.run("sh", "-c", "grep -acr 'says something' pages || true").splitlines()
    lines = {path: image.page(page).count(b"says something") for path, page in pages.items()}
    assert dict(line.rsplit(":", 1) for line in counted) == {path: str(count) for path, count in lines.items()}

    for path in random.Random(9).sample(list(pages), 5):
        dump = mounted.run("hexdump", "-v", "-e", '16/1 "%02x"', path)
        assert dump == image.page(pages[path]).hex()
    summed = mounted.run("sh", "-c", "find pages -type f -exec sha256sum {} +").splitlines()
    assert {path: digest for digest, path in map(str.split, summed)} == digests

    mounted.run("cp", "-r", "pages", str(tmp_path / "copied"))
    mounted.run("tar", "-cf", str(tmp_path / "pages.tar"), "pages")
    with tarfile.open(tmp_path / "pages.tar") as tar:
        for path, page in pages.items():
            check_same((tmp_path / "copied" / path.removeprefix("pages/")).read_bytes(), image.page(page), path, page)
            member = tar.extractfile(path)
            assert member is not None
            check_same(member.read(), image.page(page), f"{path} in the archive", page)


def test_native_in_pieces(shown: dict[str, Shown], server: Nginx, mount: Mounter, rng: random.Random) -> None:
    """Any range of the file that was split, though its pages are in another order."""
    native = shown["qemu"].image.native.read_bytes()
    mounted = mount(f"{server.url}/qemu", "prefetch=none")
    with open(mounted.path / "native", "rb", buffering=0) as file:
        for _ in range(100):
            length = rng.choice([1, 100, PAGE_SIZE, 30_000])
            offset = rng.randrange(len(native))
            assert os.pread(file.fileno(), length, offset) == native[offset : offset + length], (offset, length)


def test_native_that_is_a_directory(
    shown: dict[str, Shown], server: Nginx, mount: Mounter, tmp_path: Path, rng: random.Random
) -> None:
    image = shown["files"].image
    mounted = mount(f"{server.url}/files", "prefetch=none")
    native = mounted.path / "native"
    assert native.is_dir()
    assert mounted.run("diff", "-r", "native", str(image.native)) == ""
    mounted.run("cp", "-r", "native", str(tmp_path / "copied"))
    assert mounted.run("diff", "-r", str(tmp_path / "copied"), str(image.native)) == ""
    expected = (image.native / "rest").read_bytes()
    with open(native / "rest", "rb", buffering=0) as file:
        for _ in range(30):
            offset, length = rng.randrange(len(expected)), rng.choice([1, PAGE_SIZE, 30_000])
            assert os.pread(file.fileno(), length, offset) == expected[offset : offset + length], (offset, length)
        assert os.pread(file.fileno(), 10, len(expected)) == b""
    assert (native / "empty").read_bytes() == b""
    for name in ("nothing", "dump/nothing", "empty/nothing"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            os.stat(native / name)
    with pytest.raises(OSError, match="Read-only"):
        (native / "new").touch()
    with pytest.raises(IsADirectoryError):
        native.read_bytes()


def page_states(mounted: RealMount, pages: range) -> dict[int, str]:
    return {page: mounted.xattr(page, "state") for page in pages}


def test_extended_attributes(shown: dict[str, Shown], server: Nginx, mount: Mounter) -> None:
    image = shown["raw"].image
    mounted = mount(f"{server.url}/raw", "prefetch=none")
    window = range(16, 32)
    zero = {page for page in range(image.pages) if not any(image.page(page))}
    assert page_states(mounted, window) == {p: "zero" if p in zero else "remote" for p in window}
    check_same(mounted.read_page(20), image.page(20), "page 20", 20)
    assert page_states(mounted, window) == {p: "zero" if p in zero else "present" for p in window}
    assert page_states(mounted, range(33, 35)) == {33: "remote", 34: "remote"}
    assert mounted.xattr(20, "digest") == f"blake3:{image.chunks[1].digest.hex()}"
    assert mounted.xattr(20, "kind") == "ram"
    assert "user.imagefs.digest" not in os.listxattr(mounted.page_file(21))
    assert 21 in zero


@pytest.mark.parametrize("options", ["prefetch=none", "nocache"])
def test_page_tables_come_with_the_metadata(
    shown: dict[str, Shown], server: Nginx, mount: Mounter, options: str
) -> None:
    """They are here, and named, before any page has been asked for."""
    image = shown["pc"].image
    mounted = mount(f"{server.url}/pc", options)
    asked = len(requests_to(server))
    kinds = {17: "pml4", 18: "pdpt", 19: "pdpt", 16: "ram"}
    assert {page: mounted.xattr(page, "kind") for page in kinds} == kinds
    assert page_states(mounted, range(16, 20)) == {16: "remote", 17: "present", 18: "present", 19: "present"}
    high = mounted.path / f"pages/0x00100/0x{(1 << 20) + 660 - 640:07x}"
    assert os.getxattr(high, "user.imagefs.kind") == b"pt"
    for page in (17, 18, 19):
        check_same(mounted.read_page(page), image.page(page), "page table", page)
    check_same(high.read_bytes(), image.page(660), "page table", 660)
    assert len(requests_to(server)) == asked


def test_present_is_what_was_read(shown: dict[str, Shown], server: Nginx, mount: Mounter) -> None:
    image = shown["raw"].image
    mounted = mount(f"{server.url}/raw", "prefetch=none")
    # Zero pages are here as soon as the index is.
    zero = {page for page in range(image.pages) if not any(image.page(page))}
    read = [18 * 16 + 3, 7 * 16 + 15, 25 * 16]
    for page in read:
        check_same(mounted.read_page(page), image.page(page), "page", page)
    here = {page for number in (18, 7, 25) for page in range(number * 16, number * 16 + 16)}
    assert set(mounted.present()) == here | zero
    # The touches, in order.
    trace = [line.split() for line in (mounted.path / ".imagefs/trace").read_text().splitlines()]
    assert [(int(page), int(count)) for _, page, count, _ in trace] == [(page, 1) for page in read]
    seconds = [float(fields[0]) for fields in trace]
    assert seconds == sorted(seconds)
    check_same(mounted.read_page(read[0]), image.page(read[0]), "page", read[0])
    assert len((mounted.path / ".imagefs/trace").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["raw", "pc"])
def test_arrivals_end_when_everything_is_here(
    shown: dict[str, Shown], server: Nginx, mount: Mounter, name: str
) -> None:
    mounted = mount(f"{server.url}/{name}")
    lines = mounted.start("cat", ".imagefs/arrivals").process.communicate(timeout=60)[0].splitlines()
    arrived = set[int]()
    for line in filter(None, lines):
        first, count = map(int, line.split())
        arrived.update(range(first, first + count))
    pages = shown[name].image.pages
    assert arrived == set(range(pages))
    assert mounted.present() == list(range(pages))
    assert mounted.status()["memory"]["complete"]
    # And so for who comes later.
    assert mounted.run("cat", ".imagefs/arrivals") == f"0 {pages}\n"
