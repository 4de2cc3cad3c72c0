"""Splitting a flat memory file, beside what zstd makes of it; and what splitting takes of this host's memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from support.bench.figures import Figure
from support.bench.memory import write_memory

SIZE = 2 << 30
RUNS = 3
LIMIT = 200 << 20
"""Bytes of resident memory, whatever the image's size."""

WAIT = """
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Between us and what is measured, because the kernel counts what a child was before its exec, too: a copy of us, who
have just made the memory and are larger than anything here."""


def run(work: Path) -> Iterator[Figure]:
    memory = work / "memory"
    write_memory(memory, SIZE)
    compressed = work / "memory.zst"
    zstd = imagefs = float("inf")
    peak = 0
    for number in range(RUNS):
        # Taken in turns, so that what else this machine does hits both alike; the best of each counts.
        zstd = min(zstd, measure(["zstd", "-3", "-T2", "-q", "-f", str(memory), "-o", str(compressed)])[0])
        seconds, resident = measure(_split(memory, work / f"store{number}"))
        imagefs, peak = min(imagefs, seconds), max(peak, resident)
    stored = sum(p.stat().st_size for p in (work / "store0" / "objects").rglob("*") if p.is_file())
    what = f"{SIZE >> 20} MiB of raw memory, 30 % of it zero"
    rate, best = SIZE / 1e6, f"{what}, best of {RUNS}"
    yield Figure("split throughput", rate / imagefs, "MB/s", "zstd -3 -T2", rate / zstd, 0.5, "higher", best)
    yield Figure("bytes stored", stored, "bytes", "zstd -3", compressed.stat().st_size, 1.10, "lower", best)
    bound = f"{LIMIT >> 20} MiB"
    name = "split's peak resident memory"
    yield Figure(f"{name}, a file", peak, "bytes", bound, LIMIT, 1.0, "lower", f"{what}, the worst of {RUNS}")
    with subprocess.Popen(["cat", str(memory)], stdout=subprocess.PIPE) as cat:
        peak = measure(_split("-", work / "piped"), cat.stdout)[1]
    yield Figure(f"{name}, a pipe", peak, "bytes", bound, LIMIT, 1.0, "lower", f"{what}, through a pipe")


def _split(source: Path | str, store: Path) -> list[str]:
    return [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(source), str(store / "vm")]


def measure(command: list[str], stdin: IO[bytes] | None = None) -> tuple[float, int]:
    """Seconds that a command takes, and the most bytes that were ever resident of it."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WAIT, *command], stdin=stdin, stdout=subprocess.PIPE, check=True)
    return time.monotonic() - begun, int(done.stdout) << 10
