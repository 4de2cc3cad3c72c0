"""Bytes that are wrong: EIO for whoever wants them, with a reason in the log, and the right ones for everybody else."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys

import pytest
from support.nginx import Nginx

from imagefs.image.geometry import PAGE_SIZE
from tests.faults.images import WINDOW_PAGES, RealImage, check_same, requests_to
from tests.faults.mounts import Mounter

DAMAGED = 9
PAGES = range(DAMAGED * WINDOW_PAGES, (DAMAGED + 1) * WINDOW_PAGES)


@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all", "nocache"])
def test_flipped_byte_in_a_pack(image: RealImage, server: Nginx, mount: Mounter, options: str) -> None:
    with image.damaged(DAMAGED):
        mounted = mount(f"{server.url}/vm1", options, expected=[r"memory window 9\b"])
        for page in image.contents(DAMAGED):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                mounted.read_page(page)
        chunk = image.chunks[DAMAGED].digest.hex()
        where = rf"{server.url}: objects/../{image.pack(DAMAGED).name}: memory window {DAMAGED}: "
        errors = [line for line in mounted.log.read_text().splitlines() if " ERROR " in line]
        assert any(re.search(where, line) and (chunk in line or "zstd" in line) for line in errors)
        everything_else = [page for page in range(image.pages) if page not in PAGES]
        result = mounted.start_reader(image, everything_else, threads=4).result()
        assert result == {"right": len(everything_else), "wrong": [], "errors": {}}
        assert not set(mounted.present()) & set(image.contents(DAMAGED))
        assert not mounted.status()["memory"]["complete"]
    for page in PAGES:
        check_same(mounted.read_page(page), image.page(page), "mended", page)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


@pytest.mark.parametrize("file", ["memory", "native"])
def test_whole_files_around_the_damage(image: RealImage, server: Nginx, mount: Mounter, file: str) -> None:
    """What a tool has read before it fails is right."""
    with image.damaged(DAMAGED):
        mounted = mount(f"{server.url}/vm1", "prefetch=all", expected=[r"memory window 9\b"])
        cat = subprocess.run(["cat", file], cwd=mounted.path, capture_output=True, timeout=60, check=False)
        assert cat.returncode == 1
        # All of it up to there, however much the kernel has read ahead.
        check_same(cat.stdout, image.memory[: image.contents(DAMAGED)[0] * PAGE_SIZE], file)
        assert mounted.run("sh", "-c", f"sha256sum {file} 2>&1 || true").endswith(f"{os.strerror(errno.EIO)}\n")
    check_same((mounted.path / file).read_bytes(), image.memory, file)


def test_guest_that_maps_the_damage(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """SIGBUS instead of a wrong byte; the kernel does not remember it."""
    page = image.contents(DAMAGED)[0]
    program = f"""
import mmap, sys
with open('memory', 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
    sys.stdout.buffer.write(memory[{page * PAGE_SIZE} : {(page + 1) * PAGE_SIZE}])
"""
    with image.damaged(DAMAGED):
        mounted = mount(f"{server.url}/vm1", "prefetch=none", expected=[r"memory window 9\b"])
        fault = subprocess.run([sys.executable, "-c", program], cwd=mounted.path, capture_output=True, check=False)
        assert (fault.returncode, fault.stdout) == (-signal.SIGBUS, b"")
    mended = subprocess.run([sys.executable, "-c", program], cwd=mounted.path, capture_output=True, check=True)
    check_same(mended.stdout, image.page(page), "page", page)


def test_damage_that_is_touched_again_and_again(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """A guest does that. Each time it is asked for anew, a few times at most; the reader's line is in the log once."""
    with image.damaged(DAMAGED):
        mounted = mount(f"{server.url}/vm1", "prefetch=none", expected=[r"memory window 9\b"])
        begun = len(requests_to(server))
        page = image.contents(DAMAGED)[0]
        result = mounted.start_reader(image, [page] * 100, threads=2).result()
        assert result == {"right": 0, "wrong": [], "errors": {str(errno.EIO): 100}}
        # The kernel may ask twice for each time that it is asked.
        assert len(requests_to(server)) - begun <= 3 * 2 * 100
        assert mounted.log.read_text().count(f"(page {page})") == 1


def test_complete_once_the_damage_is_mended(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """The sweep has left it out; when its reader has brought it, nothing is missing any more."""
    with image.damaged(DAMAGED):
        mounted = mount(f"{server.url}/vm1", "prefetch=all", expected=[r"memory window 9\b"])
        arrivals = mounted.start("cat", ".imagefs/arrivals")
        mounted.wait_until_log_says("memory window 9")
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    mounted.wait_until_complete()
    arrivals.process.communicate(timeout=20)
    assert arrivals.process.returncode == 0


def test_zero_page_beside_damage(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """It is in the index, and no chunk is needed for it."""
    empty = next(page for page in PAGES if not any(image.page(page)))
    with image.damaged(DAMAGED):
        mounted = mount(f"{server.url}/vm1", "prefetch=none")
        begun = len(requests_to(server))
        assert mounted.xattr(empty, "state") == "zero"
        check_same(mounted.read_page(empty), bytes(PAGE_SIZE), "zero page", empty)
        assert len(requests_to(server)) == begun
        assert empty in mounted.present()
