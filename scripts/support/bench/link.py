"""Real links: how full the background keeps them, and what a touch waits for meanwhile."""

from __future__ import annotations

import json
import mmap
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.bench.figures import Figure
from support.bench.memory import write_memory
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx

SIZE = 640 << 20
PAGE = 4096
SEED = 4


@dataclass(frozen=True, slots=True)
class Kind:
    mbit: float
    rtt_ms: float
    seconds: float
    """For which the link is filled; and of a plain transfer beside it."""
    touches: int

    def __str__(self) -> str:
        return f"{self.mbit:g} Mbit/s, {self.rtt_ms:g} ms"


KINDS = (Kind(10, 150, 15, 30), Kind(100, 40, 6, 45), Kind(1000, 10, 2.5, 60))
PLAIN_SECONDS = 4.0
"""Of a plain transfer at most. All in all the benchmark takes less than three minutes."""


def run(work: Path) -> Iterator[Figure]:
    image = work / "memory"
    write_memory(image, SIZE, seed=SEED)
    split = [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(image), f"{work}/store/vm"]
    subprocess.run(split, check=True)
    with Nginx(work) as nginx:
        for kind in KINDS:
            yield from _measure(kind, work, image, nginx)


def _measure(kind: Kind, work: Path, image: Path, nginx: Nginx) -> Iterator[Figure]:
    packs = sorted((work / "store" / "objects").rglob("*"), key=lambda path: path.stat().st_size)
    pack = packs[-1]
    url_path = f"/store/objects/{pack.parent.name}/{pack.name}"
    with Link(nginx.address, kind.mbit, kind.rtt_ms) as link:
        plain = _plain_rate(link, url_path, pack.stat().st_size, kind.seconds)
        yield Figure(
            "simulated link", plain * 8e-6, "Mbit/s", "set", kind.mbit, 0.97, "higher", f"{kind}, one plain transfer"
        )
        cache = work / f"cache-{kind.mbit:g}"
        with mounted(f"{link.url}/store/vm", work / "mnt", f"cache={cache}") as mountpoint:
            before, begun = _payload(mountpoint), time.monotonic()
            time.sleep(kind.seconds)
            status = _status(mountpoint)
            rate = (status["fetch"]["payload_bytes"] - before) / (time.monotonic() - begun)
            chunk = status["fetch"]["payload_bytes"] // max(1, status["fetch"]["chunks"])
            yield Figure("filling", rate * 8e-6, "Mbit/s", "plain transfer", plain * 8e-6, 0.95, "higher", str(kind))
    with Link(nginx.address, kind.mbit, kind.rtt_ms) as link:
        alone = _chunk_seconds(link, url_path, chunk)
        cache = work / f"cache-touch-{kind.mbit:g}"
        with mounted(f"{link.url}/store/vm", work / "mnt", f"cache={cache}") as mountpoint:
            waits, busy = _touch(mountpoint, image, kind)
    what = f"{kind}, the background fills the link, {len(waits)} touches; chunks of {chunk} bytes; link {busy:.0%} full"
    yardstick = "one chunk over the idle link"
    waits.sort()
    yield Figure("touch, p50", statistics.median(waits), "s", yardstick, alone, 1.2, "lower", what)
    yield Figure("touch, p99", waits[len(waits) * 99 // 100], "s", yardstick, alone, 2.0, "lower", what)


def _status(mountpoint: Path) -> dict[str, dict[str, Any]]:
    status: dict[str, dict[str, Any]] = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
    return status


def _payload(mountpoint: Path) -> int:
    return int(_status(mountpoint)["fetch"]["payload_bytes"])


def _get(sock: socket.socket, path: str, start: int, length: int) -> tuple[float, float]:
    """Seconds to the first and to the last byte of a range, over a connection that is open."""
    begun = time.perf_counter()
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: link\r\nRange: bytes={start}-{start + length - 1}\r\n\r\n".encode())
    answer = bytearray()
    first = 0.0
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(65536)
        first = first or time.perf_counter() - begun
    left = length - (len(answer) - answer.index(b"\r\n\r\n") - 4)
    buffer = bytearray(1 << 20)
    while left:
        got = sock.recv_into(buffer, min(left, len(buffer)))
        assert got, "the server closed the connection"
        left -= got
    return first, time.perf_counter() - begun


def _plain_rate(link: Link, path: str, size: int, seconds: float) -> float:
    """Bytes per second of one plain transfer, its round trip left out; what the simulated link really gives."""
    with socket.create_connection(link.address) as sock:
        begun, done = 0.0, 0
        while not begun or time.perf_counter() - begun < min(seconds, PLAIN_SECONDS):
            piece = min(size, int(link.mbit * 125_000 * 2))
            first, last = _get(sock, path, 0, piece)
            begun += 0 if begun else time.perf_counter() - last + first
            rate = piece / (last - first)
            done += 1
    return rate


def _chunk_seconds(link: Link, path: str, chunk: int) -> float:
    with socket.create_connection(link.address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return statistics.median(_get(sock, path, at * chunk, chunk)[1] for at in range(9))


def _touch(mountpoint: Path, image: Path, kind: Kind) -> tuple[list[float], float]:
    """Seconds that single faults take while the background is at work; and how full it keeps the link meanwhile."""
    rng = random.Random(SEED)
    waits: list[float] = []
    busy: list[float] = []
    time.sleep(5 * kind.rtt_ms / 1e3 + 2)
    with (mountpoint / "memory").open("rb") as file, image.open("rb") as truth:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        memory.madvise(mmap.MADV_RANDOM)
        while len(waits) < kind.touches:
            before, begun = _payload(mountpoint), time.monotonic()
            # The background holds back for a quarter of a second after each touch; then it takes a while to refill.
            time.sleep(0.3 + 3 * kind.rtt_ms / 1e3 + rng.random() * 0.1)
            page = _remote_page(mountpoint, truth, rng)
            if page is None:
                break
            moved = _payload(mountpoint) - before
            busy.append(moved / (kind.mbit * 125_000 * max(1e-3, time.monotonic() - begun - 0.25)))
            at = time.perf_counter()
            byte = memory[page * PAGE]
            waits.append(time.perf_counter() - at)
            truth.seek(page * PAGE)
            assert byte == truth.read(1)[0]
        memory.close()
    return waits, statistics.mean(busy)


def _remote_page(mountpoint: Path, truth: Any, rng: random.Random) -> int | None:
    """A page with content that is not here yet, far from what the background is at."""
    present = (mountpoint / ".imagefs" / "present").read_bytes()
    for _ in range(1000):
        page = rng.randrange(len(present) * 8)
        if present[page >> 3] >> (page & 7) & 1:
            continue
        truth.seek(page * PAGE)
        if truth.read(PAGE).strip(b"\0"):
            return page
    return None
