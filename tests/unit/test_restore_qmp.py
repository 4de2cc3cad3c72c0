"""The QMP client against a scripted QEMU on a unix socket."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imagefs.errors import RestoreError, UsageError
from imagefs.restore.qmp import Qmp, QmpClosedError, QmpError

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": ["oob"]}}


class Peer:
    """QEMU's side of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.fds: list[int] = []

    def say(self, *messages: dict[str, Any]) -> None:
        self.connection.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def hear(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data, fds, _, _ = socket.recv_fds(self.connection, 65536, 4)
            assert data, "the client hung up"
            self.fds += fds
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def greet(self) -> None:
        self.say(GREETING)
        hello = self.hear()
        assert hello["execute"] == "qmp_capabilities"
        self.say({"return": {}, "id": hello["id"]})


@contextmanager
def scripted(script: Callable[[Peer], None]) -> Iterator[Path]:
    """A socket behind which ``script`` runs for the first connection; its assertions fail the test."""
    failures: list[BaseException] = []
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = Path(directory) / "qmp"
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(60)

        def serve() -> None:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(60)
                    script(Peer(connection))
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            thread.join()
        if failures:
            raise failures[0]


def test_commands_events_and_answers() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        asked = peer.hear()
        assert (asked["execute"], asked["arguments"]) == ("query-status", {"a": 1})
        peer.say({"event": "STOP"}, {"return": {"late": True}, "id": asked["id"] - 1})
        peer.say({"event": "RESUME"}, {"return": {"status": "running"}, "id": asked["id"]})
        asked = peer.hear()
        assert "arguments" not in asked
        peer.say({"return": [], "id": asked["id"]}, {"event": "SHUTDOWN"})

    with scripted(script) as path, Qmp.connect(path) as qmp:
        assert qmp.version == "7.2.22"
        assert qmp.peer_pid == os.getpid()
        assert qmp.execute("query-status", {"a": 1}) == {"status": "running"}
        assert [event["event"] for event in qmp.events] == ["STOP", "RESUME"]
        assert qmp.execute("query-memdev") == []
        assert qmp.wait_event("SHUTDOWN", "RESUME")["event"] == "RESUME"
        assert qmp.wait_event("SHUTDOWN", "RESUME")["event"] == "SHUTDOWN"
        qmp.wait_closed()
        with pytest.raises(QmpClosedError):
            qmp.execute("query-status")


def test_refusal_keeps_the_connection() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        asked = peer.hear()
        peer.say({"error": {"class": "GenericError", "desc": "migration is blocked"}, "id": asked["id"]})
        asked = peer.hear()
        peer.say({"error": {"class": "CommandNotFound", "desc": "what?"}})
        asked = peer.hear()
        peer.say({"return": {}, "id": asked["id"]})

    with scripted(script) as path, Qmp.connect(path) as qmp:
        with pytest.raises(QmpError, match=r"QEMU refused migrate: migration is blocked \(GenericError\)") as refused:
            qmp.execute("migrate")
        assert (refused.value.error_class, refused.value.description) == ("GenericError", "migration is blocked")
        with pytest.raises(QmpError, match="what"):
            qmp.execute("nonesuch")
        assert qmp.execute("stop") == {}


def test_file_descriptors_travel_along() -> None:
    received: list[int] = []

    def script(peer: Peer) -> None:
        peer.greet()
        asked = peer.hear()
        received.extend(peer.fds)
        peer.say({"return": {}, "id": asked["id"]})

    reading, writing = os.pipe()
    try:
        with scripted(script) as path, Qmp.connect(path) as qmp:
            qmp.execute("getfd", {"fdname": "x"}, fds=[writing])
        assert len(received) == 1
        os.write(received[0], b"through")
        assert os.read(reading, 100) == b"through"
    finally:
        for fd in (reading, writing, *received):
            os.close(fd)


def test_message_that_comes_in_pieces() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        asked = peer.hear()
        answer = json.dumps({"return": "x" * 200_000, "id": asked["id"]}).encode() + b"\n"
        for start in range(0, len(answer), 7001):
            peer.connection.sendall(answer[start : start + 7001])

    with scripted(script) as path, Qmp.connect(path) as qmp:
        assert qmp.execute("query-version") == "x" * 200_000


def test_silence() -> None:
    """As when another client is connected: QEMU accepts, and says nothing."""
    done = threading.Event()

    def script(peer: Peer) -> None:
        done.wait(60)

    with scripted(script) as path:
        try:
            with pytest.raises(RestoreError, match="no QMP greeting; is another client connected"):
                Qmp.connect(path, greeting_timeout=0.05)
        finally:
            done.set()


def test_command_that_is_not_answered() -> None:
    done = threading.Event()

    def script(peer: Peer) -> None:
        peer.greet()
        peer.hear()
        done.wait(60)

    with scripted(script) as path, Qmp.connect(path) as qmp:
        try:
            with pytest.raises(RestoreError, match=r"did not answer stop within 0\.05 seconds"):
                qmp.execute("stop", timeout=0.05)
        finally:
            done.set()


def test_qemu_that_goes_away() -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.hear()

    with (
        scripted(script) as path,
        Qmp.connect(path) as qmp,
        pytest.raises(QmpClosedError, match="closed the connection"),
    ):
        qmp.execute("quit")


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400\r\n", b"[]\n", b'{"hello": 1}\n', b"\xff\xfe\n"])
def test_something_else_listens(greeting: bytes) -> None:
    with (
        scripted(lambda peer: peer.connection.sendall(greeting)) as path,
        pytest.raises(RestoreError, match="does not speak QMP"),
    ):
        Qmp.connect(path)


def test_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no QEMU listens there \(No such file or directory\); start it with -qmp"):
        Qmp.connect(tmp_path / "qmp")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="no QEMU listens there"):
        Qmp.connect(tmp_path / "file")
    with pytest.raises(UsageError, match="no QEMU listens there"):
        Qmp.connect(tmp_path / ("x" * 200))


def poll_on(qmp: Qmp) -> None:
    while True:
        qmp.poll()


@pytest.mark.parametrize(
    ("wanted", "offered", "verb"), [(True, ["oob"], "exec-oob"), (True, [], "execute"), (False, ["oob"], "execute")]
)
def test_out_of_band(wanted: bool, offered: list[str], verb: str) -> None:
    def script(peer: Peer) -> None:
        peer.say({"QMP": {**GREETING["QMP"], "capabilities": offered}})
        hello = peer.hear()
        assert hello.get("arguments") == ({"enable": ["oob"]} if verb == "exec-oob" else None)
        peer.say({"return": {}, "id": hello["id"]})
        asked = peer.hear()
        assert asked[verb] == "migrate-recover"
        peer.say({"event": "MIGRATION"}, {"return": {}, "id": asked["id"]}, {"event": "STOP"})

    with scripted(script) as path, Qmp.connect(path, out_of_band=wanted) as qmp:
        assert qmp.execute("migrate-recover", out_of_band=True) == {}
        with pytest.raises(QmpClosedError):
            poll_on(qmp)
        assert [event["event"] for event in qmp.events] == ["MIGRATION", "STOP"]
