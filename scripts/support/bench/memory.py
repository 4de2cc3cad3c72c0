"""Memory to measure with: what a guest's looks like, made from this machine's own programs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 20
SOURCES = ("/usr/lib", "/usr/share", "/usr/bin")


def write_memory(path: Path, size: int, *, seed: int = 1, zero: float = 0.3, noise: float = 0.1) -> None:
    """A file of ``size`` bytes: ``zero`` of it holes, ``noise`` random bytes, the rest contents of files.

    Free memory comes in long runs, the page cache and programs in runs of some pages; no two blocks are equal.
    """
    rng = random.Random(seed)
    contents = _contents(rng)
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, BLOCK):
            kind = rng.random()
            if kind < zero:
                continue
            file.seek(offset)
            if kind < zero + noise:
                file.write(rng.randbytes(BLOCK))
                continue
            # Some pages of every used block are free, too.
            block = bytearray(next(contents))
            for _ in range(8):
                at = rng.randrange(0, BLOCK, 4096)
                block[at : at + 4096] = bytes(4096)
            block[rng.randrange(0, BLOCK - 8) :][:8] = offset.to_bytes(8, "big")
            file.write(block[:BLOCK])


def _contents(rng: random.Random) -> Iterator[bytes]:
    """Blocks of file contents, page-aligned as in a page cache, for ever, no block like one before it."""
    files = sorted(p for source in SOURCES for p in Path(source).rglob("*") if p.is_file() and not p.is_symlink())
    rng.shuffle(files)
    block = bytearray()
    while True:
        for path in files:
            try:
                data = path.read_bytes()[: 8 * BLOCK]
            except OSError:
                continue
            data += bytes(-len(data) % 4096)
            shift = rng.randrange(0, 4096)
            block += data[shift:] + data[:shift]
            while len(block) >= BLOCK:
                yield bytes(block[:BLOCK])
                del block[:BLOCK]
