"""Splitting images of several files, ranges or records, beside zstd on the same memory; and what memory it takes."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from imagefs.formats.criu_pagemap import COMMON_MAGIC, PAGEMAP_MAGIC, PagemapEntry, PagemapHead
from imagefs.formats.firecracker import X86_64, crc64
from support.bench.figures import Figure
from support.bench.memory import write_memory
from support.bench.split import LIMIT, measure

SIZE = 1 << 30
RUNS = 2
PAGE = 4096
DIFF_SHARE = 0.1
"""Of the pages, in a diff snapshot."""
XEN_BATCH = 1024
"""Pages of a record, as libxc has it."""
CRIU_GAP = 3
"""Pages in a row in a process, on the average, before one is missing: some 60 000 runs."""


def run(work: Path) -> Iterator[Figure]:
    memory = work / "memory"
    write_memory(memory, SIZE)
    sources = {
        "lime, from a pipe": _lime(work, memory),
        "firecracker with a diff": _firecracker(work, memory),
        "cloud-hypervisor": _cloud_hypervisor(work, memory),
        "criu": _criu(work, memory),
        "xen, a live-migrated PVH guest": _xen(work, memory),
        "elf-core": _elf_core(work, memory),
    }
    seconds = dict.fromkeys(sources, float("inf"))
    peak = dict.fromkeys(sources, 0)
    zstd = float("inf")
    for number in range(RUNS):
        # Taken in turns, so that what else this machine does hits all alike; the best of each counts.
        zstd = min(zstd, measure(["zstd", "-3", "-T2", "-q", "-f", str(memory), "-o", str(work / "zst")])[0])
        for name, (words, piped) in sources.items():
            command = [sys.executable, "-m", "imagefs.cli", "split", "-q", *words, str(work / f"{name}{number}/vm")]
            if piped is None:
                taken, resident = measure(command)
            else:
                with subprocess.Popen(["cat", str(piped)], stdout=subprocess.PIPE) as cat:
                    taken, resident = measure(command, cat.stdout)
            seconds[name], peak[name] = min(seconds[name], taken), max(peak[name], resident)
            shutil.rmtree(work / f"{name}{number}")
    what = f"{SIZE >> 20} MiB of memory, 30 % of it zero, best of {RUNS}"
    rate = SIZE / 1e6
    for name in sources:
        yield Figure(
            f"split throughput, {name}", rate / seconds[name], "MB/s", "zstd -3 -T2", rate / zstd, 0.5, "higher", what
        )
        bound = f"{LIMIT >> 20} MiB"
        yield Figure(f"split's peak resident memory, {name}", peak[name], "bytes", bound, LIMIT, 1.0, "lower", what)


Source = tuple[list[str], Path | None]
"""Words of the command, and what is piped into it."""


def _lime(work: Path, memory: Path) -> Source:
    path = work / "ram.lime"
    with open(path, "wb") as file, open(memory, "rb") as ram:
        for start, end in ((0x1000, 0x9FBFF), (0x100000, SIZE - 1)):
            file.write(struct.pack("<IIQQQ", 0x4C694D45, 1, start, end, 0))
            file.flush()
            ram.seek(start)
            left = end + 1 - start
            while left:
                left -= file.write(ram.read(min(left, 1 << 20)))
    return ["-"], path


def _firecracker(work: Path, memory: Path) -> Source:
    rng = random.Random(2)
    head = struct.pack("<QQ", X86_64 << 16, 5) + b"8.0.0" + rng.randbytes(200_000)
    (work / "vmstate").write_bytes(head + struct.pack("<Q", crc64(head)))
    with open(work / "diff", "wb") as file, open(memory, "rb") as ram:
        file.truncate(SIZE)
        for page in sorted(rng.sample(range(SIZE // PAGE), int(DIFF_SHARE * SIZE / PAGE))):
            changed = bytearray(os.pread(ram.fileno(), PAGE, page * PAGE))
            changed[:8] = struct.pack("<Q", page)
            os.pwrite(file.fileno(), changed, page * PAGE)
    return ["--memory", str(memory), "--memory", str(work / "diff"), str(work / "vmstate")], None


def _cloud_hypervisor(work: Path, memory: Path) -> Source:
    directory = work / "snapshot"
    directory.mkdir()
    os.link(memory, directory / "memory-ranges")
    (directory / "config.json").write_text("{}")
    state = json.dumps({"memory_ranges": {"data": [{"gpa": 0, "length": SIZE}]}})
    manager = {"snapshots": {}, "snapshot_data": {"state": state}}
    (directory / "state.json").write_text(json.dumps({"snapshots": {"memory-manager": manager}}))
    return [str(directory)], None


def _criu(work: Path, memory: Path) -> Source:
    rng = random.Random(3)
    directory = work / "dump"
    directory.mkdir()
    os.link(memory, directory / "pages-1.img")
    messages = [PagemapHead(pages_id=1)]
    left, address = SIZE // PAGE, 0x5581_0000_0000
    while left:
        count = min(left, rng.randrange(1, 2 * CRIU_GAP + 2))
        messages.append(PagemapEntry(vaddr=address, compat_nr_pages=count, flags=4))
        left -= count
        address += (count + 1) * PAGE
    encoded = [message.SerializeToString() for message in messages]
    body = b"".join(struct.pack("<I", len(each)) + each for each in encoded)
    (directory / "pagemap-17.img").write_bytes(struct.pack("<II", COMMON_MAGIC, PAGEMAP_MAGIC) + body)
    return [str(directory)], None


def _xen(work: Path, memory: Path) -> Source:
    """A tenth of the pages is sent twice, and most of the first 4 GiB is not there."""
    rng = random.Random(4)
    path = work / "xen.save"
    again = sorted(rng.sample(range(SIZE // PAGE), int(DIFF_SHARE * SIZE / PAGE)))
    with open(path, "wb") as file, open(memory, "rb") as ram:
        file.write(struct.pack(">8s4sIHHI", b"\xff" * 8, b"XENF", 3, 0, 0, 0) + struct.pack("<IHHII", 2, 12, 0, 4, 17))
        file.write(struct.pack("<II", 0x10, 0))
        for pages in (range(SIZE // PAGE), again):
            for first in range(0, len(pages), XEN_BATCH):
                batch = pages[first : first + XEN_BATCH]
                file.write(struct.pack(f"<IIII{len(batch)}Q", 1, 8 + len(batch) * (8 + PAGE), len(batch), 0, *batch))
                file.writelines(os.pread(ram.fileno(), PAGE, page * PAGE) for page in batch)
        for first in range(SIZE // PAGE, 0xFF000, XEN_BATCH):
            absent = (0xF << 60 | pfn for pfn in range(first, first + XEN_BATCH))
            file.write(struct.pack(f"<IIII{XEN_BATCH}Q", 1, 8 + XEN_BATCH * 8, XEN_BATCH, 0, *absent))
        context = struct.pack("<HHI", 2, 0, 1032) + bytes(1032) + bytes(8)
        file.write(struct.pack("<II", 9, len(context)) + context + bytes(8))
    return [str(path)], None


def _elf_core(work: Path, memory: Path) -> Source:
    path = work / "vm.core"
    header = struct.pack("<4sBBB9x", b"\x7fELF", 2, 1, 1) + struct.pack(
        "<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    header += struct.pack("<IIQQQQQQ", 1, 0, 120, 0, 0, SIZE, SIZE, 0)
    with open(path, "wb") as file, open(memory, "rb") as ram:
        file.write(header)
        shutil.copyfileobj(ram, file)
    return [str(path)], None
