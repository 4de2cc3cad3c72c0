"""However large the guest, splitting takes little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from imagefs.image.geometry import PAGE_SIZE
from tests.unit.streams import Options, build, u64

LIMIT_MIB = 100
PAGES = (1 << 30) // PAGE_SIZE

READ = """
import sys
from pathlib import Path
from imagefs.formats import open_capture
from imagefs.image.native_reader import NativeReader
def peak():  # not ru_maxrss, which begins with what the parent had
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1])
before = peak()
with open_capture(sys.stdin.buffer, spool_dir=Path(sys.argv[1])) as capture:
    assert capture.memory.size == int(sys.argv[2])
    print(before, peak(), capture.native.size)
    print(capture.native.superseded.size, capture.native.entries.size)
"""


def feed(pipe: IO[bytes], head: bytes, end: bytes, page: bytes) -> None:
    """All pages, then every third page of the first half again, then the rest of the stream."""
    with pipe:
        pipe.write(head)
        pipe.write(u64(8) + b"\6pc.ram" + page)
        for first in range(1, PAGES, 256):
            numbers = range(first, min(first + 256, PAGES))
            pipe.write(b"".join(u64(number * PAGE_SIZE | 0x28) + page for number in numbers))
        for first in range(0, PAGES // 2, 768):
            numbers = range(first, min(first + 768, PAGES // 2), 3)
            pipe.write(b"".join(u64(number * PAGE_SIZE | 0x28) + page for number in numbers))
        pipe.write(end)


def test_large_stream_through_a_pipe(tmp_path: Path) -> None:
    """1.2 GiB of a live-migrated guest."""
    built = build([[]], Options(blocks={"pc.ram": PAGES * PAGE_SIZE}, model=False))
    cut = built.data.index(u64(0x10) + b"\x7e")
    process = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path), str(PAGES * PAGE_SIZE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=False,
    )
    assert process.stdin is not None
    page = os.urandom(PAGE_SIZE)
    feeder = threading.Thread(target=feed, args=(process.stdin, built.data[:cut], built.data[cut:], page))
    try:
        feeder.start()
        assert process.stdout is not None
        words = process.stdout.read().split()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        feeder.join()
    before, after, native, superseded, entries = map(int, words)
    again = len(range(0, PAGES // 2, 3))
    assert native == len(built.data) + (PAGES + again) * (PAGE_SIZE + 8) + 7
    assert superseded == again * PAGE_SIZE
    assert entries > again * 40
    assert after <= LIMIT_MIB << 10, f"{after} KiB, {before} KiB of them before the first byte"
