"""``imagefs serve`` as a process of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from imagefs.errors import UsageError
from imagefs.store.directory import DirectoryStore
from imagefs.store.http import HttpStore
from imagefs.store.serve import format_address, parse_address

COMMAND = [sys.executable, "-m", "imagefs.cli", "serve"]

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = DirectoryStore(tmp_path / "store", create=True)
    store.put("objects/ab/x", CONTENT)
    store.put("empty", b"")
    (tmp_path / "outside").write_bytes(b"secret")
    (store.root / "link-out").symlink_to(tmp_path / "outside")
    (store.root / "link-in").symlink_to("objects/ab/x")
    (store.root / ".tmp" / "half").write_bytes(b"half")
    os.mkfifo(store.root / "fifo")
    return store.root


@contextmanager
def serving(root: Path, bind: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the URL that it prints when it is ready."""
    process = subprocess.Popen(
        [*COMMAND, str(root), "--bind", bind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"serving {root} at http://")
            yield process, line.split()[3].rstrip("/")
        finally:
            process.kill()


def ask(url: str, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    with closing(connection):
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_told_to_end(root: Path, end: signal.Signals) -> None:
    with serving(root) as (process, url):
        with closing(HttpStore(url)) as store:
            assert store.get("objects/ab/x") == CONTENT
            assert store.get("objects/ab/x", 100, 200) == CONTENT[100:300]
            # With a connection still open.
            process.send_signal(end)
            assert process.wait(timeout=10) == 0
        assert process.stdout is not None
        assert process.stderr is not None
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_what_is_served_and_what_is_not(root: Path) -> None:
    with serving(root) as (_, url):
        assert ask(url, "GET", "/objects/ab/x")[2] == CONTENT
        assert ask(url, "GET", "/link-in")[2] == CONTENT
        assert ask(url, "GET", "/empty")[::2] == (200, b"")
        for path in (
            *("/", "/objects", "/objects/", "/objects/ab", "/nothing", "/objects//ab/x", "/objects/ab/x/", "*"),
            *("/../outside", "/objects/../../outside", "/%2e%2e/outside", "/..%2foutside", f"/{root}/empty"),
            *("/link-out", "/.tmp/half", "/fifo", "/empty?x", "/empty%00", "/" + "a" * 2000),
        ):
            status, headers, body = ask(url, "GET", path)
            assert (path, status, body) == (path, 404, b"404 Not Found\n")
            assert headers["Content-Length"] == str(len(body))
            assert ask(url, "HEAD", path)[::2] == (404, b"")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(url, method, "/empty")[0] == 501
        assert "Python" not in ask(url, "GET", "/empty")[1]["Server"]


RANGES: list[tuple[str, int, str | None, bytes]] = [
    ("bytes=0-0", 206, "bytes 0-0/10240", CONTENT[:1]),
    ("bytes=100-199", 206, "bytes 100-199/10240", CONTENT[100:200]),
    ("bytes=10239-", 206, "bytes 10239-10239/10240", CONTENT[-1:]),
    ("bytes=10000-99999", 206, "bytes 10000-10239/10240", CONTENT[10000:]),
    ("bytes=-240", 206, "bytes 10000-10239/10240", CONTENT[10000:]),
    ("bytes=-99999", 206, "bytes 0-10239/10240", CONTENT),
    ("bytes=10240-", 416, "bytes */10240", b"416 Requested Range Not Satisfiable\n"),
    ("bytes=99999-99999", 416, "bytes */10240", b"416 Requested Range Not Satisfiable\n"),
    ("bytes=-0", 416, "bytes */10240", b"416 Requested Range Not Satisfiable\n"),
    ("bytes=5-4", 200, None, CONTENT),
    ("bytes=0-1,5-6", 200, None, CONTENT),
    ("bytes=-", 200, None, CONTENT),
    ("pages=0-1", 200, None, CONTENT),
    ("bytes=a-b", 200, None, CONTENT),
]


@pytest.mark.parametrize(("asked", "status", "content_range", "body"), RANGES, ids=[case[0] for case in RANGES])
def test_ranges(root: Path, asked: str, status: int, content_range: str | None, body: bytes) -> None:
    with serving(root) as (_, url):
        got = ask(url, "GET", "/objects/ab/x", {"Range": asked})
        assert (got[0], got[1].get("Content-Range"), got[2]) == (status, content_range, body)
        assert got[1]["Content-Length"] == str(len(body))
        head = ask(url, "HEAD", "/objects/ab/x", {"Range": asked})
        assert (head[0], head[1].get("Content-Range"), head[2]) == (status, content_range, b"")


def test_client_that_goes_away(root: Path) -> None:
    """In the middle of an answer: nothing on stderr, and the next one is served."""
    (root / "big").write_bytes(bytes(32 * 1024 * 1024))
    with serving(root) as (process, url):
        for _ in range(5):
            host, _, port = url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(b"GET /big HTTP/1.1\r\n\r\n")
                assert sock.recv(10) == b"HTTP/1.1 2"
        assert ask(url, "GET", "/empty")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def run(*args: str) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


def test_address_in_use(root: Path) -> None:
    with serving(root) as (_, url):
        address = url.removeprefix("http://")
        assert run(str(root), "--bind", address) == (1, "", f"imagefs serve: {address}: address already in use\n")


def test_no_store(tmp_path: Path) -> None:
    status, output, errors = run(str(tmp_path / "none"))
    assert (status != 0, output) == (True, "")
    assert errors.startswith(f"imagefs serve: {tmp_path}/none: no such directory")
    assert errors.count("\n") == 1


def test_address_of_another_host(root: Path) -> None:
    status, _, errors = run(str(root), "--bind", "192.0.2.1:8080")
    assert (status, errors) == (1, "imagefs serve: 192.0.2.1:8080: cannot assign requested address\n")
    status, _, errors = run(str(root), "--bind", "no-such-host.invalid:8080")
    assert status == 1
    assert errors.startswith("imagefs serve: no-such-host.invalid:8080: ")
    assert errors.count("\n") == 1


def test_warns_when_others_can_reach_it(root: Path) -> None:
    with serving(root, "0.0.0.0:0") as (process, url):
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
        assert url.startswith("http://0.0.0.0:")
        assert process.stderr is not None
        assert process.stderr.read() == (
            "imagefs serve: warning: 0.0.0.0 can be reached by others, and memory images hold secrets\n"
        )


def test_ipv6(root: Path) -> None:
    with serving(root, "[::1]:0") as (_, url), closing(HttpStore(url)) as store:
        assert url.startswith("http://[::1]:")
        assert store.get("objects/ab/x", 5, 5) == CONTENT[5:10]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        ("10.0.0.1", ("10.0.0.1", 8080)),
        (":9000", ("127.0.0.1", 9000)),
        ("[::]:80", ("::", 80)),
        ("[fe80::1%eth0]", ("fe80::1%eth0", 8080)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert parse_address(format_address(*address)) == address


@pytest.mark.parametrize(
    "text", ["", "host:", "host:port", "host:65536", "::1", "::1:80", "http://host:80", "[::1", "a b:c"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="not an address to bind to"):
        parse_address(text)
