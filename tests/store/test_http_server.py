"""HTTP stores against real servers: nginx, and our own ``imagefs serve``. Both must give the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.nginx import Nginx

from imagefs.errors import (
    AccessDeniedError,
    CorruptObjectError,
    MissingObjectError,
    ReadOnlyStoreError,
    UnavailableError,
)
from imagefs.store.base import Store
from imagefs.store.directory import DirectoryStore
from imagefs.store.http import HttpStatistics, HttpStore
from imagefs.store.location import open_store
from imagefs.store.serve import StoreServer

KEY = "objects/ab/abcdef"
SIZE = 3_000_000

DENY = "location = /denied { return 403; } location = /secret { return 401; } location = /busy { return 503; }"
MOVED = "location /old/ { rewrite ^/old/(.*)$ /$1 redirect; }"


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """Made by a DirectoryStore, with the modes of a new store: 0700."""
    store = DirectoryStore(tmp_path_factory.mktemp("http") / "store", create=True)
    store.put(KEY, content)
    store.put("vm1", b"name")
    store.put("empty", b"")
    return store.root


@pytest.fixture(scope="module")
def nginx(root: Path) -> Iterator[Nginx]:
    with Nginx(root, DENY + MOVED) as server:
        yield server


@pytest.fixture(scope="module")
def own(root: Path) -> Iterator[StoreServer]:
    with StoreServer(root, ("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["nginx", "own"])
def url(request: pytest.FixtureRequest) -> str:
    address: str = request.getfixturevalue(request.param).url
    return address


@pytest.fixture
def store(url: str) -> Iterator[HttpStore]:
    with closing(HttpStore(url)) as opened:
        yield opened


def test_get(store: HttpStore, content: bytes) -> None:
    protocol: Store = store
    assert protocol.get(KEY) == content
    assert protocol.get("vm1") == b"name"
    assert protocol.get("empty") == b""
    for start, length in ((0, 1), (0, SIZE), (1, SIZE - 1), (SIZE - 1, 1), (70_000, 65_536), (5, 0)):
        assert protocol.get(KEY, start, length) == content[start : start + length]
    for start in (1, SIZE - 1, SIZE):
        assert protocol.get(KEY, start) == content[start:]
    assert protocol.size(KEY) == SIZE
    assert protocol.size("empty") == 0
    assert protocol.has(KEY)
    assert not protocol.has("vm2")


@pytest.mark.parametrize(
    ("key", "span", "message"),
    [
        (KEY, (SIZE, 1), f"ends at byte {SIZE}, wanted 1 bytes from byte {SIZE} on"),
        (KEY, (SIZE - 1, 2), f"ends at byte {SIZE}"),
        (KEY, (SIZE + 1, None), f"ends at byte {SIZE}"),
        (KEY, (0, SIZE + 1), f"ends at byte {SIZE}"),
        ("empty", (0, 1), "ends at byte 0"),
        ("empty", (1, None), "ends at byte 0"),
    ],
)
def test_too_short(store: HttpStore, key: str, span: tuple[int, int | None], message: str) -> None:
    with pytest.raises(CorruptObjectError, match=message):
        store.get(key, *span)


def test_limit(store: HttpStore) -> None:
    assert len(store.get(KEY, limit=SIZE)) == SIZE
    assert len(store.get(KEY, 1, limit=SIZE - 1)) == SIZE - 1
    for start in (0, 1):
        with pytest.raises(CorruptObjectError, match=f"has {SIZE - start} bytes, no more than 1000 expected"):
            store.get(KEY, start, limit=1000)


def test_missing_and_read_only(store: HttpStore, url: str) -> None:
    for key in ("vm2", "objects/cd", "vm1/below"):
        with pytest.raises(MissingObjectError) as caught:
            store.get(key)
        assert str(caught.value) == f"{url}: {key}: no such object (HTTP 404)"
    with pytest.raises(ReadOnlyStoreError, match="vm1: an HTTP server cannot be written to"):
        store.put("vm1", b"")
    with pytest.raises(ReadOnlyStoreError):
        store.delete("vm1")


def test_connection_is_kept(store: HttpStore, content: bytes) -> None:
    for number in range(50):
        assert store.get(KEY, number * 100, 100) == content[number * 100 : (number + 1) * 100]
        assert not store.has("vm2")
    with pytest.raises(MissingObjectError):
        store.get("vm2")
    store.size(KEY)
    assert store.statistics() == HttpStatistics(requests=102, bytes_received=5000, errors=0, connections=1)


@pytest.mark.parametrize("connections", [1, 3, 8])
def test_many_threads(url: str, content: bytes, connections: int, rng: random.Random) -> None:
    spans = [(rng.randrange(SIZE - 70_000), rng.randrange(1, 70_000)) for _ in range(160)]
    wrong: list[object] = []

    def work(store: HttpStore, mine: list[tuple[int, int]]) -> None:
        for start, length in mine:
            try:
                if store.get(KEY, start, length) != content[start : start + length]:
                    wrong.append((start, length))
                with pytest.raises(CorruptObjectError):
                    store.get(KEY, SIZE - 1, length + 1)
            except BaseException as error:
                wrong.append(error)

    with closing(HttpStore(url, connections=connections)) as store:
        threads = [threading.Thread(target=work, args=(store, spans[number::8])) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert store.statistics().bytes_received == sum(length for _, length in spans)
        assert store.statistics().errors == len(spans)
        # An object that ends early is told by nginx with 206 and a short range: that costs its connection.
        assert store.statistics().connections <= connections + len(spans)


def test_threads_share_connections(nginx: Nginx) -> None:
    """As nginx counts them."""
    before = len(nginx.requests())
    with closing(HttpStore(nginx.url, connections=4)) as store:
        threads = [
            threading.Thread(target=lambda: [store.get(KEY, n * 1000, 1000) for n in range(25)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        opened = store.statistics().connections
    logged = nginx.wait_for_requests(lambda requests: len(requests) >= before + 200)[before:]
    assert len({request.connection for request in logged}) == opened <= 4
    assert {request.status for request in logged} == {206}


def test_what_nginx_sees(nginx: Nginx) -> None:
    before = len(nginx.requests())
    with closing(HttpStore(nginx.url)) as store:
        store.get(KEY, 100, 50)
        store.get("vm1")
        store.has("vm2")
    seen = nginx.wait_for_requests(lambda requests: len(requests) >= before + 3)[before:]
    assert [(r.method, r.path, r.range, r.status, r.bytes) for r in seen] == [
        ("GET", f"/{KEY}", "bytes=100-149", 206, 50),
        ("GET", "/vm1", "", 200, 4),
        ("HEAD", "/vm2", "", 404, 0),
    ]


def test_refusals(nginx: Nginx) -> None:
    with closing(HttpStore(nginx.url)) as store:
        for _ in range(20):
            with pytest.raises(AccessDeniedError, match=r"denied: access denied \(HTTP 403\)"):
                store.get("denied")
            with pytest.raises(AccessDeniedError, match=r"secret: access denied \(HTTP 401\)"):
                store.get("secret", 5, 5)
            with pytest.raises(UnavailableError, match=r"busy: the server answered HTTP 503"):
                store.size("busy")
        assert store.statistics().errors == 60
        assert store.statistics().connections == 1


def test_redirect(nginx: Nginx, content: bytes) -> None:
    with closing(HttpStore(f"{nginx.url}/old")) as store:
        for start in (0, 1000, 2000):
            assert store.get(KEY, start, 1000) == content[start : start + 1000]
        assert store.statistics().requests == 6
        assert store.statistics().connections == 1


def test_restart(root: Path, content: bytes) -> None:
    with Nginx(root) as server, closing(HttpStore(server.url)) as store:
        for end in (server.stop, server.kill):
            assert store.get(KEY, 0, 10) == content[:10]
            end()
            for _ in range(3):
                with pytest.raises(UnavailableError) as caught:
                    store.get(KEY, 0, 10)
            assert str(caught.value) == f"{server.url}: {KEY}: connection refused"
            server.start()
        assert store.get(KEY) == content


def test_stopped_in_the_middle(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("big", bytes(64 * 1024 * 1024))
    with Nginx(tmp_path, "limit_rate 2m;") as server, closing(HttpStore(server.url)) as http:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                http.get("big")
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not (http.statistics().requests and _has_sent(server)):
            assert thread.is_alive()
        server.kill()
        thread.join()
        assert isinstance(failures[0], UnavailableError)
        assert str(failures[0]).endswith(("broke off in the middle of the answer", "connection reset by peer"))
        server.start()
        assert http.get("big", 60_000_000, 10) == bytes(10)


def _has_sent(server: Nginx) -> bool:
    """Whether nginx has the connection: what it has sent by then is not all."""
    table = Path("/proc/net/tcp").read_text()
    return any(f":{server.port:04X} " in line and " 01 " in line for line in table.splitlines())


def test_open_store(url: str) -> None:
    with closing(open_store(url + "/")) as store:
        assert store.get("vm1") == b"name"
        assert store.origin == url
        assert repr(store) == f"HttpStore('{url}')"
