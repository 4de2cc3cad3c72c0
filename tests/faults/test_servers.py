"""Servers that turn bad while an image is mounted: never a wrong byte, and all is well once they are good again."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.nginx import Nginx

from tests.faults.images import WINDOW_PAGES, RealImage, check_same
from tests.faults.mounts import Mounter, RealMount
from tests.mount.conftest import wait_until
from tests.store.scripted import ScriptedServer, Visit

PAGE = 30 * WINDOW_PAGES + 5


@contextmanager
def replaced(server: Nginx, config: str) -> Iterator[None]:
    """Another server at the same address as long as the context lasts."""
    server.stop()
    other = Nginx(server.root, config)
    other.port = server.port
    with other:
        yield
    server.start()


def read_fails(mounted: RealMount, page: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        mounted.read_page(page)


def packs(image: RealImage, directive: str) -> str:
    """nginx's configuration in which a directive holds for packs, but not for what a mount needs to begin."""
    names = {image.pack(window).name for window in image.chunks}
    return f"location ~ /({'|'.join(sorted(names))})$ {{ {directive} }}"


USELESS = [
    pytest.param("return 404;", r"HTTP 404", id="not found"),
    pytest.param("max_ranges 0;", r"ignores Range", id="ignores Range"),
    pytest.param("add_header Content-Encoding gzip;", r"encoded the answer", id="encodes"),
]
REFUSING = [
    pytest.param("return 403;", r"HTTP 403", id="forbidden"),
    pytest.param("return 500;", r"HTTP 500", id="internal error"),
    pytest.param("return 503;", r"HTTP 503", id="unavailable"),
    pytest.param("return 444;", r"closed the connection without an answer", id="says nothing"),
]
RECOVERED = ("trying again until it answers", "answers again")


@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all"])
@pytest.mark.parametrize(("directive", "said"), USELESS)
def test_answers_that_are_of_no_use(
    image: RealImage, server: Nginx, mount: Mounter, directive: str, said: str, options: str
) -> None:
    """The server answers, and waiting would not help: EIO, with the reason in the log."""
    with replaced(server, packs(image, directive)):
        mounted = mount(f"{server.url}/vm1", options, expected=[said, *RECOVERED])
        read_fails(mounted, PAGE)
        pages = range(0, image.pages, 5)
        result = mounted.start_reader(image, pages, threads=8).result()
        assert result["wrong"] == []
        # Zeros only where there are zeros.
        assert result["right"] <= sum(not any(image.page(page)) for page in pages)
        assert result["errors"] == {str(errno.EIO): len(pages) - result["right"]}
        assert re.search(rf"{server.url}: objects/\S+: .*{said}", mounted.log.read_text())
        assert not any(any(image.page(page)) for page in mounted.present())
    check_same(mounted.read_page(PAGE), image.page(PAGE), "page", PAGE)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


@pytest.mark.parametrize("options", ["prefetch=none", "prefetch=all"])
@pytest.mark.parametrize(("directive", "said"), REFUSING)
def test_answers_that_may_be_others_later(
    image: RealImage, server: Nginx, mount: Mounter, directive: str, said: str, options: str
) -> None:
    """A hard mount waits until the server has come to its senses."""
    with replaced(server, packs(image, directive)):
        mounted = mount(f"{server.url}/vm1", options, expected=RECOVERED)
        reader = mounted.start_reader(image, range(image.pages), threads=8)
        mounted.wait_until_log_says(f"{said}.*; trying again until it answers")
        wait_until(lambda: mounted.waiting() == 8, "all readers wait")
        assert not any(any(image.page(page)) for page in mounted.present())
    assert reader.result() == {"right": image.pages, "wrong": [], "errors": {}}
    mounted.wait_until_log_says("answers again")


class Truncating:
    """Serves a store; while ``broken`` is set, packs break off in the middle of what was announced."""

    def __init__(self, image: RealImage) -> None:
        self._store = image.store
        self._packs = {image.pack(window).name for window in image.chunks}
        self.broken = threading.Event()
        self.cut_short: Counter[str] = Counter()
        """How often, by range."""

    def __call__(self, visit: Visit) -> None:
        data = (self._store / visit.path.lstrip("/")).read_bytes()
        status, headers = "200 OK", ""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", visit.header("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2])
            status, headers = "206 Partial Content", f"Content-Range: bytes {first}-{last}/{len(data)}\r\n"
            data = data[first : last + 1]
        if self.broken.is_set() and visit.path.rpartition("/")[2] in self._packs:
            self.cut_short[visit.header("Range") or ""] += 1
            announced = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
            visit.send(announced.encode() + data[: len(data) // 2])
        else:
            visit.answer(status, headers, data)


def test_answers_that_break_off(image: RealImage, mount: Mounter) -> None:
    """Half a transfer is none, however often it is tried: as with a server that is away."""
    script = Truncating(image)
    script.broken.set()
    with ScriptedServer(script) as server:
        mounted = mount(f"{server.url}/vm1", "prefetch=none", expected=RECOVERED)
        reader = mounted.start_reader(image, range(image.pages - 1, -1, -1), threads=8)
        # As often as what is damaged would be tried.
        wait_until(lambda: max(script.cut_short.values(), default=0) >= 3, "the same answer has broken off again")
        assert reader.process.poll() is None
        script.broken.clear()
        assert reader.result() == {"right": image.pages, "wrong": [], "errors": {}}
        mounted.wait_until_log_says("broke off in the middle of the answer; trying again")


def test_another_image_under_the_same_names(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """Objects of the right lengths with other bytes in them: as an object store that has lost its mind."""
    mounted = mount(f"{server.url}/vm1", "prefetch=none", expected=[r"memory window \d+: "])
    pack = image.pack(0)
    size = pack.stat().st_size
    right = pack.read_bytes()
    for wrong in (bytes(size), right[1:] + right[:1], right[::-1]):
        pack.write_bytes(wrong)
        result = mounted.start_reader(image, range(0, image.pages, 15), threads=4).result()
        assert result["wrong"] == []
        assert result["right"] + result["errors"][str(errno.EIO)] == len(range(0, image.pages, 15))
        assert not any(any(image.page(page)) for page in mounted.present())
    pack.write_bytes(right)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")


def test_pack_that_is_cut_short(image: RealImage, server: Nginx, mount: Mounter) -> None:
    """What lies before the cut is right, what lies behind it is EIO."""
    pack = image.pack(0)
    right = pack.read_bytes()
    inside = sorted((chunk.place.offset + chunk.place.length, window) for window, chunk in image.chunks.items())
    end, last = inside[len(inside) // 2]
    pack.write_bytes(right[: end - 1])
    mounted = mount(f"{server.url}/vm1", "prefetch=none", expected=[r"ends at byte \d+|HTTP 416|instead of|Range"])
    for stop, window in inside:
        page = image.contents(window)[0]
        if stop < end:
            check_same(mounted.read_page(page), image.page(page), "before the cut", page)
        else:
            read_fails(mounted, page)
    pack.write_bytes(right)
    check_same((mounted.path / "memory").read_bytes(), image.memory, "memory")
    assert last in image.chunks
