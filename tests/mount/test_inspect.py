"""The tools of docs/inspect.md on mounted images, and what each of them makes cross the link.

Everything is compared with the same tool on the file that was split. Of what is fetched no more than the windows that
hold pages which were read: with ``readahead=0`` that is what the tool read, and never more than is stored.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.guest import build_guest
from support.vm import Vm

from imagefs.cli.opening import image_reader
from imagefs.image.geometry import PAGE_SIZE
from tests.faults.images import WINDOW_PAGES, RealImage, split, split_raw
from tests.faults.mounts import Mounter, RealMount
from tests.mount.conftest import environment, wait_until

MEMORY_MIB = 96
BANNER = re.compile(rb"Linux version \d[ -~]{60,}")
CHANGED = {100: b"first", 101: b"second", 900: b"third"}
"""Pages of a small image that its twin has otherwise."""


@dataclass(frozen=True)
class Images:
    directory: Path
    guest: RealImage
    """A QEMU migration stream of a running Linux."""
    core: RealImage
    """The same guest by QEMU's dump-guest-memory: an ELF core, and its memory the guest's."""
    small: RealImage
    """4 MiB of the guest's memory with the kernel's banner."""
    twin: RealImage


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    directory = tmp_path_factory.mktemp("inspect")
    with Vm(build_guest(fill_mib=8), memory_mib=MEMORY_MIB) as vm:
        vm.expect("FILLED")
        vm.qmp.execute("stop")
        vm.qmp.execute("pmemsave", {"val": 0, "size": MEMORY_MIB << 20, "filename": f"{directory}/vm.memory"})
        vm.qmp.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{directory}/vm.core"})
        vm.qmp.execute("migrate", {"uri": f"exec:cat > {directory}/vm.save"})
        wait_until(lambda: vm.status == "postmigrate", "it is saved", 60)
    memory = (directory / "vm.memory").read_bytes()
    found = BANNER.search(memory)
    assert found is not None
    small = bytearray(memory[found.start() & -(1 << 20) :][: 4 << 20])
    store = directory / "store"
    first = split_raw(directory, store, "small", bytes(small))
    for page, text in CHANGED.items():
        small[page * PAGE_SIZE + 7 : page * PAGE_SIZE + 7 + len(text)] = text
    return Images(
        directory,
        split(directory / "vm.save", store, "guest", memory),
        split(directory / "vm.core", store, "core", memory),
        first,
        split_raw(directory, store, "twin", bytes(small)),
    )


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    with Mounter(tmp_path) as mounter:
        yield mounter


class Looked:
    """A mount with a cache of its own, and what a tool does to it."""

    def __init__(self, mount: Mounter, image: RealImage, directory: Path, options: str = "readahead=0") -> None:
        self.image = image
        self.mounted: RealMount = mount(image.path, f"prefetch=none,cache={directory}/cache-{image.name},{options}")
        self.path = self.mounted.path
        self._before = self.mounted.status()

    def fetched(self) -> int:
        """Bytes that came from the store."""
        return int(self.mounted.status()["fetch"]["payload_bytes"] - self._before["fetch"]["payload_bytes"])

    def pages_read(self) -> int:
        """Whole pages that the kernel was given. What it read of the status before adds less than one."""
        return int(self.mounted.status()["mount"]["bytes_read"] - self._before["mount"]["bytes_read"]) // PAGE_SIZE

    def memory_read(self) -> int:
        """Pages of memory that the kernel was given, each once."""
        lines = (self.path / ".imagefs/trace").read_text().splitlines()
        return sum(int(line.split()[2]) for line in lines if line.strip())

    def touched(self) -> set[int]:
        """Windows of which a page was read."""
        lines = (self.path / ".imagefs/trace").read_text().splitlines()
        return {int(line.split()[1]) // WINDOW_PAGES for line in lines if line.strip()}

    def arrived(self) -> set[int]:
        """Windows that are here with content, but for those of pages that came with the metadata."""
        here = {page // WINDOW_PAGES for page in self.mounted.present() if any(self.image.page(page))}
        return here - {page // WINDOW_PAGES for page in self.essential()}

    def check_nothing_unread_is_here(self) -> None:
        """What has arrived was touched."""
        assert self.arrived() <= self.touched()

    def essential(self) -> set[int]:
        """Pages that came with the metadata."""
        with image_reader(str(self.image.path)) as reader:
            runs = reader.image.metadata.pages
        return {page for first, data in runs for page in range(first, first + len(data) // PAGE_SIZE)}

    def check_at_most_once(self) -> None:
        """The whole image is what was read, and no part of it came twice."""
        with image_reader(str(self.image.path)) as reader:
            assert self.fetched() <= reader.image.manifest.stored_bytes


def run(*command: str | Path, status: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(), capture_output=True, timeout=100, check=False
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout.decode(errors="replace")


def banner(image: RealImage) -> str:
    found = BANNER.search(image.memory)
    assert found is not None
    return found[0].decode()


def test_strings(images: Images, mount: Mounter, tmp_path: Path) -> None:
    looked = Looked(mount, images.guest, tmp_path, "")
    assert banner(images.guest) in run("strings", "-n", "16", looked.path / "memory")
    looked.check_at_most_once()


def test_volatility(images: Images, mount: Mounter, tmp_path: Path) -> None:
    """Its layer opens the file; this plugin needs no symbols."""
    looked = Looked(mount, images.small, tmp_path, "")
    vol = Path(sys.executable).with_name("vol")
    (tmp_path / "volatility").mkdir()
    command: list[str | Path] = [
        vol,
        "-q",
        "--offline",
        "--cache-path",
        tmp_path / "volatility",
        "-f",
        looked.path / "memory",
    ]
    assert banner(images.small) in run(*command, "banners.Banners")
    looked.check_at_most_once()


def test_dd(images: Images, mount: Mounter, tmp_path: Path) -> None:
    looked = Looked(mount, images.guest, tmp_path)
    page = next(page for page in range(8000, 20000) if len(set(images.guest.page(page))) > 64)
    run("dd", f"if={looked.path}/memory", f"of={tmp_path}/page", "bs=4096", f"skip={page}", "count=1")
    assert (tmp_path / "page").read_bytes() == images.guest.page(page)
    assert looked.pages_read() == 1
    assert looked.touched() == {page // WINDOW_PAGES}
    looked.check_nothing_unread_is_here()
    assert looked.fetched() <= images.guest.chunks[page // WINDOW_PAGES].place.length + BLOCKS


BLOCKS = 64 << 10
"""Index blocks that may be fetched on the way to a window: two, that take less than this."""


def test_dd_with_the_kernels_readahead(images: Images, mount: Mounter, tmp_path: Path) -> None:
    looked = Looked(mount, images.guest, tmp_path, "")
    run("dd", f"if={looked.path}/memory", f"of={tmp_path}/page", "bs=4096", "skip=9000", "count=1")
    assert looked.pages_read() <= 32
    looked.check_nothing_unread_is_here()


def test_imagefs_itself(images: Images, mount: Mounter, tmp_path: Path) -> None:
    """Only the pages that are shown, and the tables on the way, whatever the kernel would read ahead."""
    looked = Looked(mount, images.guest, tmp_path, "")
    at = images.guest.memory.index(banner(images.guest).encode())
    shown = run(sys.executable, "-m", "imagefs.cli", "hexdump", looked.path, "--phys", hex(at), "64")
    assert "|Linux version " in shown
    assert looked.memory_read() == len(range(at // PAGE_SIZE, (at + 63) // PAGE_SIZE + 1))
    looked.check_nothing_unread_is_here()
    (vcpu,) = json.loads((looked.path / "metadata.json").read_text())["vcpus"]
    found = run(sys.executable, "-m", "imagefs.cli", "translate", "-v", looked.path, vcpu["rip"])
    assert "r-x" in found.splitlines()[-1].split()
    shown = run(sys.executable, "-m", "imagefs.cli", "hexdump", looked.path, "--virt", vcpu["rip"], "16")
    physical = int(found.splitlines()[-1].split()[0], 16)
    assert bytes.fromhex(shown.partition("  ")[2][:48]) == images.guest.memory[physical : physical + 16]
    looked.check_nothing_unread_is_here()


def test_cmp_and_diff(images: Images, mount: Mounter, tmp_path: Path) -> None:
    first = Looked(mount, images.small, tmp_path)
    second = Looked(mount, images.twin, tmp_path)
    expected = run("cmp", "-l", images.small.native, images.twin.native, status=1)
    assert run("cmp", "-l", first.path / "memory", second.path / "memory", status=1) == expected
    for looked in (first, second):
        looked.check_at_most_once()
    fetched = first.fetched(), second.fetched()
    found = re.findall(
        r"Files \S+/(0x[0-9a-f]{7}) and", run("diff", "-rq", first.path / "pages", second.path / "pages", status=1)
    )
    assert [int(name, 16) for name in found] == sorted(CHANGED)
    # All was here already.
    assert (first.fetched(), second.fetched()) == fetched


def test_cmp_stops_at_the_first_difference(images: Images, mount: Mounter, tmp_path: Path) -> None:
    first = Looked(mount, images.small, tmp_path)
    second = Looked(mount, images.twin, tmp_path)
    said = run("cmp", first.path / "memory", second.path / "memory", status=1)
    assert f"byte {100 * PAGE_SIZE + 8}," in said
    for looked in (first, second):
        assert looked.pages_read() < 256
        looked.check_nothing_unread_is_here()


def test_rsync(images: Images, mount: Mounter, tmp_path: Path) -> None:
    looked = Looked(mount, images.guest, tmp_path, "")
    (tmp_path / "copy").mkdir()
    run("rsync", "-a", "--exclude=/.imagefs", "--exclude=/pages", f"{looked.path}/", tmp_path / "copy/")
    assert sorted(os.listdir(tmp_path / "copy")) == ["config", "memory", "metadata.json", "native", "state"]
    run("cmp", tmp_path / "copy/native", images.guest.native)
    run("cmp", tmp_path / "copy/memory", looked.path / "memory")
    looked.check_at_most_once()
    read = looked.pages_read()
    run("rsync", "-a", "--exclude=/.imagefs", "--exclude=/pages", f"{looked.path}/", tmp_path / "copy/")
    assert looked.pages_read() <= read + 1


def test_gdb(images: Images, mount: Mounter, tmp_path: Path) -> None:
    """The dump's addresses are guest-physical; the registers are those of the stopped vCPU."""
    at = images.guest.memory.index(banner(images.guest).encode())
    looked = Looked(mount, images.core, tmp_path)
    commands = [
        "-ex",
        "info registers rip",
        "-ex",
        f"x/s {at:#x}",
        "-ex",
        f"dump binary memory {tmp_path}/bytes {at:#x} {at + 64:#x}",
    ]
    said = run("gdb", "-q", "-nx", "-batch", "-core", looked.path / "native", *commands)
    assert "Linux version " in said
    with image_reader(str(images.guest.path)) as reader:
        (vcpu,) = reader.image.metadata.checked.vcpus
    assert re.search(rf"^rip +{vcpu.rip:#x} ", said, re.MULTILINE)
    assert (tmp_path / "bytes").read_bytes() == images.guest.memory[at : at + 64]
    # What it shows, what is before it (the core's pages lie across those of the file), and the core's beginning.
    assert len(looked.arrived() - {at // PAGE_SIZE // WINDOW_PAGES}) < 4
    assert looked.pages_read() < 256
