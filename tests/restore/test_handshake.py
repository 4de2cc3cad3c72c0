"""What comes through the pager's socket and is not the handshake: refused in a line, and nobody else is disturbed."""

from __future__ import annotations

import array
import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import UsageError
from imagefs.pager import PagerRegion, open_userfaultfd
from imagefs.restore import handshake
from imagefs.restore.handshake import HandshakeError, parse_regions, wait_for_handover
from imagefs.restore.listening import Listener
from tests.restore.conftest import PAGES
from tests.restore.vmms import Program, listening, wait_until

SIZE = PAGES * 4096
PAGE = 4096


def region(**changes: Any) -> dict[str, Any]:
    return {"base_host_virt_addr": 1 << 30, "size": SIZE, "offset": 0, "page_size": PAGE, **changes}


HALVES = [
    region(size=SIZE // 2, base_host_virt_addr=1 << 30),
    region(size=SIZE // 2, base_host_virt_addr=1 << 31, offset=SIZE // 2),
]


@pytest.fixture
def uffd() -> Iterator[int]:
    fd = open_userfaultfd(moves=False)
    yield fd
    os.close(fd)


def send(path: Path, body: bytes, fds: Sequence[int] = ()) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    connection.settimeout(60)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = connection.sendmsg([body], ancillary)
    with suppress(ConnectionError):  # it need not have read all to know enough
        while sent < len(body):
            sent += connection.send(body[sent:])
    return connection


BAD: list[tuple[str, Any, str]] = [
    ("no JSON", b"hello", "no JSON: "),
    ("no text", b"[\xff\xfe]", "no JSON: "),
    ("too deep", b"[" * 60000 + b"1" + b"]" * 1000, "no JSON: "),
    ("number too long", b"[" + b"1" * 9000 + b"]", "no JSON: "),
    ("an object", region(), "not an array of regions"),
    ("numbers", [1, 2], "not an array of regions"),
    ("no regions", [], "0 regions"),
    ("many regions", [region()] * 65, "65 regions"),
    ("no size", [{k: v for k, v in region().items() if k != "size"}], "region 0: size is None"),
    ("text", [region(size="16")], "region 0: size is 16"),
    ("true", [region(offset=False)], "region 0: offset is False"),
    ("negative", [region(offset=-PAGE)], "region 0: offset is -4096"),
    ("fraction", [region(size=4096.5)], "region 0: size is 4096.5"),
    ("huge", [region(base_host_virt_addr=1 << 64)], "region 0: base_host_virt_addr is 18446744073709551616"),
    ("page size", [region(page_size=8192)], "region 0: page size 8192"),
    ("two page sizes", [region(page_size_kib=4)], "region 0: page_size and page_size_kib differ"),
    ("unaligned", [region(base_host_virt_addr=(1 << 30) + 1)], "region 0: address, size or offset is not a multiple"),
    ("unaligned for its pages", [region(page_size=2 << 20, base_host_virt_addr=PAGE)], "region 0: address, size"),
    (
        "too small",
        [region(size=SIZE - PAGE)],
        "regions have 16,773,120 bytes in all, the image's memory 16,777,216",
    ),
    ("too large", [region(size=SIZE + PAGE)], "region 0: reaches beyond the memory's 16777216 bytes"),
    ("beyond the end", [region(offset=PAGE)], "region 0: reaches beyond"),
    ("around the end", [region(base_host_virt_addr=(1 << 64) - PAGE)], "region 0: reaches beyond"),
    ("overlap", [HALVES[0], HALVES[1] | {"base_host_virt_addr": 1 << 30}], "regions 0 and 1 overlap"),
    ("overlap in the image", [HALVES[0], HALVES[1] | {"offset": 0}], "regions 0 and 1 overlap"),
]


def test_malicious_clients(vmm: Program, mountpoint: Path, tmp_path: Path, uffd: int) -> None:
    """One after the other, then a guest that is served by the very same process."""
    path = tmp_path / "socket"
    with listening(mountpoint, path, tmp_path / "log") as command:

        def refused(body: bytes, fds: Sequence[int], message: str) -> None:
            with send(path, body, fds) as client:
                if message.startswith("it hung up"):
                    client.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            lines = command.said().splitlines()
            assert re.fullmatch(rf"imagefs: {path}: process {os.getpid()} is refused: .*", lines[-1])
            assert message in lines[-1]

        for _, body, message in BAD:
            refused(body if isinstance(body, bytes) else json.dumps(body).encode(), [uffd], message)
        good = json.dumps([region()]).encode()
        refused(good, [uffd, uffd], "more than one file descriptor")
        refused(good, [uffd] * 20, "more than one file descriptor")
        refused(good, [0], "the file descriptor is no userfaultfd")
        refused(b"[" + b" " * 100_000, [], "a message of more than 65,536 bytes")
        refused(good, [], "it hung up before a file descriptor had come")
        refused(good[:-9], [uffd], "it hung up before all of its message had come")
        refused(b"", [], "it hung up before a file descriptor had come")
        # Many who say nothing at all, while one is served.
        silent = [send(path, b"[") for _ in range(12)]
        with vmm.running(path, PAGES, 1) as guest:
            wait_until(lambda: guest.touched() > 100)
            guest.finish()
        assert command.wait() == 0, command.said()
        for client in silent:
            client.close()


def test_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: list[str]) -> None:
    """It ends after a while; those before it are not held up."""
    expect_log += ["is refused: it handed nothing over within 0.05 seconds", "it hung up"]
    monkeypatch.setattr(handshake, "SECONDS", 0.05)
    ours, its = socket.socketpair()
    with ours, its, Listener(tmp_path / "socket") as listener:
        clients = [send(listener.path, body) for body in (b"", b"[")]
        clients[0].close()

        class Ended:
            """Once all clients have been told to go."""

            def fileno(self) -> int:
                return ours.fileno()

        def watch() -> None:
            assert clients[1].recv(1) == b""
            its.close()

        thread = threading.Thread(target=watch)
        thread.start()
        assert wait_for_handover(listener, SIZE, Ended()) is None
        thread.join()
        clients[1].close()


def test_places(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(UsageError, match="is there, and is no socket"):
        Listener(path)
    assert path.read_text() == "precious"
    path.unlink()
    with Listener(path):
        with pytest.raises(UsageError, match="another process listens there"):
            Listener(path)
        left = path.stat().st_ino
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listener(path):
        assert path.stat().st_ino != left or path.is_socket()
    with pytest.raises(UsageError, match="at most 107 bytes"):
        Listener(tmp_path / ("x" * 108))
    with pytest.raises(UsageError, match="No such file"):
        Listener(tmp_path / "nowhere" / "socket")


def test_either_name_of_the_page_size() -> None:
    for names in ({"page_size": 2 << 20}, {"page_size_kib": 2 << 20}, {"page_size": 2 << 20, "page_size_kib": 2 << 20}):
        text = json.dumps([{"base_host_virt_addr": 5, "size": 6, "offset": 7, **names}])
        assert parse_regions(text.encode()) == ((PagerRegion(5, 6, 7, 2 << 20),), None)
    text = json.dumps([{"base_host_virt_addr": 5, "size": 6, "offset": 7, "userfaultfd": 9, "new": [1]}])
    assert parse_regions(text.encode()) == ((PagerRegion(5, 6, 7, PAGE),), 9)


@given(st.binary(max_size=200) | st.lists(st.dictionaries(st.text(), st.integers())).map(json.dumps).map(str.encode))
def test_any_text(text: bytes) -> None:
    """Regions or a HandshakeError."""
    with suppress(HandshakeError):
        parse_regions(text)


@given(st.integers(0, 200), st.integers(0, 400))
def test_message_in_pieces(cut: int, size: int) -> None:
    text = json.dumps([region(size=size), region(name='a\\"b')]).encode()
    cut = min(cut, len(text) - 1)
    with pytest.raises(handshake.UnfinishedError):
        parse_regions(text[:cut])
