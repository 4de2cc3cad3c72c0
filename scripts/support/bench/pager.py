"""The fault helper, beside a bare handler and bare ioctls in the same run (``pager.c``)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from support.bench.figures import Figure

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[2] / "native"
RUNS = 5
GOALS: list[tuple[str, str, str, str, str, float]] = [
    ("fault on a cached page, p50", "pager-1-p50", "us", "bare handler", "bare-1-p50", 1.3),
    ("fault on a cached page, p99", "pager-1-p99", "us", "bare handler", "bare-1-p99", 2.0),
    ("8 threads, faults a second", "pager-8-rate", "1/s", "one thread", "pager-1-rate", 1.0),
    ("8 threads with installer, p99", "ahead-8-p99", "us", "without", "pager-8-p99", 2.0),
    ("installing ahead", "install", "B/s", "UFFDIO_COPY of 2 MiB", "copy", 0.8),
    ("installing zeros ahead", "zeros", "B/s", "UFFDIO_ZEROPAGE of 2 MiB", "zeropage", 0.8),
]


def run(work: Path) -> Iterator[Figure]:
    program = work / "pager"
    sources = [HERE / "pager.c", NATIVE / "pages.c", *sorted(NATIVE.glob("pager*.c"))]
    subprocess.run(["gcc", "-std=c11", "-O3", "-pthread", *sources, "-o", program], check=True)
    measured: dict[str, float] = {}
    for _ in range(RUNS):
        output = subprocess.run([program, work], check=True, stdout=subprocess.PIPE, text=True).stdout
        for name, text in map(str.split, output.splitlines()):
            # The best of each: what else this machine does must not count for one side alone.
            best = min if name.endswith(("p50", "p99")) else max
            measured[name] = best(float(text), measured.get(name, float(text)))
    for name, value, unit, yardstick, compared, goal in GOALS:
        better: Literal["higher", "lower"] = "lower" if unit == "us" else "higher"
        what = f"a cache of 512 MiB in the page cache, 10000 random touches, best of {RUNS}"
        yield Figure(name, measured[value], unit, yardstick, measured[compared], goal, better, what)
