"""Captures made in memory, for tests of everything behind the formats."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from imagefs.image.capture import BytesSource, Capture, PageKind
from imagefs.image.geometry import PAGE_SIZE, Geometry, flat_geometry
from imagefs.image.native import NativeTemplate, TemplateBuilder
from imagefs.image.vcpu import VcpuState


def memory_of(pages: int, seed: int, zero_share: float = 0.5) -> bytes:
    """Reproducible memory: zero pages, compressible and random ones, some of them equal."""
    rng = random.Random(seed)
    common = [rng.randbytes(PAGE_SIZE) for _ in range(3)]
    out = bytearray()
    for _ in range(pages):
        if rng.random() < zero_share:
            out += bytes(PAGE_SIZE)
        else:
            kind = rng.randrange(3)
            out += (
                rng.randbytes(PAGE_SIZE) if kind == 0 else rng.randbytes(8) * 512 if kind == 1 else rng.choice(common)
            )
    return bytes(out)


def raw_template(memory: bytes) -> NativeTemplate:
    """The native file is the memory itself."""
    entries, literals = bytearray(), bytearray()
    builder = TemplateBuilder(entries.extend, literals.extend)
    builder.pages(0, len(memory) // PAGE_SIZE)
    builder.finish()
    empty = BytesSource(b"")
    return NativeTemplate(builder.size, BytesSource(bytes(entries)), BytesSource(bytes(literals)), empty, empty)


def capture_of(
    memory: bytes,
    *,
    state: bytes = b"",
    config: Mapping[str, bytes] | None = None,
    geometry: Geometry | None = None,
    restore: Mapping[str, Any] | None = None,
    vcpus: tuple[VcpuState, ...] = (),
    essential: tuple[PageKind, ...] = (),
    likely: tuple[range, ...] = (),
) -> Capture:
    return Capture(
        "raw",
        "1",
        geometry or flat_geometry(len(memory)),
        BytesSource(memory),
        raw_template(memory),
        BytesSource(state),
        config or {},
        restore or {},
        vcpus,
        essential,
        likely,
    )
