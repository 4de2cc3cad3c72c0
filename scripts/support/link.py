"""A simulated link to a TCP server: bandwidth, round-trip time, and being cut. The model: :mod:`support.shaper`.

It runs in a process of its own, so that it shares no interpreter lock with whoever measures through it::

    with Link(nginx.address, mbit=100, rtt_ms=40) as link:
        ...  # connect to link.address instead
        print(link.counters().bytes_down)

By hand: ``python -m support.link --target 127.0.0.1:8080 --listen 127.0.0.1:8081 --mbit 100 --rtt 40``
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from support.shaper import Shaper
from support.uninterrupted import uninterrupted


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the link was made."""

    bytes_down: int
    """Payload, target to client, that has crossed the link (what is still queued before it is not counted)."""
    bytes_up: int
    connections: int
    """Accepted in all."""
    open_connections: int
    cpu_seconds: float
    """What the simulation itself cost."""


class Link:
    """A link to ``target``, (host, port); connect to :attr:`address` instead. A context manager, usable from threads.

    ``mbit`` is megabits of payload per second, for each direction, ``math.inf`` for no limit; ``rtt_ms`` is the
    round trip in milliseconds. The process ends with its maker, also when that is killed.
    """

    def __init__(self, target: tuple[str, int], mbit: float = 100.0, rtt_ms: float = 40.0) -> None:
        scripts = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [scripts, os.environ.get("PYTHONPATH", "")]))
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "support.link", "--control"),
                *(f"--target={target[0]}:{target[1]}", f"--mbit={mbit}", f"--rtt={rtt_ms}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        self._mbit = mbit
        self._rtt_ms = rtt_ms
        try:
            self.address: tuple[str, int] = ("127.0.0.1", int(self._read_answer()["port"]))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Link {self.address[0]}:{self.address[1]}, {self._mbit} Mbit/s, {self._rtt_ms} ms>"

    @property
    def url(self) -> str:
        """For an HTTP server as the target."""
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def mbit(self) -> float:
        return self._mbit

    def counters(self) -> Counters:
        return Counters(**self._ask({"do": "counters"}))

    def set(self, *, mbit: float | None = None, rtt_ms: float | None = None) -> None:
        """Change the link while it is in use."""
        mbit = self._mbit if mbit is None else mbit
        rtt_ms = self._rtt_ms if rtt_ms is None else rtt_ms
        self._ask({"do": "set", "mbit": mbit, "rtt_ms": rtt_ms})
        self._mbit, self._rtt_ms = mbit, rtt_ms

    def cut(self, mode: Literal["hang", "reset"] = "hang") -> None:
        """``hang``: nothing moves, new connections get no answer, until :meth:`mend`; then all goes on.

        ``reset``: all connections are reset, and new ones as soon as they are made.
        """
        self._ask({"do": "cut", "mode": mode})

    def mend(self) -> None:
        self._ask({"do": "mend"})

    @uninterrupted()
    def close(self) -> None:
        """Ends the process and resets what is still connected."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._read_answer()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _read_answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the simulated link's process ended; what it said is on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a link really did, measured through it by a client and a server in this process."""

    mbit: float
    """Payload of one transfer per second, from its first to its last byte."""
    rtt_ms: float
    """Median of small requests on an open connection."""
    first_answer_ms: float
    """From connect() to the first byte of an answer: two round trips."""
    link_cpu: float
    """Share of one processor that the simulation used during the transfer."""


def measure(mbit: float, rtt_ms: float, size: int = 5_000_000) -> Measurement:
    """Check the simulation itself: transfer ``size`` bytes over a link of its own."""
    with _AnswerServer() as server, Link(server.address, mbit, rtt_ms) as link:
        begin = time.perf_counter()
        with socket.create_connection(link.address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _ask_for(sock, 1)
            first_answer = time.perf_counter() - begin
            trips = [_ask_for(sock, 1)[0] for _ in range(9)]
            cpu = link.counters().cpu_seconds
            to_first, to_last = _ask_for(sock, size)
            cpu = link.counters().cpu_seconds - cpu
    seconds = to_last - to_first
    return Measurement(size * 8 / 1e6 / seconds, statistics.median(trips) * 1e3, first_answer * 1e3, cpu / to_last)


class _AnswerServer:
    """Answers each 8-byte big-endian number n with n zero bytes."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._run, name="link-measure-server", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        sock, _ = self._listener.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            zeros = memoryview(bytes(256 * 1024))
            try:
                while request := sock.recv(8, socket.MSG_WAITALL):
                    left = int.from_bytes(request, "big")
                    while left:
                        left -= sock.send(zeros[:left])
            except OSError:
                pass


def _ask_for(sock: socket.socket, size: int) -> tuple[float, float]:
    """Seconds to the first and to the last of ``size`` bytes."""
    begin = time.perf_counter()
    sock.sendall(size.to_bytes(8, "big"))
    buffer = bytearray(256 * 1024)
    left = size - sock.recv_into(buffer, 1)
    first = time.perf_counter() - begin
    while left:
        got = sock.recv_into(buffer, min(left, len(buffer)))
        if not got:
            raise ConnectionError("the link closed the connection")
        left -= got
    return first, time.perf_counter() - begin


def _obey(shaper: Shaper, line: bytes) -> dict[str, Any]:
    command = json.loads(line)
    match command["do"]:
        case "counters":
            counters = Counters(
                shaper.bytes_down, shaper.bytes_up, shaper.accepted, shaper.open_connections, time.process_time()
            )
            return asdict(counters)
        case "set":
            shaper.set(command["mbit"], command["rtt_ms"])
        case "cut":
            shaper.set_cut(command["mode"])
        case "mend":
            shaper.set_cut(None)
        case other:
            raise ValueError(f"unknown command {other!r}")
    return {}


def _run_controlled(shaper: Shaper, port: int) -> None:
    """JSON lines on stdin and stdout, until stdin ends."""
    pending = b""
    os.write(1, json.dumps({"port": port}).encode() + b"\n")
    while True:
        if not shaper.step([0]):
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            try:
                answer = _obey(shaper, line)
            except (ValueError, KeyError, TypeError) as error:
                answer = {"error": str(error)}
            os.write(1, json.dumps(answer).encode() + b"\n")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.link", description="Relay TCP connections as a slow link would.")
    parser.add_argument("--target", type=_address, metavar="HOST:PORT", help="where to relay to")
    parser.add_argument("--listen", type=_address, metavar="HOST:PORT", default=("127.0.0.1", 0))
    parser.add_argument("--mbit", type=float, default=100.0, help="megabits per second each way (default: %(default)s)")
    parser.add_argument("--rtt", type=float, default=40.0, help="round trip in milliseconds (default: %(default)s)")
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help="print what such a link really does, and end")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(asdict(measure(args.mbit, args.rtt))))
        return 0
    if args.target is None:
        parser.error("--target is needed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    listener = socket.create_server(args.listen, backlog=128)
    shaper = Shaper(listener, args.target, args.mbit, args.rtt, time.monotonic)
    port = listener.getsockname()[1]
    try:
        if args.control:
            _run_controlled(shaper, port)
        else:
            print(f"{args.listen[0]}:{port} leads to {args.target[0]}:{args.target[1]}", file=sys.stderr)
            while True:
                shaper.step([])
    except KeyboardInterrupt:
        print(f"{shaper.bytes_down} bytes down, {shaper.bytes_up} up", file=sys.stderr)
    finally:
        shaper.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
