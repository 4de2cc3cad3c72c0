"""How fast a whole image arrives where the link is no limit: store, verify, decompress and cache, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.bench.figures import Figure
from support.bench.memory import write_memory
from support.mounts import mounted
from support.nginx import Nginx

SIZE = 1 << 30
PAGE = 4096
GOAL = 600e6


def run(work: Path) -> Iterator[Figure]:
    image = work / "memory"
    write_memory(image, SIZE, seed=6)
    used = sum(1 for page in _pages(image) if page.strip(b"\0")) * PAGE
    split = [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(image), f"{work}/store/vm"]
    subprocess.run(split, check=True)
    compressed = _zstd_of_used(image, work / "used.zst")
    unpacking = _unpacking_seconds(work / "used.zst")
    image.unlink()
    stored = sum(path.stat().st_size for path in (work / "store" / "objects").rglob("*") if path.is_file())
    with Nginx(work) as nginx:
        begun = time.monotonic()
        with mounted(f"{nginx.url}/store/vm", work / "mnt", f"cache={work / 'cache'}") as mountpoint:
            while not (status := _status(mountpoint))["memory"]["complete"]:
                time.sleep(0.05)
            seconds = time.monotonic() - begun
            processor = _processor_seconds(int(status["mount"]["pid"]))
            wire = nginx.requests()
    sent = sum(request.bytes for request in wire)
    what = (
        f"{SIZE >> 30} GiB of memory, {1 - used / SIZE:.0%} of it zero, compressed {used / stored:.2f} : 1; loopback "
        f"nginx, {os.cpu_count()} processors; with content only {used / 1e6 / seconds:.0f} MB/s; "
        f"{len(wire)} requests; daemon {processor:.1f} s of processor time in {seconds:.1f} s"
    )
    yield Figure("filling", SIZE / seconds, "B/s", "600 MB/s", GOAL, 1.0, "higher", what)
    yield Figure("filling, content", used / seconds, "B/s", "one zstd -d", used / unpacking, 0.8, "higher", what)
    yield Figure("bytes on the wire", sent, "bytes", "zstd -3 of non-zero pages", compressed, 1.10, "lower", what)


def _pages(image: Path) -> Iterator[bytes]:
    with image.open("rb") as file:
        while block := file.read(1 << 20):
            yield from (block[at : at + PAGE] for at in range(0, len(block), PAGE))


def _zstd_of_used(image: Path, target: Path) -> int:
    with subprocess.Popen(["zstd", "-3", "-q", "-o", str(target)], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        for page in _pages(image):
            if page.strip(b"\0"):
                process.stdin.write(page)
    assert process.returncode == 0
    return target.stat().st_size


def _unpacking_seconds(path: Path) -> float:
    begun = time.monotonic()
    subprocess.run(["zstd", "-d", "-q", "-c", str(path)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def _status(mountpoint: Path) -> dict[str, dict[str, Any]]:
    status: dict[str, dict[str, Any]] = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
    return status


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
