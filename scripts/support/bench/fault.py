"""A random fault on memory that is not here, over loopback: beside nbdkit's curl plugin under nbdfuse."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bench.figures import Figure
from support.bench.memory import write_memory
from support.mounts import mounted
from support.nginx import Nginx

SIZE = 1 << 30
PAGE = 4096
FAULTS = 600
SEED = 9


def run(work: Path) -> Iterator[Figure]:
    image = work / "memory"
    write_memory(image, SIZE, seed=SEED, zero=0)
    split = [sys.executable, "-m", "imagefs.cli", "split", "-q", "--format", "raw", str(image), f"{work}/store/vm"]
    subprocess.run(split, check=True)
    with Nginx(work) as nginx:
        for advice, name in ((mmap.MADV_RANDOM, "no readahead"), (mmap.MADV_NORMAL, "the kernel's readahead")):
            with _nbdfuse(f"{nginx.url}/memory", work / "nbd") as exported:
                theirs = _faults(exported, image, advice)
            with mounted(f"{nginx.url}/store/vm", work / "mnt", "nocache,prefetch=none") as mountpoint:
                ours = _faults(mountpoint / "memory", image, advice)
            what = f"{FAULTS} random pages of {SIZE >> 30} GiB mapped, {name}, loopback nginx, nothing cached"
            yardstick = "nbdkit curl + nbdfuse"
            for share, at in (("p50", FAULTS // 2), ("p99", FAULTS * 99 // 100)):
                goal = 1.0 if share == "p50" else 2.0
                yield Figure(f"fault, {share}", ours[at], "s", yardstick, theirs[at], goal, "lower", what)


def _faults(path: Path, image: Path, advice: int) -> list[float]:
    """Seconds of each, sorted. No two pages share a window or what is read ahead."""
    rng = random.Random(SEED)
    pages = [256 * block + rng.randrange(256) for block in rng.sample(range(SIZE // PAGE // 256), FAULTS)]
    waits = []
    with path.open("rb") as file, image.open("rb") as truth:
        memory = mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)
        memory.madvise(advice)
        for page in pages:
            begun = time.perf_counter()
            byte = memory[page * PAGE]
            waits.append(time.perf_counter() - begun)
            truth.seek(page * PAGE)
            assert byte == truth.read(1)[0]
        memory.close()
    assert statistics.median(waits) > 0
    return sorted(waits)


@contextmanager
def _nbdfuse(url: str, directory: Path) -> Iterator[Path]:
    """The URL as a file, as people do it who have nothing else."""
    directory.mkdir(exist_ok=True)
    target = directory / "memory"
    command = ["nbdfuse", "-r", str(target), "--command", "nbdkit", "-s", "-r", "curl", f"url={url}"]
    target.touch()
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 20
            while target.stat().st_size != SIZE:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("nbdfuse did not mount")
                time.sleep(0.01)
            yield target
        finally:
            unmounter = shutil.which("fusermount3") or "umount"
            arguments = ["-u"] if unmounter.endswith("fusermount3") else []
            subprocess.run([unmounter, *arguments, str(target)], check=False, capture_output=True)
            process.terminate()
            process.wait(timeout=20)
    os.unlink(target)
