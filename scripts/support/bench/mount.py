"""What it costs to mount: requests and bytes until memory can be read, whatever the image's size."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support.bench.figures import Figure
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx

TIB = 1 << 40
PIECES, PIECE = 3000, 20_000
MBIT, RTT_MS = 100.0, 40.0
CONNECT = 1
"""Opening the connection takes a round trip, too."""


def run(work: Path) -> Iterator[Figure]:
    image = work / "memory"
    rng = random.Random(1)
    with image.open("wb") as file:
        file.truncate(TIB)
        places = [rng.randrange(TIB // 4096) * 4096 for _ in range(PIECES)]
        first = places[0]
        for place in places:
            file.seek(place)
            file.write(rng.randbytes(PIECE))
    target = str(work / "store" / "vm")
    split = [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(image), target]
    subprocess.run(split, check=True)
    with Nginx(work) as nginx, Link(nginx.address, MBIT, RTT_MS) as link:
        begun = time.monotonic()
        with mounted(f"{link.url}/store/vm", work / "mnt", "nocache,prefetch=none") as mountpoint:
            seconds = time.monotonic() - begun
            requests, down = len(nginx.requests()), link.counters().bytes_down
            begun = time.monotonic()
            with (mountpoint / "memory").open("rb", buffering=0) as memory:
                memory.seek(first)
                page = memory.read(4096)
            reading = time.monotonic() - begun
            read_requests = len(nginx.requests()) - requests
            with image.open("rb") as file:
                file.seek(first)
                assert page == file.read(4096)
    what = f"1 TiB sparse raw memory, {PIECES} pieces of {PIECE} bytes, {MBIT:g} Mbit/s, {RTT_MS:g} ms"
    yield Figure("round trips to mount", requests + CONNECT, "round trips", "the bound", 4, 1.0, "lower", what)
    yield Figure("bytes to mount", down, "bytes", "1 MiB", 1 << 20, 1.0, "lower", what)
    yield Figure("seconds to mount", seconds, "s", "10 s", 10, 1.0, "lower", what)
    # Down the index, two levels below its root, and the chunk; less where the blocks came with the metadata.
    yield Figure("round trips of a first page", read_requests, "round trips", "the tree's depth", 3, 1.0, "lower", what)
    yield Figure("seconds of a first page", reading, "s", "a second", 1, 1.0, "lower", what)
