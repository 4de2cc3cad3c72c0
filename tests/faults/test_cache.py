"""What is kept between mounts: used without the server, shared, and believed only as far as it may be."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nginx import Nginx, Request

from imagefs.image.geometry import PAGE_SIZE
from tests.faults.conftest import ZERO_WINDOWS
from tests.faults.images import WINDOW, WINDOW_PAGES, RealImage, check_same, pack_requests, requests_to
from tests.faults.mounts import Mounter, RealMount
from tests.mount.conftest import wait_until


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where :func:`tests.faults.conftest.mount` keeps pages."""
    return tmp_path / "cache"


def files(cache: Path) -> Path:
    """The directory of the one image in a cache."""
    (directory,) = cache.iterdir()
    return directory


def windows_asked_for(image: RealImage, requests: list[Request]) -> set[int]:
    """Windows that requests have brought, whole."""
    found = set()
    for request in pack_requests(requests, [image]):
        first, last = map(int, request.range.removeprefix("bytes=").split("-"))
        for window, chunk in image.chunks.items():
            if first <= chunk.place.offset and chunk.place.offset + chunk.place.length <= last + 1:
                found.add(window)
    return found


def windows_of(pages: list[int]) -> set[int]:
    return {page // WINDOW_PAGES for page in pages}


@pytest.fixture
def filled(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """The whole image is in the cache."""
    first = mount(f"{server.url}/vm1", "prefetch=all")
    first.wait_until_complete()
    first.unmount()


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all", "prefetch=none,soft,timeo=1"])
def test_second_mount_needs_no_pages(image: RealImage, server: Nginx, mount: Mounter, options: str) -> None:
    asked = len(requests_to(server))
    mounted = mount(f"{server.url}/vm1", options)
    assert not pack_requests(requests_to(server)[asked:], [image])
    server.kill()
    assert mounted.present() == list(range(image.pages))
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    assert mounted.xattr(17, "state") == "present"


def test_part_of_an_image_is_kept(image: RealImage, server: Nginx, mount: Mounter) -> None:
    first = mount(f"{server.url}/vm1", "prefetch=none")
    for window in (3, 40):
        first.read_page(image.contents(window)[0])
    first.unmount()
    asked = len(requests_to(server))
    second = mount(f"{server.url}/vm1", "prefetch=none")
    for window in (3, 40, 5):
        page = image.contents(window)[-1]
        check_same(second.read_page(page), image.page(page), "page", page)
    requests = pack_requests(requests_to(server)[asked:], [image])
    assert [(request.path, request.range) for request in requests] == [image.request(5)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_end_in_the_middle_of_a_sweep(image: RealImage, server: Nginx, mount: Mounter, number: signal.Signals) -> None:
    """What the bitmap says is there, is; it is not fetched again, and the rest is."""
    link = mount.link(server.address, mbit=24, rtt_ms=10)
    first = mount(f"{link.url}/vm1", "prefetch=all")
    third = image.pages // 3
    wait_until(lambda: len(first.present()) > third, "a third of it is here")
    if number == signal.SIGKILL:
        first.kill()
    else:
        os.kill(first.pid, number)
        first.wait_until_gone()
    # What is under way is logged when it ends, or now never.
    server.kill()
    server.start()
    asked = len(requests_to(server))
    second = mount(f"{link.url}/vm1", "prefetch=none")
    kept = second.present()
    assert third < len(kept) < image.pages
    for page in kept:
        check_same(second.read_page(page), image.page(page), "kept", page)
    assert not pack_requests(requests_to(server)[asked:], [image])
    link.set(mbit=1000, rtt_ms=0)
    check_same((second.path / "memory").read_bytes(), image.memory, "memory")
    whole = {window for window in image.chunks if set(image.contents(window)) <= set(kept)}
    assert whole
    assert not windows_asked_for(image, requests_to(server)[asked:]) & whole


def change_boot(cache: Path) -> None:
    """As if the host had gone down since."""
    (files(cache) / "boot").write_text("00000000-0000-0000-0000-000000000000")


def damage(cache: Path, page: int, data: bytes = b"torn") -> None:
    """What a host that goes down may do to a page whose bit is set."""
    with (files(cache) / "pages").open("r+b") as pages:
        pages.seek(page * PAGE_SIZE + 100)
        pages.write(data)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all"])
def test_after_a_crash_of_the_host(image: RealImage, server: Nginx, mount: Mounter, cache: Path, options: str) -> None:
    """Everything is verified before it is shown: what is right is not fetched again, and what is not, is."""
    change_boot(cache)
    torn = [7 * WINDOW_PAGES + 3, 40 * WINDOW_PAGES, 41 * WINDOW_PAGES + 15]
    for page in torn:
        damage(cache, page)
    asked = len(requests_to(server))
    mounted = mount(f"{server.url}/vm1", options)
    if options == "prefetch=all":
        mounted.wait_until_complete()
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    for page in torn:
        check_same(mounted.read_page(page), image.page(page), "torn", page)
    assert windows_asked_for(image, requests_to(server)[asked:]) == windows_of(torn)
    mounted.unmount()
    # And now it is believed again, what was mended with it.
    asked = len(requests_to(server))
    again = mount(f"{server.url}/vm1", "prefetch=none")
    check_same((again.path / "memory").read_bytes(), image.memory, "memory, again")
    assert not pack_requests(requests_to(server)[asked:], [image])


@pytest.mark.usefixtures("filled")
def test_zero_page_that_is_not_zero_after_a_crash(image: RealImage, server: Nginx, mount: Mounter, cache: Path) -> None:
    """Zeros are not fetched, so what the crash left in their place must be looked at, too."""
    empty = ZERO_WINDOWS[0].start * WINDOW_PAGES + 5
    change_boot(cache)
    damage(cache, empty)
    mounted = mount(f"{server.url}/vm1", "prefetch=none")
    check_same(mounted.read_page(empty), bytes(PAGE_SIZE), "zero page", empty)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


@pytest.mark.usefixtures("filled")
def test_two_crashes(image: RealImage, server: Nginx, mount: Mounter, cache: Path) -> None:
    """The second before all pages of the first were verified."""
    change_boot(cache)
    first = mount(f"{server.url}/vm1", "prefetch=none")
    for window in (1, 2, 40):
        first.read_page(image.contents(window)[0])
    first.unmount()
    change_boot(cache)
    for page in (2 * WINDOW_PAGES, 50 * WINDOW_PAGES + 1):
        damage(cache, page)
    second = mount(f"{server.url}/vm1", "prefetch=all")
    check_same((second.path / "memory").read_bytes(), image.memory, "memory")
    second.wait_until_complete()
    check_same((second.path / "memory").read_bytes(), image.memory, "memory")


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("what", ["lost", "cut", "empty", "made larger"])
def test_page_file_that_is_not_what_it_was(
    image: RealImage, server: Nginx, mount: Mounter, cache: Path, what: str
) -> None:
    """Somebody has tidied up: what the bitmap says is worth nothing then."""
    pages = files(cache) / "pages"
    match what:
        case "lost":
            pages.unlink()
        case "cut":
            os.truncate(pages, len(image.memory) // 2)
        case "empty":
            os.truncate(pages, 0)
        case "made larger":
            os.truncate(pages, len(image.memory) + WINDOW)
    mounted = mount(f"{server.url}/vm1", "prefetch=none")
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("name", ["present", "boot", "lock", "blocks"])
def test_other_files_that_are_lost(image: RealImage, server: Nginx, mount: Mounter, cache: Path, name: str) -> None:
    subprocess.run(["rm", "-rf", str(files(cache) / name)], check=True)
    mounted = mount(f"{server.url}/vm1", "prefetch=all")
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    mounted.wait_until_complete()


def test_two_mounts_of_one_cache(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """What one daemon has fetched, the other finds."""
    one = mount(f"{server.url}/vm1", "prefetch=none")
    two = mount(f"{server.url}/vm1", "prefetch=none")
    asked = len(requests_to(server))
    for number, window in enumerate(image.chunks):
        fetching, finding = (one, two) if number % 2 else (two, one)
        page = image.contents(window)[0]
        check_same(fetching.read_page(page), image.page(page), "fetched", page)
        check_same(finding.read_page(page), image.page(page), "found", page)
    requests = pack_requests(requests_to(server)[asked:], [image])
    assert [(request.path, request.range) for request in requests] == [image.request(w) for w in image.chunks]
    for mounted in (one, two):
        check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


def test_two_mounts_that_sweep_at_once(image: RealImage, server: Nginx, mount: Mounter) -> None:
    link = mount.link(server.address, mbit=40, rtt_ms=5)
    both = [mount(f"{link.url}/vm1", "prefetch=all") for _ in range(2)]
    readers = [mounted.start_reader(image, range(image.pages - 1, -1, -1), threads=2) for mounted in both]
    for reader in readers:
        assert reader.result() == {"right": image.pages, "wrong": [], "errors": {}}
    for mounted in both:
        mounted.wait_until_complete()
        assert mounted.present() == list(range(image.pages))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB: a third of what the image's pages take."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def said_full(mounted: RealMount) -> int:
    return mounted.log.read_text().count("no space left")


@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all"])
def test_full_disk(image: RealImage, server: Nginx, tiny_disk: Path, tmp_path: Path, options: str) -> None:
    """What does not fit is fetched again whenever it is wanted; that is slow, and right."""
    # The disk must outlive the mount.
    with Mounter(tmp_path) as mount:
        mounted = mount(f"{server.url}/vm1", f"{options},cache={tiny_disk}", expected=["no space left"])
        for _ in range(2):
            result = mounted.start_reader(image, range(1, image.pages, 4), threads=2).result()
            assert result == {"right": image.pages // 4, "wrong": [], "errors": {}}
        check_same(mounted.path.joinpath("native").read_bytes(), image.memory, "native")
        status = mounted.status()["cache"]
        assert 0 < status["pages_present"] < image.pages
        assert status["full"]
        assert said_full(mounted) == 1
        mounted.unmount()
        # With what there was room for, the next mount goes on.
        again = mount(f"{server.url}/vm1", f"{options},cache={tiny_disk}", expected=["no space left"])
        result = again.start_reader(image, range(image.pages - 1, -1, -4), threads=2).result()
        assert result == {"right": image.pages // 4, "wrong": [], "errors": {}}


def test_disk_that_has_room_again(image: RealImage, server: Nginx, tiny_disk: Path, tmp_path: Path) -> None:
    with Mounter(tmp_path) as mount:
        mounted = mount(f"{server.url}/vm1", f"prefetch=none,cache={tiny_disk}", expected=["no space left"])
        mounted.start_reader(image, range(1, image.pages, 4)).result()
        assert len(mounted.present()) < image.pages
        subprocess.run(["mount", "-o", "remount,size=32m", str(tiny_disk)], check=True)
        # Another open file, lest the kernel answer: its pages were dropped with the last reader's.
        Path("/proc/sys/vm/drop_caches").write_text("1")
        result = mounted.start_reader(image, range(image.pages)).result()
        assert result == {"right": image.pages, "wrong": [], "errors": {}}
        assert mounted.present() == list(range(image.pages))
        assert not mounted.status()["cache"]["full"]
