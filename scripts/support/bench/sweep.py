"""The daemon's resident memory while it sweeps a whole image."""

from __future__ import annotations

import json
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

SIZE = 4 << 30
LIMIT = 120 << 20


def run(work: Path) -> Iterator[Figure]:
    image = work / "memory"
    write_memory(image, SIZE)
    target = str(work / "store" / "vm")
    split = [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(image), target]
    subprocess.run(split, check=True)
    image.unlink()
    with Nginx(work) as nginx:
        begun = time.monotonic()
        with mounted(f"{nginx.url}/store/vm", work / "mnt", f"cache={work / 'cache'},prefetch=all") as mountpoint:
            while not (status := _status(mountpoint))["memory"]["complete"]:
                time.sleep(0.2)
            seconds = time.monotonic() - begun
            peak = _peak(int(status["mount"]["pid"]))
    what = f"{SIZE >> 30} GiB of memory, 30 % of it zero, loopback nginx, cache on disk"
    yield Figure("daemon's peak resident memory", peak, "bytes", "120 MiB", LIMIT, 1.0, "lower", what)
    # That the bound on memory is not bought with time. How fast an image can arrive is what `bench fill` measures.
    yield Figure("sweep", SIZE / 1e6 / seconds, "MB/s", "100 MB/s", 100, 1.0, "higher", what)


def _status(mountpoint: Path) -> dict[str, dict[str, Any]]:
    status: dict[str, dict[str, Any]] = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
    return status


def _peak(pid: int) -> int:
    """VmHWM: the most that was ever resident, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")
