"""Samples of raw memory."""

from __future__ import annotations

from imagefs.image.geometry import PAGE_SIZE
from tests.unit.samples import Sample


def _any_but_empty(file: str, length: int) -> bool:
    return length > 0


SAMPLES = [
    Sample.of_file("raw", "raw", b"raw memory" * 512 + bytes(2 * PAGE_SIZE) + b"end", may_end=_any_but_empty),
]
