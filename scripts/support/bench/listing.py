"""Listing page files: what a user of ``ls`` and ``find`` waits for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from support.bench.figures import Figure
from support.bench.memory import write_memory
from support.mounts import mounted

SIZE = 256 << 20


def run(work: Path) -> Iterator[Figure]:
    image = work / "memory"
    write_memory(image, SIZE)
    target = str(work / "store" / "vm")
    subprocess.run(
        [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(image), target], check=True
    )
    with mounted(target, work / "mnt", "nocache") as mountpoint:
        pages = mountpoint / "pages"
        one = _seconds(["ls", "-l", str(pages / "0x00003")])
        everything = _seconds(["find", str(pages), "-type", "f", "-size", "+0"])
    what = "a local store, cold; ls -l asks for the attributes of each"
    yield Figure("ls -l of 4096 pages", one, "s", "a second", 1, 0.6, "lower", what)
    yield Figure("find over 65,536 pages", everything, "s", "five seconds", 5, 1.0, "lower", what)


def _seconds(command: list[str]) -> float:
    begun = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun
