"""What a mount asks the server for, by nginx's own log: as much as was read, or everything, and nothing twice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from support.nginx import Nginx, Request

from tests.faults.images import WINDOW_PAGES, RealImage, check_same, memory_of, pack_requests, requests_to, split_raw
from tests.faults.mounts import Mounter, RealMount

ZERO_WINDOWS = (range(3, 6),)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> RealImage:
    directory = tmp_path_factory.mktemp("image")
    return split_raw(directory, directory / "store", "vm1", memory_of(48, 11, ZERO_WINDOWS))


@pytest.fixture
def server(image: RealImage) -> Iterator[Nginx]:
    with Nginx(image.store) as nginx:
        yield nginx


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    with Mounter(tmp_path) as mounter:
        yield mounter


def asked_for(requests: list[Request]) -> list[tuple[str, str]]:
    return [(request.path, request.range) for request in requests]


def ranges(requests: list[Request]) -> list[range]:
    """Of one pack, ascending."""
    assert len({request.path for request in requests}) <= 1
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range) for request in requests]
    spans = [range(int(match[1]), int(match[2]) + 1) for match in found if match]
    assert len(spans) == len(requests)
    return sorted(spans, key=lambda span: span.start)


def test_mounting_takes_four_requests_at_most(image: RealImage, server: Nginx, mount: Mounter) -> None:
    mounted = mount(f"{server.url}/vm1", "prefetch=none")
    (mounted.path / "metadata.json").read_bytes()
    os.listdir(mounted.path / "pages/0x00000")
    requests = requests_to(server)
    assert 1 <= len(requests) <= 4
    assert sum(request.bytes for request in requests) < 1 << 20
    assert not pack_requests(requests, [image])


@pytest.mark.parametrize("options", ["prefetch=none", "nocache"])
def test_only_what_is_read_is_fetched(image: RealImage, server: Nginx, mount: Mounter, options: str) -> None:
    mounted = mount(f"{server.url}/vm1", options)
    at_mount = len(requests_to(server))
    windows = [33, 2, 17]
    # Four pages of each window, in some order: one request for each.
    for page in (window * WINDOW_PAGES + at for at in (5, 1, 15, 9) for window in windows):
        check_same(mounted.read_page(page), image.page(page), "page", page)
    # Zero pages cost nothing.
    check_same(mounted.read_page(4 * WINDOW_PAGES), image.page(4 * WINDOW_PAGES), "page")
    requests = requests_to(server)[at_mount:]
    assert asked_for(requests) == [image.request(window) for window in windows]
    assert all(request.status == 206 for request in requests)
    fetch = mounted.status()["fetch"]
    assert (fetch["requests"], fetch["background_requests"], fetch["chunks"]) == (3, 0, 3)
    assert fetch["payload_bytes"] == sum(request.bytes for request in requests)


def test_everything_comes_by_itself(image: RealImage, server: Nginx, mount: Mounter) -> None:
    mounted = mount(f"{server.url}/vm1", "prefetch=all")
    mounted.wait_until_complete()
    assert mounted.present() == list(range(image.pages))
    fetched = requests_to(server)
    spans = ranges(pack_requests(fetched, [image]))
    # Each chunk once, and nothing between them.
    places = sorted((chunk.place.offset, chunk.place.length) for chunk in image.chunks.values())
    assert sum(map(len, spans)) == sum(length for _, length in places)
    assert all(before.stop <= after.start for before, after in pairwise(spans))
    # From here on the server is not needed.
    server.kill()
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


def test_sweep_leaves_out_what_was_read(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """Read from both ends while the sweep runs: still nothing is fetched twice."""
    mounted = mount(f"{server.url}/vm1", "prefetch=all")
    pages = [page for pair in zip(range(384), range(767, 383, -1), strict=True) for page in pair]
    assert mounted.start_reader(image, pages, threads=2).result() == {"right": image.pages, "wrong": [], "errors": {}}
    mounted.wait_until_complete()
    spans = ranges(pack_requests(requests_to(server), [image]))
    assert all(before.stop <= after.start for before, after in pairwise(spans))


def open_files(mounted: RealMount) -> set[str]:
    """Regular files that the daemon has open or has mapped, but for its log."""
    paths = set()
    for link in Path(f"/proc/{mounted.pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("/") and not target.startswith("/dev/"):
            paths.add(target)
    maps = (line.split(maxsplit=5) for line in Path(f"/proc/{mounted.pid}/maps").read_text().splitlines())
    # A private mapping writes nothing into its file.
    paths |= {fields[5].strip() for fields in maps if len(fields) == 6 and fields[1] == "rw-s"}
    return paths - {str(mounted.log), "/dev/zero (deleted)"}


def test_nocache_leaves_nothing_on_disk(
    image: RealImage, server: Nginx, mount: Mounter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    mounted = mount(f"{server.url}/vm1", "nocache")
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    assert mounted.status()["cache"]["kind"] == "memory"
    assert open_files(mounted) == set()
    mounted.unmount()
    left = {path for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR") for path in (tmp_path / name).rglob("*")}
    assert left == set()
    digest = Path("/var/cache/imagefs") / mounted_digest(image)
    assert not digest.exists()


def mounted_digest(image: RealImage) -> str:
    name = image.path.read_text()
    match = re.search(r'"manifest":"([0-9a-f]{64})"', name)
    assert match is not None
    return match[1]


def test_name_that_moves_while_mounted(tmp_path: Path, mount: Mounter) -> None:
    """The mount goes on showing the image that it found; a new one shows the new one."""
    store = tmp_path / "store"
    old = split_raw(tmp_path, store, "vm1", memory_of(16, 12))
    with Nginx(store) as server:
        first = mount(f"{server.url}/vm1", "prefetch=none")
        check_same(first.read_page(5), old.page(5), "page 5", 5)
        (tmp_path / "vm1.raw").rename(tmp_path / "old.raw")
        new = split_raw(tmp_path, store, "vm1", memory_of(24, 13))
        second = mount(f"{server.url}/vm1", "prefetch=none")
        check_same((second.path / "memory").read_bytes(), new.memory, "the new image")
        check_same((first.path / "memory").read_bytes(), old.memory, "the old image")
        assert first.status()["image"] != second.status()["image"]
