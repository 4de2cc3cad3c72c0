"""The simulated link does what it says, so that what is measured through it means something."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.link import Link, measure
from support.nginx import Nginx

from imagefs.errors import UnavailableError
from imagefs.store.directory import DirectoryStore
from imagefs.store.http import HttpStore

SIZE = 8_000_000


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    store = DirectoryStore(tmp_path_factory.mktemp("link"))
    store.put("big", os.urandom(SIZE))
    with Nginx(store.root) as server:
        yield server


@pytest.mark.parametrize(("mbit", "rtt"), [(100.0, 40.0), (20.0, 5.0), (1000.0, 0.0)])
def test_accuracy(mbit: float, rtt: float) -> None:
    """Never faster than it says. As fast as that in one of three attempts: others use this machine, too."""
    size = int(min(5_000_000, mbit * 1e6 / 8))
    for _ in range(3):
        found = measure(mbit, rtt, size)
        assert found.rtt_ms >= rtt
        assert found.first_answer_ms >= 2 * rtt
        assert found.mbit <= 1.10 * mbit
        if found.mbit >= 0.85 * mbit and found.rtt_ms <= rtt + 10:
            return
    pytest.fail(f"three times too slow, the last time {found}")


def test_more_than_a_gigabit() -> None:
    assert max(measure(math.inf, 0.0, 50_000_000).mbit for _ in range(3)) >= 1000


def test_http_through_it(nginx: Nginx) -> None:
    with Link(nginx.address, mbit=200, rtt_ms=5) as link, closing(HttpStore(link.url)) as store:
        begin = time.monotonic()
        data = store.get("big")
        assert time.monotonic() - begin >= SIZE * 8 / 200e6
        assert data == (nginx.root / "big").read_bytes()
        counters = link.counters()
        assert SIZE < counters.bytes_down < SIZE + 1000
        assert 0 < counters.bytes_up < 1000
        assert (counters.connections, counters.open_connections) == (1, 1)
        assert repr(link) == f"<Link 127.0.0.1:{link.address[1]}, 200 Mbit/s, 5 ms>"


def test_small_request_beside_bulk(nginx: Nginx) -> None:
    """The fair queue: it takes its round trip and its turn, not its place behind all that is queued."""
    with Link(nginx.address, mbit=40, rtt_ms=20) as link, closing(HttpStore(link.url)) as store:
        store.get("big", 0, 1)
        bulk = threading.Thread(target=store.get, args=("big",))
        bulk.start()
        while link.counters().bytes_down < 100_000:
            assert bulk.is_alive()
        begin = time.monotonic()
        with closing(HttpStore(link.url)) as other:
            other.get("big", 0, 1000)
        took = time.monotonic() - begin
        crossed = link.counters().bytes_down
        assert bulk.is_alive()
        bulk.join()
    # Two round trips make 40 ms. All of the bulk would be 1600 ms, what one connection may queue 50 ms.
    assert took >= 0.04
    assert crossed < SIZE / 2


def test_connections_share(nginx: Nginx) -> None:
    """Two transfers of the same size that begin together end together, at twice the time."""
    with Link(nginx.address, mbit=80, rtt_ms=1) as link, closing(HttpStore(link.url)) as store:
        ends: list[float] = []

        def work() -> None:
            store.get("big", 0, 2_000_000)
            ends.append(time.monotonic())

        begin = time.monotonic()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert min(ends) - begin >= 0.3, "alone it would take 0.2 s, together 0.4 s"


def test_change_while_in_use(nginx: Nginx) -> None:
    with Link(nginx.address, mbit=1, rtt_ms=0) as link, closing(HttpStore(link.url)) as store:
        begin = time.monotonic()
        transfer = threading.Thread(target=store.get, args=("big",))
        transfer.start()
        while not link.counters().bytes_down:
            assert transfer.is_alive()
        link.set(mbit=1000)
        transfer.join()
        assert time.monotonic() - begin < 30, "64 s at the first rate"
        link.set(rtt_ms=100)
        begin = time.monotonic()
        store.get("big", 0, 1)
        assert time.monotonic() - begin >= 0.1
        for wrong in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="no link has"):
                link.set(mbit=wrong)
        with pytest.raises(ValueError, match="no link has"):
            link.set(rtt_ms=-1)
        assert len(store.get("big", 0, 10)) == 10


def test_cut_that_hangs(nginx: Nginx) -> None:
    """A transfer stands still, then goes on where it was; so does a connection that was made meanwhile."""
    with Link(nginx.address, mbit=50, rtt_ms=1) as link, closing(HttpStore(link.url)) as store:
        got: list[bytes] = []
        transfer = threading.Thread(target=lambda: got.append(store.get("big")))
        transfer.start()
        while link.counters().bytes_down < 100_000:
            assert transfer.is_alive()
        link.cut("hang")
        crossed = link.counters().bytes_down
        with (
            closing(HttpStore(link.url, read_timeout=0.2, connect_timeout=0.2)) as impatient,
            pytest.raises(UnavailableError, match="no answer in time"),
        ):
            impatient.get("big", 0, 10)
        assert link.counters().bytes_down == crossed < SIZE
        assert transfer.is_alive()
        with socket.create_connection(link.address) as sock:
            sock.sendall(b"HEAD /big HTTP/1.0\r\n\r\n")
            link.mend()
            sock.settimeout(30)
            assert sock.recv(12) == b"HTTP/1.1 200"
        transfer.join()
        assert got == [(nginx.root / "big").read_bytes()]


def test_cut_that_resets(nginx: Nginx) -> None:
    with Link(nginx.address, mbit=50, rtt_ms=1) as link, closing(HttpStore(link.url)) as store:
        failures: list[str] = []

        def work() -> None:
            try:
                store.get("big")
            except UnavailableError as error:
                failures.append(error.reason)

        transfer = threading.Thread(target=work)
        transfer.start()
        while link.counters().bytes_down < 100_000:
            assert transfer.is_alive()
        link.cut("reset")
        transfer.join()
        assert failures == ["connection reset by peer"]
        assert link.counters().open_connections == 0
        for _ in range(3):
            with pytest.raises(UnavailableError, match=r"reset|closed the connection|broken pipe"):
                store.get("big", 0, 10)
        link.mend()
        assert len(store.get("big", 0, 10)) == 10
        with pytest.raises(ValueError, match="cannot be cut by 'bend'"):
            link.cut("bend")  # type: ignore[arg-type]


def test_target_that_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = listener.getsockname()
    with Link(nobody, mbit=100, rtt_ms=10) as link, closing(HttpStore(link.url)) as store:
        for _ in range(3):
            with pytest.raises(UnavailableError, match="reset"):
                store.get("x")
        assert link.counters().connections == 3
        assert link.counters().open_connections == 0


def test_target_that_restarts(nginx: Nginx) -> None:
    with Link(nginx.address, mbit=1000, rtt_ms=1) as link, closing(HttpStore(link.url)) as store:
        assert len(store.get("big", 0, 10)) == 10
        nginx.stop()
        with pytest.raises(UnavailableError):
            store.get("big", 0, 10)
        nginx.start()
        assert len(store.get("big", 0, 10)) == 10


def test_client_that_does_not_read(nginx: Nginx) -> None:
    """The sender is held back: what crosses is bounded by the window and the kernel's buffers."""
    with Link(nginx.address, mbit=10_000, rtt_ms=0) as link, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(link.address)
        sock.sendall(b"GET /big HTTP/1.0\r\n\r\n")
        with closing(HttpStore(link.url)) as store:
            for _ in range(2):
                assert len(store.get("big")) == SIZE
        crossed = link.counters().bytes_down - 2 * SIZE
        assert 0 < crossed < SIZE / 2
        got = 0
        while piece := sock.recv(1 << 20):
            got += len(piece)
        assert got > SIZE


def test_ends_with_its_maker(nginx: Nginx) -> None:
    """Also when the maker is killed and cannot clean up."""
    script = (
        "import os, sys\nfrom support.link import Link\n"
        f"link = Link({nginx.address!r})\nprint(link.address[1], flush=True)\nsys.stdin.read()"
    )
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(scripts)},
    ) as maker:
        assert maker.stdout is not None
        port = int(maker.stdout.readline())
        socket.create_connection(("127.0.0.1", port)).close()
        maker.kill()
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline


def test_by_hand(nginx: Nginx) -> None:
    command = [sys.executable, "-m", "support.link", "--target", f"127.0.0.1:{nginx.port}", "--listen", "127.0.0.1:0"]
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    with subprocess.Popen([*command, "--mbit", "500", "--rtt", "2"], cwd=scripts, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            where = process.stderr.readline().decode().split()[0]
            with closing(HttpStore(f"http://{where}")) as store:
                assert len(store.get("big", 0, 1000)) == 1000
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 0
            assert process.stderr.read().split()[1:3] == [b"bytes", b"down,"]
        finally:
            process.kill()
