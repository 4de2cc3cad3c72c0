"""What users feel: bytes and seconds until a guest that is resumed over a link answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from support.bench.figures import Figure
from support.quickstart import Options, measure


def run(work: Path) -> Iterator[Figure]:
    result = measure(Options(), Console(stderr=True), work)
    assert result.plain is not None
    options = result.options
    what = (
        f"{options.memory_mib} MiB guest, {options.fill_mib} MiB of it filled, {options.mbit:g} Mbit/s, "
        f"{options.rtt_ms:g} ms"
    )
    bytes_down = result.imagefs.answer_bytes
    yield Figure("bytes to first answer", bytes_down, "bytes", "stored", result.stored_bytes, 0.10, "lower", what)
    yield Figure(
        "seconds to first answer",
        result.imagefs.answer_seconds,
        "s",
        "download, then restore",
        result.plain.answer_seconds,
        1.0,
        "lower",
        what,
    )
